"""File systems of a test's own: to fill, freeze, cut off, unmount and break.

Mounting takes root; elsewhere the tests skip. Each one asserts os.path.ismount before it is used,
so that no fault ever meets the machine's own disk.
"""

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import Daemon, until

FAULTY_DISK = str(Path(__file__).with_name("faulty_disk.py"))
ALL_OPERATIONS = (  # that a Faulty can make fail; as in faulty_disk.py, which needs a FUSE library
    "getattr", "readdir", "open", "create", "read", "write", "truncate", "fsync", "fsyncdir",
    "rename", "unlink", "mkdir", "rmdir", "chmod",
)  # fmt: skip
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # ioctl_fs.h
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # XFS_IOC_GOINGDOWN, which ext4 knows too


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert os.path.ismount(arguments[-1])


def unmount(path: Path) -> None:
    """Unmount lazily: a process that still has files open there keeps them."""
    subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def tmpfs(path: Path, size: str = "16m") -> Iterator[Path]:
    """Mount a small file system in memory on `path`, which is made."""
    path.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "promptdrop-test", str(path))
    try:
        yield path
    finally:
        if os.path.ismount(path):
            unmount(path)


class Block:
    """A real ext4 or XFS in a sparse file, on `path`."""

    def __init__(self, image: Path, path: Path, kind: str) -> None:
        self.image, self.path, self.kind = image, path, kind

    def mount(self) -> None:
        """Mount it, after a power cut too: the journal is replayed."""
        options = "loop,nouuid" if self.kind == "xfs" else "loop"  # its copies have one UUID
        _mount("-o", options, "-t", self.kind, str(self.image), str(self.path))

    def unmount(self) -> None:
        """Unmount it for good; no file of it may be in use.

        It goes on as a copy. A mount namespace that a test beside this one has made just now keeps the
        file system as it is, without power, and a mount of the same image would be that one again.
        """
        subprocess.run(["umount", str(self.path)], check=True)
        old, self.image = self.image, self.image.with_name(f"next-{self.image.name}")
        subprocess.run(["cp", "--sparse=always", str(old), str(self.image)], check=True)
        old.unlink()

    def freeze(self) -> None:
        """Make every process that writes wait in uninterruptible sleep until `thaw`."""
        self._ioctl(_FIFREEZE, 0)

    def thaw(self) -> None:
        """End the freeze, so that writes go on."""
        self._ioctl(_FITHAW, 0)

    def cut_power(self) -> None:
        """Lose all data that was not flushed, and make every later call fail, as a disk without power."""
        self._ioctl(_SHUTDOWN, _NO_LOG_FLUSH)

    def _ioctl(self, request: int, argument: int) -> None:
        assert os.path.ismount(self.path)
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, request, struct.pack("I", argument))
        finally:
            os.close(fd)


@contextmanager
def block(home: Path, kind: str = "ext4") -> Iterator[Block]:
    """A real file system on `home`/disk."""
    image, path = home / f"{kind}.img", home / "disk"
    path.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(320 << 20)  # sparse; mkfs.xfs refuses less than 300 MiB
    try:
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"there is no mkfs.{kind} here")
    disk = Block(image, path, kind)
    disk.mount()
    try:
        yield disk
    finally:
        if str(path) in Path("/proc/self/mounts").read_text():  # a disk without power has no status
            try:
                disk.thaw()
            except (OSError, AssertionError):
                pass  # it is not frozen, or has no power
            unmount(path)
        disk.image.unlink()


class Faulty:
    """A folder seen through a FUSE file system that fails as it is told."""

    def __init__(self, home: Path) -> None:
        self.behind, self.path = home / "behind", home / "faulty"
        self._control = home / "faults.json"
        self._process: subprocess.Popen[bytes] | None = None

    def mount(self) -> None:
        """Put the folder there."""
        command = [
            sys.executable,
            FAULTY_DISK,
            str(self.behind),
            str(self.path),
            str(self._control),
        ]
        self._process = subprocess.Popen(command)
        until(lambda: os.path.ismount(self.path) or self._process.poll(), "the FUSE mount", 20)
        if not os.path.ismount(self.path):
            pytest.skip("cannot mount FUSE here")

    def unmount(self) -> None:
        """Take it away; the empty mount point stays."""
        assert self._process
        unmount(self.path)
        self._process.terminate()
        self._process.wait(20)

    def fail(self, *operations: str, error: str = "EIO", **more: Any) -> None:
        """Make these operations fail from now on.

        `match`: only on paths where this is found (a regular expression). `times`: only so often. `done`: after they were
        done all the same. `delay`: they take so many seconds, and succeed if `error` is empty.
        """
        faults = {"operations": operations, "error": error, **more}
        new = self._control.with_suffix(".new")
        new.write_text(json.dumps(faults))
        new.rename(self._control)

    def heal(self) -> None:
        """End all faults."""
        self.fail(error="")


@contextmanager
def faulty(home: Path) -> Iterator[Faulty]:
    """`home`/faulty, behind which lies `home`/behind; all is well at first."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here")
    disk = Faulty(home)
    disk.behind.mkdir()
    disk.path.mkdir()
    disk.heal()
    disk.mount()
    try:
        yield disk
    finally:
        if os.path.ismount(disk.path):
            disk.unmount()


def drop_behind(disk: Faulty, name: str, text: str) -> None:
    """Drop a file into the inbox without passing through the mount."""
    new = disk.behind / "spool" / f".{name}"
    new.write_text(text)
    new.rename(disk.behind / "spool" / "inbox" / name)


def nothing_was_charged(daemon: Daemon) -> None:
    """Assert that no attempt was charged, each job was done once, and no leftovers are there."""
    assert daemon.log("image.failed") == []
    for path in daemon.outbox.rglob("job.json"):
        job = json.loads(path.read_bytes())
        assert job["outcome"] == "done"
        assert [s["job"]["attempt"] for s in daemon.sidecars(path.parent.name)] == [1]
    # status.json is replaced while we look: its temporary comes and goes.
    until(lambda: not list(daemon.outbox.rglob(".*")), "an outbox without temporaries")
