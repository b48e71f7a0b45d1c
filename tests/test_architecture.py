"""The structure: which folder may import from which, no circles, no class or function too large."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from harness import REPOSITORY

PACKAGE = REPOSITORY / "daemon" / "promptdrop"

# From which folders each folder may import. What lies flat beside them imports from no folder.
MAY_IMPORT = {
    "request": set(),
    "spool": set(),
    "pool": set(),
    "engines": {"request", "pool"},
    "cluster": {"pool", "engines"},
    "intake": {"request", "spool"},
    "outbox": {"request", "spool"},
    "supervisor": {"request", "spool", "pool", "engines", "cluster", "intake", "outbox"},
    "cli": {"request", "spool", "pool", "engines", "cluster", "intake", "outbox", "supervisor"},
}
# The two front doors of the package: what `import promptdrop` and `python -m promptdrop` open.
DOORS = {"__init__", "__main__"}

SOURCES = ("daemon", "bench", "demo_model", "examples", "tests")
LONGEST_CLASS, LONGEST_MODULE, LONGEST_FUNCTION, MOST_POSITIONAL = (
    300,
    400,
    50,
    6,
)  # lines; arguments
# Calls whose arguments are one list: the words of a command line, the values of a format.
LISTS = {"run", "_ip", "struct.pack", "Image.frombuffer"}
EXCUSE = "# Long on purpose: "  # the sentence that a module over a limit has, with the reason


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below it, parsed."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()


def imported(module: str) -> set[str]:
    """Which modules of ours a module imports, at its top or anywhere inside."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "promptdrop":
            base = (node.module or "").removeprefix("promptdrop").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else base or "__init__")
    return found


def folder(module: str) -> str:
    """The folder a module lies in; the empty string for one that lies flat."""
    return module.rpartition(".")[0]


def python_files() -> Iterator[Path]:
    """Every Python file of the project, but not those of a virtual environment."""
    for source in SOURCES:
        yield from sorted((REPOSITORY / source).rglob("*.py"))


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Count the lines from the first to the last, without decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: it has one body and as many arguments as the kernel has."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def too_large(path: Path) -> Iterator[str]:
    """Say in words what in a file is over a limit."""
    text = path.read_text()
    if (length := text.count("\n")) > LONGEST_MODULE:
        yield f"{length} lines"
    tree = ast.parse(text)
    kernels = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_kernel(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and lines(node) > LONGEST_CLASS:
            yield f"class {node.name}: {lines(node)} lines"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if lines(node) > LONGEST_FUNCTION and node.name not in kernels:
                yield f"function {node.name}: {lines(node)} lines"
        elif isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            called = ast.unparse(node.func).partition("[")[0]
            if called not in kernels | LISTS and called.rpartition(".")[2] not in LISTS:
                yield f"line {node.lineno}: {called} with {len(node.args)} positional arguments"


def test_every_folder_has_its_rule() -> None:
    """A new folder is placed on purpose, and says in its `__init__` what lives there."""
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}

    assert folders == set(MAY_IMPORT)
    for name in folders:
        tree = MODULES[f"{name}.__init__"]
        sentences = re.findall(r"[.](?=\s|$)", ast.get_docstring(tree) or "")
        assert len(sentences) >= 2, (
            f"{name}/__init__.py: two sentences, what lives here and what not"
        )
        assert len(tree.body) == 1, f"{name}/__init__.py defines nothing"


@pytest.mark.parametrize("module", sorted(set(MODULES) - DOORS))
def test_a_folder_imports_only_from_those_it_may(module: str) -> None:
    """MAY_IMPORT holds for each module; a module that lies flat imports only from others that do."""
    own = folder(module)
    allowed = MAY_IMPORT.get(own, set()) | {own, ""}

    assert {name for name in imported(module) if folder(name) not in allowed} == set()


def test_there_is_no_circle() -> None:
    """No module imports itself, not even through others."""
    order = TopologicalSorter({module: imported(module) for module in MODULES}).static_order()

    assert set(MODULES) <= set(order)


@pytest.mark.parametrize("path", [str(p.relative_to(REPOSITORY)) for p in python_files()])
def test_no_module_is_too_large(path: str) -> None:
    """No class has over 300 lines, no module over 400, no function over 50, no call more than 6 positional
    arguments; except Triton's kernels, and where a sentence in the module says why."""
    has_excuse = EXCUSE in (REPOSITORY / path).read_text()

    assert has_excuse or list(too_large(REPOSITORY / path)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import promptdrop",
        "import promptdrop.cli.main, promptdrop.supervisor.supervisor, promptdrop.cli.checks",
        "import promptdrop.cli.private_daemon, promptdrop.cli.targets, promptdrop.cli.find",
        "import promptdrop.intake.reading, promptdrop.weights",
        "import promptdrop.engines.worker, promptdrop.engines.gradient",
    ],
)
def test_the_parent_never_imports_torch(statement: str) -> None:
    """Importing the daemon and its commands pulls in no torch, diffusers, transformers or modelscope."""
    heavy = "{'torch', 'diffusers', 'transformers', 'modelscope', 'numpy'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert printed == "[]\n"


def test_the_shipped_configurations_are_one() -> None:
    """config.yaml at the top is what `promptdrop init` writes."""
    top = (REPOSITORY / "config.yaml").read_text()

    assert top == (PACKAGE / "config.yaml").read_text()
