"""promptdrop, dead on the spot before its N-th change to the disk. For test_crash.py.

Counts every rename, replace, mkdir, fsync, link, unlink and rmdir of the daemon, on any thread.
N = 0 never dies; the number of changes counted is then written to `count`.

One process with everything imported forks a daemon for each request on stdin (a JSON line with
`n`, `arguments`, `home`, `count`) and answers with its exit status: hundreds of daemons are needed.
"""

import ctypes
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from promptdrop import fs
from promptdrop.cli import parser, terminal  # noqa: F401 - imported once for all

_lock = threading.Lock()
_numbers = itertools.count(1)
_last = 0


def counted(change: Callable[..., Any], fatal: int) -> Callable[..., Any]:
    """The same change, unless it is the fatal one."""

    def counting(*args: Any, **kwargs: Any) -> Any:
        global _last
        with _lock:
            _last = next(_numbers)
            if _last == fatal:
                os._exit(137)
            if fatal and _last > fatal:
                threading.Event().wait()  # another thread is dying
        return change(*args, **kwargs)

    return counting


def arm(n: int) -> None:
    """From now on this process counts its changes to the disk, and dies before the n-th."""
    for name in ("rename", "replace", "mkdir", "fsync", "link", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name), n))
    fs._renameat2 = counted(ctypes.CDLL(None, use_errno=True).renameat2, n)


def dies_before(n: int, action: Callable[[], object]) -> bool:
    """Run `action` in a fork of this process, dead before its n-th change; False: it made fewer."""
    pid = os.fork()
    if pid == 0:
        try:
            arm(n)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 137), f"ended with {status}"
    return status == 137


def serve() -> None:
    """Fork one daemon for each request; this process has a single thread and no state to leak."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(**request))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(n: int, arguments: list[str], home: str, count: str) -> int:
    """In the forked process: the daemon, from start to end."""
    os.chdir(home)
    log = os.open("daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    arm(n)
    status = parser.main(arguments)
    if n == 0:
        Path(count).write_text(str(_last))
    return status


if __name__ == "__main__":
    serve()
