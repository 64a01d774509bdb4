"""The walls of the house: what may import what, how big things get, what must be documented."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wnodes_core import hookspecs
from wnodes_core.cli import hookreference

HERE = Path(__file__).resolve().parent.parent
CORE = HERE / "wnodes_core"
HOUSE = sorted(CORE.rglob("*.py")) + sorted(p for p in (HERE / "adapters").rglob("*.py") if "/build/" not in str(p))
ADAPTERS = [p for p in HOUSE if p.is_relative_to(HERE / "adapters") and "/tests/" not in str(p)]
TEXTS = [
    p
    for p in HERE.rglob("*")
    if p.is_file() and p.suffix in (".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".c", ".service", "")
    and not any(part in (".git", ".venv", "build", ".wnodes-work", "__pycache__", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache")
                or part.endswith(".egg-info") for part in p.relative_to(HERE).parts)
]  # fmt: skip

# Lower may not import higher. A module not named here stands above them all.
LAYERS = (
    {"errors", "phases", "markers"},
    {"exports", "request", "ports", "trace", "volumes"},
    {"model"},
    {"hookspecs"},
    {"command", "files", "processes"},
    {"journal", "plugins", "settings", "plan"},
    {"api", "tools"},
    {"lifecycle"},
    {"dispatch"},
    {"hookmain"},
)
SUBPROCESS_DOORS = {"command.py", "guest_agent.py", "guest_bootstrap"}
MAX_MODULE, MAX_FUNCTION, MAX_NESTING = 300, 40, 3


def name_of(path: Path) -> str:
    return str(path.relative_to(HERE))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, also those inside functions; not those for typing only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def importers(module: str) -> set[str]:
    return {
        name_of(path)
        for path in HOUSE
        if "/tests/" not in str(path) and any(n == module or n.startswith(module + ".") for _, n in imports(path))
    }


def layer(module: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if module in names), len(LAYERS))


def test_imports_flow_one_way() -> None:
    wrong = []
    for path in CORE.rglob("*.py"):
        mine = path.relative_to(CORE).parts[0].removesuffix(".py")
        for line, name in imports(path):
            words = name.split(".")
            if words[0] != "wnodes_core" or len(words) < 2 or layer(mine) == len(LAYERS):
                continue
            if (CORE / words[1]).exists() or (CORE / f"{words[1]}.py").exists():
                theirs = layer(words[1])
                # What stands in no layer (the guest channel, a keeper) is for the top two only.
                if theirs > layer(mine) and not (mine in ("lifecycle", "dispatch", "hookmain") and theirs == len(LAYERS)):
                    wrong.append(f"{name_of(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_libvirt_is_imported_in_one_file() -> None:
    assert len(importers("libvirt")) <= 1, importers("libvirt")


def test_subprocess_is_imported_behind_one_door() -> None:
    found = {Path(name).name for name in importers("subprocess")}
    assert found <= SUBPROCESS_DOORS, found - SUBPROCESS_DOORS


def test_adapters_see_only_the_api() -> None:
    wrong = []
    for path in ADAPTERS:
        for line, name in imports(path):
            ours = name.split(".")[0] == "wnodes_core"
            # lab.py and install.py are programs of the adapter, not part of the plug-in.
            if ours and path.name in ("plugin.py", "native.py") and not name.startswith("wnodes_core.api") and name != "wnodes_core":
                wrong.append(f"{name_of(path)}:{line} imports {name}")
            if "backends" in name.split(".") or (name.startswith("wnodes_") and not ours and name.split(".")[0] not in path.parts):
                wrong.append(f"{name_of(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_providers_see_only_api_and_tools() -> None:
    allowed = ("wnodes_core.api", "wnodes_core.tools", "wnodes_core.errors")
    wrong = []
    for folder in ("storage", "images", "network", "backends"):
        for path in (CORE / folder).rglob("*.py"):
            own = ("wnodes_core." + folder, "wnodes_core.model", "wnodes_core.markers")
            wrong += [
                f"{name_of(path)}:{line} imports {name}"
                for line, name in imports(path)
                if name.startswith("wnodes_core.") and not name.startswith(allowed + own) and folder in ("storage", "network")
            ]
            wrong += [
                f"{name_of(path)}:{line} imports {name}"
                for line, name in imports(path)
                if folder != "backends" and name.startswith("wnodes_core.backends")
            ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= MAX_MODULE, f"{lines} lines: want {MAX_MODULE} or fewer"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, long


def depth(node: ast.AST, level: int = 0) -> int:
    """Deepest nesting of branches, loops and nets; ``elif`` and ``with`` count no more."""
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match)
    deepest = level
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        scope = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef)
        deepest = max(deepest, depth(child, 0 if scope else level + (isinstance(child, blocks) and not is_elif)))
    return deepest


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_nesting(path: Path) -> None:
    deep = [
        f"{node.name}: {depth(node)} levels"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and depth(node) > MAX_NESTING
    ]
    assert not deep, deep


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_exceptions_are_caught_by_name(path: Path) -> None:
    source = path.read_text().splitlines()
    wrong = []
    for node in ast.walk(ast.parse("\n".join(source))):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else set()
        broad = not node.type or names & {"Exception", "BaseException"}
        # A handler whose last statement is a bare raise only tidies up.
        passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        if not node.type or (broad and not passes_on and "BLE001 - " not in source[node.lineno - 1] and not guest_program(path)):
            wrong.append(f"{name_of(path)}:{node.lineno} {source[node.lineno - 1].strip()}")
    assert not wrong, "\n".join(wrong)


def guest_program(path: Path) -> bool:
    return path.name.startswith("guest_")


def test_no_shell() -> None:
    bad = re.compile(r"shell\s*=\s*True|\bos\.system\(|\bos\.popen\(|\bsubprocess\.getoutput\(")
    wrong = [
        f"{name_of(path)}:{n}"
        for path in HOUSE
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if bad.search(line)
    ]
    assert not wrong, wrong


def specs() -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(function)
        for module in hookspecs.ALL
        for name, function in vars(module).items()
        if name.startswith("wnodes_") and inspect.isfunction(function)
    }


def test_every_hook_is_documented_with_its_arguments() -> None:
    headings = set(re.findall(r"(?m)^### `(.+)`$", (HERE / "docs/hooks.md").read_text()))
    wanted = {f"{name}({', '.join(signature.parameters)})" for name, signature in specs().items()}
    assert headings == wanted


def test_the_hook_reference_says_what_the_specs_say() -> None:
    text = (HERE / "docs/hooks.md").read_text()
    assert hookreference.page(text) == text, "run python -m wnodes_core.cli.reference docs"


@pytest.mark.parametrize("name", sorted(specs()))
def test_every_hook_is_used_in_a_test(name: str) -> None:
    tests = [*(HERE / "tests").rglob("*.py"), *(HERE / "adapters").glob("*/tests/**/*.py"), *(CORE / "testing").rglob("*.py")]
    mentions = [p for p in tests if p != Path(__file__) and name in p.read_text()]
    assert mentions, f"no test mentions {name}"


def test_samples_of_the_hook_reference_run() -> None:
    text = (HERE / "docs/hooks.md").read_text()
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    assert len(blocks) == len(specs()) + 1, "one sample a hook, after the common beginning"
    scope: dict[str, object] = {"__name__": "sample"}
    for block in blocks:
        exec(compile(block, "docs/hooks.md", "exec"), scope)
    assert set(specs()) <= set(scope)


@pytest.mark.parametrize("path", sorted(p for p in (HERE / "hooks").rglob("*") if p.is_file() and not p.suffix), ids=name_of)
def test_hook_scripts_have_five_lines(path: Path) -> None:
    code = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if code and code[0].startswith('"""'):
        end = next(i for i, line in enumerate(code) if line.endswith('"""') and (i or len(line) > 3))
        code = code[end + 1 :]
    assert len(code) <= 5, "\n".join(code)


def test_the_tree_names_no_machine_and_no_secret() -> None:
    private = re.compile(r"/work/(?:main|brief|shared|\.library)|/tmp/exp|/tmp/guest\.lock|://[^/\s:@\"'{}<>$]+:[^/\s@\"'{}<>$]+@")
    wrong = [
        f"{name_of(path)}:{n}: {line.strip()[:80]}"
        for path in TEXTS
        if path != Path(__file__) and path.stat().st_size < 1 << 20
        for n, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_of_the_readme_exist() -> None:
    commands = set(re.findall(r"(?m)^\s*(?:sudo )?((?:scripts|benchmarks)/[\w./-]+)", (HERE / "README.md").read_text()))
    assert {"scripts/demo", "scripts/test"} <= commands
    missing = [command for command in commands if not (HERE / command).exists()]
    assert not missing
