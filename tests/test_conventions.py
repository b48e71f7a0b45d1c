"""The two conventions of work that leaves the loop: who runs where, and how its result comes back."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import REPOSITORY

PACKAGE = REPOSITORY / "daemon" / "promptdrop"
FOLDERS = ["supervisor", "intake"]
MODULES = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).glob("*.py"))]
ROOMS = {"scanner", "reader", "clerk", "publisher", "herald"}

Functions = dict[str, ast.FunctionDef]
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.stem}")


@dataclass(frozen=True)
class Off:
    """One call of `.off(ROOM, work, then)`; a function that is not defined in this folder is None."""

    where: str
    room: str
    work: ast.FunctionDef | None
    then: ast.FunctionDef | None


def functions_in(body: list[ast.stmt]) -> Functions:
    """The functions of a module or of a class, by name."""
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def all_functions(path: Path) -> list[ast.FunctionDef]:
    """Every function and method of a module."""
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def assigned(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """The values that a function assigns to local names, one on a line."""
    return {
        target.id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def find(
    passed: ast.expr, local: dict[str, ast.expr], methods: Functions, top: Functions
) -> ast.FunctionDef | None:
    """The function that is passed: by its name, in a `partial`, or by a local name of either."""
    if isinstance(passed, ast.Name) and passed.id in local:
        return find(local[passed.id], local, methods, top)
    if isinstance(passed, ast.Call) and ast.unparse(passed.func).endswith("partial"):
        return find(passed.args[0], local, methods, top)
    name = ast.unparse(passed)
    return methods.get(name.removeprefix("self.")) if name.startswith("self.") else top.get(name)


def functions_beside(path: Path) -> Functions:
    """The functions of the other modules of a folder, as MODULE.NAME."""
    return {
        f"{other.stem}.{name}": function
        for other in path.parent.glob("*.py")
        for name, function in functions_in(ast.parse(other.read_text()).body).items()
    }


def offs(path: Path) -> Iterator[Off]:
    """Every call in a module that sends work to a room."""
    tree = ast.parse(path.read_text())
    top = functions_in(tree.body) | functions_beside(path)
    classes = [functions_in(node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
    for methods in (top, *classes):
        for function in methods.values():
            local = assigned(function)
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".off"):
                    room, work, then = call.args
                    yield Off(
                        f"{path.name}:{call.lineno}",
                        str(ast.literal_eval(room)),
                        find(work, local, methods, top),
                        find(then, local, methods, top),
                    )


def threads(function: ast.FunctionDef) -> list[str]:
    """The rooms in the last line of a docstring, `Thread: clerk, publisher.`; none means the loop."""
    last = (ast.get_docstring(function) or "").rpartition("\n")[2]
    return last.removeprefix("Thread: ").removesuffix(".").split(", ") * last.startswith("Thread: ")


@pytest.mark.parametrize("folder", FOLDERS)
def test_work_leaves_the_loop(folder: str) -> None:
    """Some calls are found in each folder; otherwise the tests below would check nothing."""
    assert any(off for path in (PACKAGE / folder).glob("*.py") for off in offs(path))


@each_module
def test_who_runs_in_a_room_says_so(path: Path) -> None:
    """Work that is sent to a room is a function of this folder; its docstring ends in `Thread: ROOM.`."""
    for off in offs(path):
        assert off.work is not None, f"{off.where}: the work is not defined in this folder"
        assert {off.room, "any"} & set(threads(off.work)), f"{off.where}: {off.work.name}"


@each_module
def test_what_comes_back_is_done(path: Path) -> None:
    """When `_thing` has run in a room, `_thing_done` runs on the loop."""
    for off in offs(path):
        assert off.work is not None
        assert off.then is not None, f"{off.where}: `then` is not defined in this module"
        assert off.then.name.lstrip("_") == f"{off.work.name.lstrip('_')}_done", off.where
        assert threads(off.then) == [], off.where


@each_module
def test_a_thread_is_a_room_of_the_loop(path: Path) -> None:
    """A docstring names rooms that there are, or says `any`."""
    for function in all_functions(path):
        assert set(threads(function)) <= ROOMS | {"any"}, function.name
