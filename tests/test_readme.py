"""Commands, job files, keys and links in README.md and docs/ are run, parsed or looked up."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from promptdrop import config, config_file
from promptdrop.cli import parser
from promptdrop.errors import RequestError
from promptdrop.request import parse

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
OTHERS = [REPOSITORY / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
JOB_KINDS = ("txt", "yaml", "json", "jsonl", "csv")
SECTIONS = "|".join(name for name in config.Config.model_fields)


class Fence(NamedTuple):
    """A block of a page: ```KIND NAME, then its text."""

    page: str
    kind: str
    name: str
    text: str


def fences() -> Iterator[Fence]:
    """Every block of every page that says of what kind it is."""
    opened = re.compile(r"^ *```(\S+)(?: (\S+))?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for kind, name, text in opened.findall(page.read_text()):
            yield Fence(page.name, kind, name, text)


def commands(text: str) -> Iterator[str]:
    """The arguments of each `promptdrop` that a block of shell commands runs."""
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.search(r"(?:^ *|sudo .*bin/)promptdrop ([a-z].*)", line):
            yield found[1]


FENCES = list(fences())
JOBS = [fence for fence in FENCES if fence.kind in JOB_KINDS and not fence.name]
SETTINGS = [fence for fence in FENCES if fence.name == "config"]
COMMANDS = [
    arguments for fence in FENCES if fence.kind == "sh" for arguments in commands(fence.text)
]


@pytest.mark.parametrize("fence", JOBS, ids=lambda fence: f"{fence.page}-{fence.kind}")
def test_job_files_are_accepted(fence: Fence) -> None:
    """Every job file shown parses."""
    settings = config.parse({"model": {"id": "x"}})

    assert parse.parse(fence.text.encode(), f".{fence.kind}", settings).images


@pytest.mark.parametrize("fence", SETTINGS, ids=lambda fence: fence.page)
def test_configurations_are_accepted(tmp_path: Path, fence: Fence) -> None:
    """Every piece of a config.yaml shown is one."""
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{id: x}}\n{fence.text}")

    assert config_file.load(file)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_commands_exist(arguments: str) -> None:
    """Every command shown is one the program takes."""
    words = shlex.split(arguments, comments=True)

    assert parser.build().parse_args(words).command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path) -> None:
    """Every `section.key` of config.yaml that a page speaks of is there."""
    wanted = re.findall(rf"`({SECTIONS})\.(?!yaml|json)([a-z_]+)\b", page.read_text())
    fields = config.Config.model_fields
    unknown = {
        f"{section}.{key}" for section, key in wanted
        if key not in fields[section].annotation.model_fields  # type: ignore[union-attr]
    }  # fmt: skip

    assert unknown <= {"model.compiled"}  # of a sidecar


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to another page, or to a heading of it, has its target."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        other = page.parent / target if target else page

        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            slugs = [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            ]

            assert anchor in slugs


def test_the_tests_that_are_named_exist() -> None:
    """docs/reliability.md names tests; NAME_... stands for all whose names begin with NAME."""
    texts = [file.read_text() for file in (REPOSITORY / "tests").rglob("test_*.py")]
    there = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = re.findall(r"`(test_\w+)(\.\.\.)?", (REPOSITORY / "docs/reliability.md").read_text())
    missing = {
        name for name, more in named
        if name not in there and not (more and any(one.startswith(name) for one in there))
    }  # fmt: skip

    assert missing == set()


def test_the_readme_is_short() -> None:
    """The README has a limited length; longer explanations are in docs/."""
    assert len(README.read_text().splitlines()) <= 220


def test_every_field_is_in_the_table() -> None:
    """README has each field of the job files' schema."""
    program = [sys.executable, "-m", "promptdrop", "schema", "request"]
    schema = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^\| (`.*?) \|", README.read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}

    assert set(json.loads(schema)["properties"]) - {"prompts", "images"} <= listed


def test_the_refusal_is_the_real_one() -> None:
    """The message shown is the one users get."""
    settings = config.parse({"model": {"id": "x"}})
    with pytest.raises(RequestError) as raised:
        parse.parse(b"prompt: a\nheight: 64\nwidth: 100\n", ".yaml", settings)
    problem = raised.value.problems[0]

    assert f"dog.yaml:{problem.line}: {problem.message}" in README.read_text()
