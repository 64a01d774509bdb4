"""Run the benchmarks and print one table; ``--json`` for programs, ``--update-readme`` for the README."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def measure(chosen: list[str]) -> list[dict[str, Any]]:
    """Run the chosen benchmarks, one after the other."""
    sys.path.insert(0, str(HERE))
    figures = []
    for name in chosen:
        print(f"benchmarks: {name} …", file=sys.stderr, flush=True)
        for figure in importlib.import_module(f"bench_{name}").measure():
            plain = figure if isinstance(figure, dict) else figure.to_dict()
            figures.append({"bench": name, **plain})
    return figures


def _shown(figure: dict[str, Any]) -> list[str]:
    value = f"{figure['value']:.3g}" if abs(figure["value"]) < 1000 else f"{figure['value']:,.0f}"
    verdict = {True: "yes", False: "**no**", None: ""}[figure.get("ok")]
    return [figure["name"], f"{value} {figure['unit']}".strip(), figure.get("target", ""), verdict, figure.get("note", "")]


def table(figures: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    head = ["figure", "measured", "target", "met", "how"]
    rows = [head, ["---"] * 5, *(_shown(figure) for figure in figures)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine() -> str:
    """The machine in one line."""
    return f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def update(readme: Path, text: str) -> None:
    """Put the table between the README's markers."""
    old = readme.read_text()
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"which ones: {', '.join(names())} (default: all)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--update-readme", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    unknown = set(args.name) - set(names())
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: want one of {', '.join(names())}")
    figures = measure(args.name or names())
    text = f"Measured with `benchmarks/run` on {machine()}.\n\n{table(figures)}"
    print(json.dumps(figures, indent=1) if args.json else text)
    if args.update_readme:
        update(HERE.parent / "README.md", text)
    return 0 if all(figure.get("ok") is not False for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
