"""Run promptdrop so that it dies before its N-th change to the disk. For test_crash.py.

Counts every rename, replace, mkdir, fsync, link, unlink and rmdir of the daemon, on any thread.
N = 0 never dies; the number of changes counted is then written to `count`.

Hundreds of daemons and engines are needed, so one process with everything imported forks a daemon
for each request on stdin (a JSON line with `n`, `arguments`, `home`, `count`) and answers with its
exit status. The daemon in turn forks its engine before it has a thread: a real child, which dies by
signals and with its parent like one that was executed.
"""

import ctypes
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from promptdrop import fs
from promptdrop.cli import main, terminal  # noqa: F401 - imported once for all
from promptdrop.engines import gradient, worker  # noqa: F401
from promptdrop.pool import process
from promptdrop.supervisor import supervisor  # noqa: F401

_lock = threading.Lock()
_numbers = itertools.count(1)
_last = 0


def counted(change: Callable[..., Any], fatal: int) -> Callable[..., Any]:
    """Wrap a call that changes the disk: it is counted, and the process dies instead of the n-th."""

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


class ForkedEngine:
    """An engine process that waits for its pipe; of subprocess.Popen it has what the daemon uses."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._ours.close()
            os._exit(self._become_engine(theirs))
        theirs.close()

    @staticmethod
    def _become_engine(requests: socket.socket) -> int:
        """Run an engine in the child. Without a request it ends when the daemon closes its end of the pair."""
        os.setsid()
        _, (pipe, *_), _, _ = socket.recv_fds(requests, 1, 1)
        requests.close()
        try:
            worker.main(pipe)
        except SystemExit as e:
            return int(e.code or 0)
        return 0

    def start(self, pipe: int) -> "ForkedEngine":
        """Hand it the engine's end of the pipe."""
        with self._ours:
            socket.send_fds(self._ours, [b"!"], [pipe])
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float) -> int:
        pidfd = os.pidfd_open(self.pid) if self.poll() is None else None
        if pidfd is not None:
            select.select([pidfd], [], [], seconds)
            os.close(pidfd)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("engine", seconds)
        assert self.returncode is not None
        return self.returncode


def use_forked_engine() -> None:
    """Make the daemon's first engine one that is forked now; further ones are executed as usual."""
    forked = [ForkedEngine()]

    def popen(command: list[str], **options: Any) -> Any:
        if forked:
            pipe = command[command.index(worker.__name__) + 1]
            return forked.pop().start(int(pipe))
        return subprocess.Popen(command, **options)

    process.subprocess = SimpleNamespace(
        Popen=popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


def arm(n: int) -> None:
    """Count this process's changes to the disk from now on, and die before the n-th."""
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
    """Run the daemon, from start to end, in the forked process."""
    os.chdir(home)
    log = os.open("daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    use_forked_engine()
    arm(n)
    status = main.main(arguments)
    if n == 0:
        Path(count).write_text(str(_last))
    return status


if __name__ == "__main__":
    serve()
