"""`generate` before anything is rendered: wrong usage, and where images will go."""

import os
import stat
from pathlib import Path

import pytest
import yaml

from promptdrop.cli.main import main
from promptdrop.cli.targets import Targets
from promptdrop.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder we are in, with a configuration; no daemon runs."""
    config = {"root": "spool", "model": {"id": "gradient"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cat", "--width", "100"], "width=100 is not a multiple of 16"),
        (["cat", "--timeout-seconds", "601"], "at most 600 (limits.timeout_seconds)"),
        (["cat", "-o", "out.gif"], "expected one of .png"),
        (["cat", "--count", "2", "-o", "two.png"], "expected a folder for several images"),
        (["cat", "-o", "a.png", "--format", "jpeg"], "--format jpeg does not fit a.png"),
        (["cat", "--prompts", "a;b"], "expected one prompt"),
        (["--prompts", " ; "], "expected prompts separated by semicolons"),
    ],
)
def test_wrong_usage(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """The exit status is 2, no engine is started and nothing is written."""
    status = main(["generate", *arguments])

    assert status == 2
    assert words in capsys.readouterr().err
    assert os.listdir(folder) == ["config.yaml"]


def put(targets: Targets) -> Path:
    """Put a rendered image to its place."""
    return targets.put("cat-0001.png", b"pixels")


def test_a_file_is_replaced(folder: Path) -> None:
    """A named file is replaced in one step, and its folder is made."""
    targets = Targets(Path("new/fox.png"), are_several=False)
    places = [put(targets), put(targets)]

    assert places == [Path("new/fox.png")] * 2
    assert os.listdir("new") == ["fox.png"]
    assert Path("new/fox.png").read_bytes() == b"pixels"


def test_a_file_without_an_ending_gets_the_images(folder: Path) -> None:
    """The ending of the image is appended."""
    assert put(Targets(Path("fox"), are_several=False)) == Path("fox.png")


@pytest.mark.parametrize("output", [None, Path("there"), Path("new")])
def test_a_folder_takes_new_names(folder: Path, output: Path | None) -> None:
    """Nothing in a folder is overwritten: a second image is FILE~2."""
    (folder / "there").mkdir()
    targets = Targets(output, are_several=output == Path("new"))
    places = [put(targets), put(targets)]
    home = output or Path()

    assert places == [home / "cat-0001.png", home / "cat-0001~2.png"]


@pytest.mark.parametrize(
    ("output", "place"), [("cat-0001.png", "cat-0001.png"), (".", "cat-0001~2.png")]
)
def test_a_link_at_the_target_is_not_followed(folder: Path, output: str, place: str) -> None:
    """A named file takes the link's place, in a folder it is a name that is taken; nothing is behind it."""
    (folder / "cat-0001.png").symlink_to(folder / "elsewhere")

    assert put(Targets(Path(output), are_several=False)) == Path(place)
    assert not (folder / "elsewhere").exists()
    assert not Path(place).is_symlink()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("output", ["fox.png", "."])
def test_the_umask_counts(folder: Path, output: str, mask: int, mode: int) -> None:
    """An image has the mode that any new file of this user has."""
    old = os.umask(mask)
    try:
        place = put(Targets(Path(output), are_several=False))
    finally:
        os.umask(old)

    assert stat.S_IMODE(place.stat().st_mode) == mode


def test_several_images_are_no_file(folder: Path) -> None:
    """A file for several images is refused before its folder is made."""
    with pytest.raises(UsageError, match="expected a folder for several images"):
        Targets(Path("new/fox.png"), are_several=True)

    assert not Path("new").exists()
