"""The README's examples are run, not believed."""

import re
import shlex
from pathlib import Path

import pytest

from promptdrop import config
from promptdrop.cli import parser
from promptdrop.errors import RequestError
from promptdrop.request import parse

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
FENCES = re.findall(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
JOBS = [(kind, text) for kind, _, text in FENCES if kind in ("txt", "yaml", "json", "jsonl", "csv")]
COMMANDS = [
    line for kind, _, text in FENCES if kind == "sh" for line in text.splitlines()
    if line.startswith("promptdrop ")
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), JOBS)
def test_job_files_are_accepted(kind: str, text: str) -> None:
    """Every job file shown parses."""
    settings = config.parse({"model": {"id": "x"}})

    assert parse.parse(text.encode(), f".{kind}", settings).images


def test_the_refusal_is_the_real_one() -> None:
    """The message shown is the one users get."""
    settings = config.parse({"model": {"id": "x"}})
    with pytest.raises(RequestError) as raised:
        parse.parse(b"prompt: a\nheight: 64\nwidth: 100\n", ".yaml", settings)
    problem = raised.value.problems[0]

    assert f"dog.yaml:{problem.line}: {problem.message}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    """Every command shown is one the program takes."""
    arguments = shlex.split(command, comments=True)[1:]

    assert parser.build().parse_args(arguments).command
