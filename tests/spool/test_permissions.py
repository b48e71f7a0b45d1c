"""Whether a process may use a folder, and the words that say why not."""

import os
from pathlib import Path

import pytest

from promptdrop.errors import ConfigError
from promptdrop.spool.permissions import make_folder, why_not_moved


@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o1777, "is sticky: only the owner of a file"), (0o755, "is read-only for us"), (0o777, "")],
)
def test_why_files_of_others_cannot_be_moved(tmp_path: Path, mode: int, words: str) -> None:
    """A sticky or read-only inbox is told in words, with the cure."""
    if os.geteuid() != 0:
        pytest.skip("needs a second user")
    tmp_path.chmod(mode)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.setuid(65534)
        os.write(write, (why_not_moved(Path()) or "").encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()

    assert words in told
    assert bool(words) == bool(told)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    """The configuration names something that is no folder, or that lies below a file."""
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="exists and is not a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be made"):
        make_folder(tmp_path / "file/inner/folder")
