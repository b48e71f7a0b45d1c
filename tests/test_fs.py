"""Durable writes, exclusive moves, and listing."""

import os
import stat
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest

from promptdrop import fs, mounts
from promptdrop.untrusted import NotPlain, below


def test_a_move_never_overwrites(tmp_path: Path) -> None:
    """Another file under the name stays, whatever its bytes: a rename is never half done."""
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).write_text(text)

    for taken in "bc":
        with pytest.raises(FileExistsError):
            fs.move(tmp_path / "a", tmp_path / taken)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "b").read_text() == "two"


def test_a_move_to_another_file_system_is_a_copy(tmp_path: Path) -> None:
    """The copy has the bytes, times and mode, but no bit that would let it run as somebody else."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here")
    source, target = tmp_path / "a", elsewhere / f"promptdrop-test-{os.getpid()}"
    source.write_text("one")
    source.chmod(0o4750)
    os.utime(source, (1e9, 1e9))
    try:
        fs.move(source, target)
        status, text = target.stat(), target.read_text()
    finally:
        target.unlink(missing_ok=True)

    assert not source.exists()
    assert (text, status.st_mode & 0o7777, status.st_mtime) == ("one", 0o750, 1e9)


def test_new_files_have_their_folders_group(tmp_path: Path) -> None:
    """They have it also where no setgid bit passes it on."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to any group")
    os.chown(tmp_path, -1, 12345)
    os.chmod(tmp_path, 0o755)
    fs.make_directory(tmp_path / "folder", 0o2770)
    fs.write_durably(tmp_path / "folder" / "file", b"", 0o640)
    made = [os.stat(tmp_path / "folder"), os.stat(tmp_path / "folder" / "file")]

    assert [(s.st_gid, oct(s.st_mode & 0o7777)) for s in made] == [
        (12345, "0o2770"),
        (12345, "0o640"),
    ]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """The old file and nothing else is there; the error names the folder."""
    path = tmp_path / "a"
    fs.write_durably(path, b"old", 0o644)
    with pytest.raises(OSError, match="No space left") as caught, fs.temporary(tmp_path, 0o644):
        raise OSError(28, "No space left on device")

    assert caught.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    """`write_once` keeps an existing file; `write_durably` and `write_quickly` replace it."""
    path = tmp_path / "a"
    fs.write_once(path, b"one", 0o644)
    with pytest.raises(FileExistsError):
        fs.write_once(path, b"two", 0o644)
    kept = path.read_bytes()
    fs.write_durably(path, b"three", 0o644)
    (tmp_path / ".promptdrop-a.tmp").touch()  # as a crash leaves it
    fs.write_quickly(path, b"four", 0o644)

    assert kept == b"one"
    assert path.read_bytes() == b"four"
    assert os.listdir(tmp_path) == ["a"]


def test_a_tree_of_any_depth_is_walked(tmp_path: Path) -> None:
    """A tree deeper than Python recurses and than a path may be long is walked; no link is followed."""
    script = "import os\nfor _ in range(2000):\n os.mkdir('d'); os.chdir('d')\nopen('x', 'w')"
    subprocess.run(["python3", "-c", script], cwd=tmp_path, check=True)
    (tmp_path / "link").symlink_to(tmp_path)
    walked = list(fs.walk(tmp_path))
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)

    assert len(walked) > 1500
    assert not any("link" in folder for folder, _ in walked)


def test_what_cannot_be_told_is_not_taken_for_gone(tmp_path: Path) -> None:
    """A dangling link is there; a name that is too long is an error, not a no."""
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()

    assert fs.exists(tmp_path / "link")
    assert not fs.exists(tmp_path / "gone")
    assert not fs.exists(tmp_path / "file/inner")
    with pytest.raises(OSError, match="too long"):
        fs.exists(tmp_path / ("x" * 300))


def test_only_empty_folders_are_removed(tmp_path: Path) -> None:
    """A folder that holds a file is kept."""
    for path in ("empty/a/b", "used/a/b"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "used/file").touch()
    for name in ("empty", "used", "gone"):
        fs.remove_empty_tree(tmp_path / name)

    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "used", "used/file",
    ]  # fmt: skip


def test_file_systems_are_named_as_the_kernel_does(tmp_path: Path) -> None:
    """Their names are those of mountinfo, and their free space is an unprivileged writer's."""
    assert mounts.file_system(Path("/proc")) == "proc"
    assert 0 < mounts.free_mib(tmp_path) < 2**40
    assert mounts.missing_mount(tmp_path) is None


def test_folders_are_made_without_following_a_link(tmp_path: Path) -> None:
    """Where a part is a link or a file, nothing is made, there or where the link leads."""
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/dangling").symlink_to("nowhere")
    (tmp_path / "root/file").touch()
    fs.make_directories(tmp_path / "root", "a/b", 0o2770)
    for part in ("link", "dangling", "file"):
        with pytest.raises(NotPlain):
            fs.make_directories(tmp_path / "root", f"{part}/inner", 0o2770)

    assert stat.S_IMODE((tmp_path / "root/a/b").stat().st_mode) == 0o2770
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_move_that_a_crash_cut_short_is_completed(tmp_path: Path) -> None:
    """On another file system the same bytes under the name are the copy: the original goes. Others stay."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no other file system here")
    target = elsewhere / f"promptdrop-{os.getpid()}"
    try:
        for text, is_gone in (("two", False), ("one", True)):
            (tmp_path / "a").write_text("one")
            target.write_text(text)
            with nullcontext() if is_gone else pytest.raises(FileExistsError):
                fs.move(tmp_path / "a", target)

            assert (tmp_path / "a").exists() is not is_gone
            assert target.read_text() == text
    finally:
        target.unlink()


def test_folders_are_made_to_any_depth(tmp_path: Path) -> None:
    """Deeper than Python recurses."""
    deep = "/".join(["d"] * 1500)
    fs.make_directories(tmp_path, deep, 0o775)
    with below(tmp_path, deep) as folder:
        is_there = folder.is_dir()
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)

    assert is_there


def test_a_quick_write_needs_no_one_name(tmp_path: Path) -> None:
    """Somebody's folder under the temporary's usual name does not keep the file from being replaced."""
    (tmp_path / ".promptdrop-status.json.tmp").mkdir()
    for data in (b"one", b"two"):
        fs.write_quickly(tmp_path / "status.json", data, 0o644)

    assert (tmp_path / "status.json").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 2
