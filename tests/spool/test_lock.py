"""One daemon for each spool."""

import os
from pathlib import Path

import pytest

from promptdrop.errors import DiskTrouble, SpoolBusy
from promptdrop.spool.spool import Spool
from spools import make_spool


def test_one_daemon_per_spool(spool: Spool, tmp_path: Path) -> None:
    """The second is told the first one's pid; when the first ends, the spool is free."""
    spool.lock.acquire()
    other = make_spool(tmp_path)
    with pytest.raises(SpoolBusy, match=rf"pid {os.getpid()}"):
        other.lock.acquire()
    busy = other.lock.daemon_pid()
    spool.lock.release()

    assert busy == os.getpid()
    assert other.lock.daemon_pid() is None
    other.lock.acquire()
    other.lock.release()


def test_a_state_folder_that_comes_back_is_locked_anew(spool: Spool, tmp_path: Path) -> None:
    """While it is gone, or another one is in its place, the daemon waits."""
    spool.lock.acquire()
    state, away = spool.paths.state, tmp_path / "away"
    state.rename(away)
    with pytest.raises(DiskTrouble, match="is missing; waiting for it"):
        spool.lock.require()
    state.mkdir()
    spool.paths.lock.write_text("1\nanother daemon's\n")
    with pytest.raises(DiskTrouble, match="is not the one we own"):
        spool.lock.require()
    mark = (away / "lock").read_text()
    spool.paths.lock.unlink()
    spool.paths.lock.write_text(mark)  # ours with another inode, as after a new mount
    spool.lock.require()

    assert make_spool(tmp_path).lock.daemon_pid() == os.getpid()
    spool.lock.release()
