"""Run the benchmarks and print one table; ``--json`` for programs, ``--update-readme`` for the README."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from figure import Figure

HERE = Path(__file__).parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def measure(chosen: list[str]) -> list[dict[str, Any]]:
    """Run the chosen benchmarks, one after the other."""
    figures = []
    for name in chosen:
        print(f"benchmarks: {name} …", file=sys.stderr, flush=True)
        began = time.monotonic()
        figures += [{"bench": name, **figure} for figure in _figures_of(name)]
        print(f"benchmarks: {name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return figures


def _figures_of(name: str) -> list[dict[str, Any]]:
    """One benchmark's figures; one that cannot run says why in a figure and harms no other."""
    try:
        found = list(importlib.import_module(f"bench_{name}").measure())
    except Exception as error:  # noqa: BLE001 - the net below every benchmark: its reason is the figure
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300] or "no reason given"
        return [Figure(name, None, "", note=f"{type(error).__name__}: {reason}").to_dict()]
    return [figure if isinstance(figure, dict) else figure.to_dict() for figure in found]


def _shown(figure: dict[str, Any]) -> list[str]:
    verdict = {True: "yes", False: "**no**", None: ""}[figure.get("ok")]
    row = [figure["name"], _value(figure), figure.get("target", ""), verdict, figure.get("note", "")]
    return [cell.replace("|", "\\|") for cell in row]


def _value(figure: dict[str, Any]) -> str:
    value = figure["value"]
    if value is None:
        return "not measured"
    shown = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{shown} {figure['unit']}".strip()


def table(figures: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    head = ["figure", "measured", "target", "met", "how"]
    rows = [head, ["---"] * 5, *(_shown(figure) for figure in figures)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine() -> str:
    """The machine in one line."""
    return f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, guests under TCG"


def update(readme: Path, text: str) -> None:
    """Put the table between the README's markers."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme}: want the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"which ones: {', '.join(names())} (default: all)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--update-readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--update-docs", action="store_true", help="let benchmarks that have a page write it")
    args = parser.parse_args()
    unknown = set(args.name) - set(names())
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: want one of {', '.join(names())}")
    figures = measure(args.name or names())
    text = f"Measured with `benchmarks/run` on {machine()}.\n\n{table(figures)}"
    print(json.dumps(figures, indent=1, ensure_ascii=False) if args.json else text)
    if args.update_docs:
        for name in args.name or names():
            getattr(sys.modules[f"bench_{name}"], "update_docs", lambda folder: None)(HERE.parent / "docs")
    if args.update_readme:
        update(HERE.parent / "README.md", text)
    return 0 if all(figure.get("ok") is not False for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
