"""Files and folders that others may swap while we look."""

import os
from pathlib import Path

import pytest

from promptdrop import untrusted


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """No link is followed, no pipe is waited for, no device is opened."""
    (tmp_path / "file").write_text("mine\n")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")

    assert untrusted.read_plain(tmp_path / "file", None)[0] == b"mine\n"
    for name in ("link", "folder", "pipe", "/dev/null"):
        with pytest.raises(untrusted.NotPlain):
            untrusted.read_plain(tmp_path / name, None)
    with pytest.raises(FileNotFoundError):
        untrusted.read_plain(tmp_path / "gone", None)


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    """At most one byte more than the limit is read, whatever the file's size says."""
    (tmp_path / "file").write_bytes(b"x" * 100)

    assert len(untrusted.read_plain(tmp_path / "file", 10)[0]) == 11
    assert len(untrusted.read_plain(tmp_path / "file", 100)[0]) == 100


@pytest.mark.parametrize("kernel", ["with openat2", "without openat2"])
def test_a_folder_is_reached_without_links(
    tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path to it stays valid, even if its name is given to another folder meanwhile."""
    if kernel == "without openat2":
        monkeypatch.setattr(untrusted, "_OPENAT2", 10_000)  # no system call: ENOSYS
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("mine\n")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for sub in ("link", "link/b", "a/b/file"):
        with pytest.raises(untrusted.NotPlain), untrusted.below(tmp_path, sub):
            pass
    with untrusted.below(tmp_path, "a/b") as folder:
        (tmp_path / "a").rename(tmp_path / "away")
        (tmp_path / "a").symlink_to("/etc")
        text = (folder / "file").read_text()
    with untrusted.below(tmp_path, "") as top:
        listed = sorted(os.listdir(top))

    assert text == "mine\n"
    assert listed == ["a", "away", "link"]


def test_an_error_below_names_the_real_path(tmp_path: Path) -> None:
    """A message with /proc/self/fd in it helps nobody."""
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError) as caught, untrusted.below(tmp_path, "sub") as folder:
        os.unlink(folder / "gone")

    assert caught.value.filename == str(tmp_path / "sub/gone")


def test_a_signature_changes_with_its_file(tmp_path: Path) -> None:
    """It changes with content and identity; a path that is no regular file has none."""
    path = tmp_path / "file"
    path.write_text("one")
    first = untrusted.signature_of(path)
    same = untrusted.signature_of(path)
    path.write_text("three")
    (tmp_path / "link").symlink_to(path)

    assert first == same
    assert untrusted.signature_of(path) != first
    assert untrusted.signature_of(tmp_path / "link") is None
    assert untrusted.signature_of(tmp_path / "gone") is None


@pytest.mark.parametrize("sub", ["..", "a/../..", "/etc", "a\0b", "a/.."])
def test_nothing_leads_out_of_a_folder(tmp_path: Path, sub: str) -> None:
    """A path with `..`, from the root or with a NUL is refused before anything is opened."""
    (tmp_path / "a").mkdir()

    with pytest.raises(untrusted.NotPlain), untrusted.below(tmp_path, sub):
        pass
