"""What a process holds of the machine just now, as /proc tells."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Gauges:
    """Memory, and everything that a long life could leak besides."""

    rss_mib: float
    descriptors: int
    threads: int
    watches: int  # of inotify


def gauges(pid: int) -> Gauges:
    """Read the gauges of a process. Raises OSError: it has ended."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    if "VmRSS" not in status:
        raise ProcessLookupError(f"process {pid} is a zombie")
    return Gauges(
        rss_mib=round(int(status["VmRSS"].split()[0]) / 1024, 1),
        descriptors=len(list((proc / "fd").iterdir())),
        threads=len(list((proc / "task").iterdir())),
        watches=sum(_watches(info) for info in (proc / "fdinfo").iterdir()),
    )


def _watches(info: Path) -> int:
    try:
        return info.read_text().count("inotify wd:")
    except FileNotFoundError:
        return 0  # closed meanwhile
