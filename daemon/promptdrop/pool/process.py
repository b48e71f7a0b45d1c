"""An engine in a child process of this one, which runs `promptdrop.engines.worker`."""

import os
import signal
import socket
import subprocess
import sys
import time

from promptdrop import log
from promptdrop.config import Config
from promptdrop.pool.link import EngineLink


class ChildProcess:
    """A Life in a child process. It leads a process group of its own, which is killed as a whole."""

    is_lost = False

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """Start the child. The calling thread must outlive it: PR_SET_PDEATHSIG follows that thread.

        Raises OSError: out of descriptors, processes or memory.
        """
        self.socket, theirs = socket.socketpair()
        # Its lines go where ours go; what else it writes is captured by us, like our own.
        passed = [theirs.fileno()] + ([] if (lines := log.descriptor()) is None else [lines])
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [sys.executable, "-m", "promptdrop.engines.worker", *map(str, passed)],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    start_new_session=True,
                    env=environment,
                )
            self._pidfd = os.pidfd_open(self._popen.pid)
        except OSError:
            self.socket.close()  # an engine that was started ends when the pipe is closed
            raise
        self.socket.setblocking(False)

    @property
    def pid(self) -> int:
        """The child's process id and process group."""
        return self._popen.pid

    def ends(self) -> list[int]:
        return [self._pidfd]

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def how_it_ended(self) -> str:
        code = self._popen.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # dead and reaped

    def reap(self, seconds: float) -> bool:
        self.kill()
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.socket.close()
            os.close(self._pidfd)
        return True


def start(config: Config, environment: dict[str, str] | None = None) -> EngineLink:
    """Start an engine process that loads `config`. Raises OSError: as ChildProcess."""
    child, now = ChildProcess(environment), time.monotonic()
    link = EngineLink(child, started=now, loads_since=now, pid=child.pid, host=socket.gethostname())
    link.send(config)
    return link
