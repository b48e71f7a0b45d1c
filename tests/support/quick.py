"""Choose the test files that `make quick` runs, and keep them from using a daemon or torch.

A file is quick unless it lies in tests/daemon/ or tests/hosts/, or in a folder whose conftest.py imports
torch, or names, also inside a function, a module that imports torch or a fixture of a daemon or of the
model. No test has to be marked.
"""

import ast
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
ROOTS = (REPOSITORY / "daemon", REPOSITORY, REPOSITORY / "tests" / "support")
SLOW_FOLDERS = {REPOSITORY / "tests" / "daemon", REPOSITORY / "tests" / "hosts"}
SLOW_FIXTURES = {"daemon", "make_daemon", "model"}
HEAVY = {"torch", "diffusers", "transformers", "triton"}


def may_be_quick(folder: Path) -> bool:
    """Whether a folder may have quick tests: its conftest.py is imported before any of them."""
    conftest = folder / "conftest.py"
    if folder in SLOW_FOLDERS or not conftest.exists():
        return folder not in SLOW_FOLDERS
    return not any(map(imports_torch, imported(ast.parse(conftest.read_text()), deep=False)))


def is_quick(path: Path) -> bool:
    """Whether a test file of such a folder belongs to `make quick`."""
    tree = ast.parse(path.read_text())
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return arguments.isdisjoint(SLOW_FIXTURES) and not any(
        map(imports_torch, imported(tree, deep=True))
    )


@cache
def imports_torch(module: str) -> bool:
    """Whether importing a module, one of ours or another's, imports torch."""
    if module.split(".")[0] in HEAVY:
        return True
    for root in ROOTS:
        for path in (
            root / f"{module.replace('.', '/')}.py",
            root / module.replace(".", "/") / "__init__.py",
        ):
            if path.is_file():
                return any(map(imports_torch, imported(ast.parse(path.read_text()), deep=False)))
    return False


def imported(tree: ast.Module, deep: bool) -> Iterator[str]:
    """The modules that a module imports; deep: also those imported inside functions."""
    for node in ast.walk(tree) if deep else _at_import(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
            yield ast.literal_eval(node.args[0])


def _at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for inner in ("body", "orelse", "handlers", "finalbody"):
            yield from _at_import(getattr(node, inner, []))


def forbid_what_is_slow() -> None:
    """Make an import of torch and the start of a daemon errors in this process from now on."""
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "import" and arguments[0] in HEAVY:
        raise AssertionError(f"a quick test imports {arguments[0]}")
    if event == "subprocess.Popen":
        words = [os.fsdecode(word) for word in arguments[1]]
        if "promptdrop" in words and "run" in words:
            raise AssertionError("a quick test starts a daemon")
