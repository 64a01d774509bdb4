"""The agent as one text to send: the guest's modules without annotations, in one source.

The guest may run Python 3.6, where our annotations are no syntax or cost imports of their own;
without them the code is in 3.6's grammar, which a test holds.
"""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from importlib import resources

MODULES = (
    "frames",
    "stage",
    "pump",
    "poller",
    "guest_json",
    "guest_mounts",
    "guest_spawn",
    "guest_exec",
    "guest_ending",
    "guest_users",
    "guest_door",
    "guest_agent",
)
RESTING = ("guest_identity", "guest_rest")  # sent with the request for rest: no other guest pays for them
NETWORK = ("guest_network",)  # sent with the request for a network
_PACKAGE = "wnodes_core.guest"
_LEFT_OUT = ("__future__", "typing")


class _Plain(ast.NodeTransformer):
    """Takes out annotations, docstrings and imports that only annotations need."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        arguments = node.args
        for argument in [*arguments.args, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]:
            argument.annotation = None
        return _without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        return _without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module in _LEFT_OUT else node


def _without_docstring(node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
    if ast.get_docstring(node, clean=False) is not None:
        node.body[:1] = [ast.Pass()]
    return node


def plain(source: str) -> str:
    """A module's source in the grammar of Python 3.6."""
    return ast.unparse(ast.fix_missing_locations(_Plain().visit(ast.parse(source))))


def read(name: str) -> str:
    """One of our own files as text."""
    return resources.files(_PACKAGE).joinpath(name).read_text("utf-8")


def rest_modules() -> list[tuple[str, str]]:
    """Name and text of what an agent needs to come to rest and to wake."""
    return _modules(RESTING)


@lru_cache(maxsize=1)
def network_modules() -> list[tuple[str, str]]:
    """Name and text of what an agent needs to set up a NIC."""
    return _modules(NETWORK)


def _modules(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(f"{_PACKAGE}.{name}", plain(read(name + ".py"))) for name in names]


@lru_cache(maxsize=1)
def agent_digest() -> str:
    """What an agent in a saved guest depends on, as hex of sha256; a clone's host must have the same.

    Over the files as they are: to make the source of them takes 40 ms, this one.
    """
    names = [*(f"{name}.py" for name in (*MODULES, *RESTING, *NETWORK)), "bundle.py", "start.py", "guest_bootstrap"]
    return hashlib.sha256("\0".join(f"{name}\0{read(name)}" for name in names).encode()).hexdigest()


@lru_cache(maxsize=1)
def agent_source() -> bytes:
    """What the bootstrap receives and runs: it ends when the host has gone."""
    modules = _modules(MODULES)
    return f"""\
import sys, types
for name in ("wnodes_core", "{_PACKAGE}"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, text in {modules!r}:
    module = sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules["{_PACKAGE}"], name.rpartition(".")[2], module)
    exec(compile(text, name, "exec"), module.__dict__)
LOST_S = sys.modules["{_PACKAGE}.guest_agent"].serve(PORT_FD, NONCE, globals().get("ROOT", ""))
""".encode()
