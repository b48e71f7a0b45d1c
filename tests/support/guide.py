"""The commands that README.md and docs/ show, for tests to run as they are printed."""

import re

from harness import REPOSITORY

FETCHING = re.compile(r"git pull|python3 -m venv|pip install|model fetch")  # these need a network

# The first line of a script that removes things: it fails anywhere but on a machine of machine.py.
ONLY_THERE = "tr '\\0' '\\n' < /proc/1/environ | grep -qx container=promptdrop-test\n"


def block(page: str, name: str) -> str:
    """The text between "```sh NAME" and its end on a page of the repository."""
    text = (REPOSITORY / page).read_text()
    found = re.search(rf"^```sh {name}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no block {name!r}"
    return found[1]


def offline(commands: str) -> str:
    """Leave out the commands that fetch something, which is there already."""
    lines = commands.replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if not FETCHING.search(line))
