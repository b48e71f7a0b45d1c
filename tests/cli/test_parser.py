"""The command line: every command's help, its example, its options."""

import argparse
import shlex
import subprocess
import sys

import pytest

from promptdrop.cli import options, parser
from promptdrop.cli.parser import COMMANDS, Command
from promptdrop.fields import OPTIONS

LEAVES: dict[str, Command] = {}  # every command and action by the words that call it
for entry in COMMANDS:
    if isinstance(entry, Command):
        LEAVES[entry.name] = entry
    else:
        LEAVES |= {f"{entry.name} {action.name}": action for action in entry.actions}


def parse(line: str) -> argparse.Namespace:
    """Parse a command line without its first word, `promptdrop`."""
    return parser.build().parse_args(shlex.split(line))


def test_every_command_is_there() -> None:
    """The contract's commands, in the order of --help."""
    assert list(LEAVES) == [
        "init", "run", "generate", "submit", "check", "status", "retry", "cancel", "pause",
        "resume", "doctor", "cluster status", "cluster release", "model demo", "model fetch",
        "model path", "schema", "bench",
    ]  # fmt: skip


@pytest.mark.parametrize("words", LEAVES)
def test_help_is_complete(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help exits 0 and shows usage, every argument and an example."""
    with pytest.raises(SystemExit) as ended:
        parse(f"{words} --help")
    said = capsys.readouterr().out
    lone = argparse.ArgumentParser()
    LEAVES[words].declare(lone)

    assert ended.value.code == 0
    assert said.startswith(f"usage: promptdrop {words} [-h]")
    for action in lone._actions:
        for spelling in action.option_strings or [action.metavar or ",".join(action.choices or ())]:
            assert str(spelling) in said
    assert f"\nexample:\n  promptdrop {words}" in said


@pytest.mark.parametrize("words", LEAVES)
def test_every_example_works(words: str) -> None:
    """Each line of an example is a command line that calls the command it explains."""
    for line in LEAVES[words].example.splitlines():
        program, rest = line.split(maxsplit=1)

        assert program == "promptdrop"
        assert parse(rest).command is LEAVES[words].run


@pytest.mark.parametrize("words", LEAVES)
def test_unknown_options_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 2, and stderr names the option."""
    example = LEAVES[words].example.splitlines()[0].removeprefix("promptdrop ")
    with pytest.raises(SystemExit) as ended:
        parse(f"{example} --nosuch")

    assert ended.value.code == 2
    assert "unrecognized arguments: --nosuch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["", "nosuch", "cluster", "model", "submit --wai a.txt", "status --js", "--vers"]
)
def test_what_is_no_command_is_refused(line: str) -> None:
    """No command, an unknown one and an abbreviated option end with status 2."""
    with pytest.raises(SystemExit) as ended:
        parse(line)

    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["generate a", "submit --prompt a"])
@pytest.mark.parametrize("name", OPTIONS)
def test_both_spellings_of_a_field(command: str, name: str) -> None:
    """An option is spelled with hyphens, or like the job file's field."""
    values = [
        options.fields(parse(f"{command} --{spelling} 1"))
        for spelling in (name, name.replace("_", "-"))
    ]

    assert values[0] == values[1] == {name: OPTIONS[name].kind("1")}


def test_help_imports_nothing_heavy() -> None:
    """Parsing a command line imports neither pydantic nor YAML, rich, structlog or torch."""
    code = (
        "import sys; from promptdrop.cli import main, parser; parser.build().format_help();"
        "print(sorted({'pydantic', 'yaml', 'rich', 'structlog', 'torch'} & set(sys.modules)))"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
