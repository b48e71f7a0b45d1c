"""File systems: what kind one is, whether it is mounted, how much is free."""

import os
import re
from pathlib import Path


def file_system(path: Path) -> str:
    """The type of the file system `path` lies on, as mountinfo spells it: ext4, xfs, nfs4, fuse.sshfs."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            if left.split()[2] == wanted:
                return right.split()[0]
    return "unknown"


def mount_points() -> set[str]:
    """Where something is mounted now, bind mounts too, as proc(5) lists it in mountinfo."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return {_unescaped(line.split()[4]) for line in lines}


def _unescaped(name: bytes) -> str:
    """Return a path of mountinfo or fstab(5), in which spaces and the like are octal numbers."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), name))


def missing_mount(path: Path) -> Path | None:
    """The mount point of fstab(5) that `path` lies at or below and that is not mounted now."""
    try:
        lines = Path("/etc/fstab").read_bytes().splitlines()
    except OSError:
        return None
    for fields in map(bytes.split, lines):
        if len(fields) < 2 or fields[0].startswith(b"#") or not fields[1].startswith(b"/"):
            continue
        place = Path(_unescaped(fields[1]))
        if path.is_relative_to(place) and not os.path.ismount(place):
            return place
    return None


def free_mib(path: Path) -> float:
    """Free space for an unprivileged writer, MiB."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize / 2**20
