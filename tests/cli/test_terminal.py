"""What is printed is escaped in one place, and nothing of cli/ prints elsewhere."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY
from hostile import HOSTILE, harm
from promptdrop.cli import cluster, terminal
from promptdrop.cli.main import main
from promptdrop.cluster.view import Node

CLI = REPOSITORY / "daemon/promptdrop/cli"
OTHERS = [path for path in sorted(CLI.glob("*.py")) if path.stem != "terminal"]
PRINTERS = {"print", "Console", "Live", "ArgumentParser", "print_exc", "warn"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}


def printing(tree: ast.Module) -> list[str]:
    """What in a module prints by itself: print, sys.stdout, os.write, a console of rich, another parser."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] in PRINTERS or called == "os.write":
                found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in STREAMS:
            found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "rich",
            "sys",
        ):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_only_the_terminal_prints(path: Path) -> None:
    """No other module of cli/ writes to stdout or stderr; a type of rich is all that one may name."""
    tree = ast.parse(path.read_text())
    allowed = {"rich.progress.Progress"} if path.stem == "progress" else set()

    assert set(printing(tree)) <= allowed


@pytest.mark.parametrize("source", [
    "print('a')", "sys.stdout.write('a')", "os.write(1, b'a')", "Console().print('a')",
    "from sys import stderr", "rich.print('a')", "argparse.ArgumentParser()",
])  # fmt: skip
def test_what_prints_is_found(source: str) -> None:
    """The rule above sees each way to print."""
    assert printing(ast.parse(source))


def test_a_text_that_was_escaped_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A backslash is not escaped, so that nobody sees a name escaped twice."""
    terminal.say("a\x1b.txt", "a\\x1b.txt")

    assert capsys.readouterr().out == "a\\x1b.txt\ta\\x1b.txt\n"


def test_cells_and_lines_stay_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """A tab or line break within a cell makes neither a new cell nor a new line."""
    terminal.table(("a", "b"), [("1\t2", "3\n4")])
    terminal.complain("one\ntwo", "three")
    said = capsys.readouterr()

    assert said.out == "a\tb\n1\\t2\t3\\n4\n"
    assert said.err == "one\\ntwo\nthree\n"


@pytest.mark.parametrize("indent", [None, 1])
def test_json_means_the_same(capsys: pytest.CaptureFixture[str], indent: int | None) -> None:
    """JSON is read back as it was, with what a terminal would obey as \\uXXXX, the rest as it is."""
    document = {"käse 长": [HOSTILE, "\x7f\ud800\U000e0041\u200f\\"], "b": 1.5}
    terminal.say_json(document, indent)
    said = capsys.readouterr().out

    assert json.loads(said) == document
    assert harm(said.encode()) == ""
    assert "käse 长" in said
    assert said.count("\n") == (1 if indent is None else 7)


def test_a_stream_that_knows_few_characters(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """What an encoding lacks is escaped, and is no error; JSON stays JSON."""
    with open(1, "w", encoding="latin-1", closefd=False) as latin:
        monkeypatch.setattr("sys.stdout", latin)
        terminal.say("café 长")
        terminal.say_json(["café 长"], None)

    assert capfdbinary.readouterr().out == b'caf\xe9 \\u957f\n["caf\\u00e9 \\u957f"]\n'


def test_hosts_and_engines_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    """`cluster status` shows what machines call themselves, escaped."""
    cluster._print_hosts([Node(name=HOSTILE, address=HOSTILE, alive=True, gpus=1, cores=2)])
    said = capsys.readouterr().out

    assert "x1b" in said
    assert harm(said.encode()) == ""


def test_a_bug_is_shown_escaped() -> None:
    """The traceback of an error that nobody expected quotes names and values escaped, too."""
    command = "from promptdrop.cli import main; main.main(['schema', 'job'])"
    code = f"import sys; {command}; raise RuntimeError(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, HOSTILE], capture_output=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(b"Traceback")
    assert b"\\x1b]0;owned" in done.stderr
    assert harm(done.stderr.replace(b"\nFAKED", b"")) == ""


def test_an_error_of_several_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of an error is one, whatever is quoted in it."""
    file = tmp_path / "config.yaml"
    file.write_text('model: {id: gradient, "a\\nFAKED": 1}\n"b\\nFAKED": 2\n')
    status = main(["status", "--config", str(file)])
    lines = capsys.readouterr().err.splitlines()

    assert status == 78
    assert len(lines) == 2
    assert all(str(file) in line for line in lines)
