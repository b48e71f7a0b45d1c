"""Which file names are jobs, and which folder names are made of them."""

import pytest

from promptdrop import names


@pytest.mark.parametrize(
    "name",
    ["a.txt", "A.TXT", "b.prompt", "c.yaml", "d.yml", "e.json", "f.jsonl", "g.csv", "ä b.Txt"],
)
def test_job_names(name: str) -> None:
    """A name with one of the endings, in any case, is a job."""
    assert names.is_job_name(name)


@pytest.mark.parametrize(
    "name",
    [
        ".a.txt", "~$a.txt", "a.txt~", "a.txt.tmp", "a.txt.part", "a.txt.filepart", "a.txt.bak",
        "a.txt.crdownload", "a.txt.swp", "a.txt.done", "a.txt.lock", "Thumbs.db", "desktop.ini",
        "a", "a.png", "a.txt.aria2", "a.md", "",
    ],
)  # fmt: skip
def test_names_that_are_no_jobs(name: str) -> None:
    """Hidden files, temporaries of other programs, and everything else stay where they are."""
    assert not names.is_job_name(name)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("cat", "cat"),
        ("a cat & dog", "a_cat___dog"),
        ("..hidden", "hidden"),
        ("-rf", "rf"),
        ("dots...", "dots"),
        ("e\u0301te\u0301", "été"),
        ("日本語", "日本語"),
        ("", "job"),
        ("...", "job"),
        ("CON", "CON_"),
        ("nul.tar", "nul_.tar"),
        ("COM1", "COM1_"),
        ("console", "console"),
        ("a/b\\c:d", "a_b_c_d"),
        ("x" * 200, "x" * 80),
        ("é" * 79, "é" * 40),
    ],
)
def test_safe_names(stem: str, expected: str) -> None:
    """A safe name is legal on Linux, Windows and macOS, in NFC and has at most 80 bytes."""
    assert names.safe(stem) == expected
    assert names.safe(expected) == expected


def test_numbered_names_fit() -> None:
    """The stem is cut, so that name and suffix fit into what a file system takes."""
    name = names.numbered("x" * 250, ".txt", 12)

    assert name == "x" * 248 + "~12.txt"
    assert names.numbered("cat", ".txt", 1) == "cat.txt"


def test_printable_names_have_no_controls() -> None:
    r"""Undecodable bytes are \xNN, control characters escaped: nothing raw reaches a terminal."""
    assert names.printable("a\udcff\n\x1b[31m\u202e.txt") == r"a\xff\n\x1b[31m\u202e.txt"
