"""Ask the kernel whether a dropped file is still being written."""

import errno
import fcntl
import os
import signal
from pathlib import Path


def is_open_for_writing(path: str | Path) -> bool:
    """Whether a process on this host has the file open for writing; False if the kernel cannot tell.

    In that case a read lease is refused with EAGAIN (fcntl(2), F_SETLEASE). Any other refusal (not
    our file, a network file system) says nothing. Closing the file gives the lease back.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        # Whoever opens the file meanwhile makes the kernel signal us: by default SIGIO, which kills.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored unless a program asks for it
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as e:
        return e.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False
