"""Real users: droppers and readers of the spool's group, the daemon's own user, a stranger.

Only root can become them; elsewhere, and where they may not read this checkout, the tests skip.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import Daemon

GROUP = 64000  # of the spool


@dataclass(frozen=True, slots=True)
class Person:
    """One user of this machine; uids and gids need no name."""

    uid: int
    gid: int

    def prefix(self, umask: str = "022") -> list[str]:
        """The words before a command that run it as this user."""
        who = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
        return ["setpriv", *who, "sh", "-c", f'umask {umask}; exec "$@"', "sh"]

    def sh(self, script: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell script as this user."""
        command = [*self.prefix(), "sh", "-c", script]
        return subprocess.run(command, cwd=cwd, check=check, capture_output=True, text=True)

    def start(self, script: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a shell script as this user, without waiting for its end."""
        command = [*self.prefix(), "sh", "-c", script]
        return subprocess.Popen(command, cwd=cwd, text=True, start_new_session=True)


DAEMON = Person(64001, GROUP)
ALICE = Person(64002, GROUP)
BOB = Person(64003, GROUP)
STRANGER = Person(64004, 64004)


def promptdrop_as(person: Person, umask: str = "022") -> list[str]:
    """`python -m promptdrop` as this user."""
    if os.geteuid():
        pytest.skip("only root can become other users")
    command = [*person.prefix(umask), sys.executable, "-m", "promptdrop"]
    tried = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"uid {person.uid} cannot run promptdrop here: {tried.stderr[-200:]}")
    return command


@contextmanager
def open_home() -> Iterator[Path]:
    """A folder that every user can enter, unlike those of pytest."""
    home = Path(tempfile.mkdtemp(prefix="promptdrop-people-"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        shutil.rmtree(home)


def give_to_group(daemon: Daemon) -> None:
    """Make a spool that the daemon's user owns and its group may drop into, as the README sets it up."""
    for folder in (daemon.home, daemon.root, daemon.own):
        os.chown(folder, DAEMON.uid, GROUP)
    for folder in (daemon.inbox, daemon.outbox, daemon.failed, daemon.own / "control"):
        os.chown(folder, DAEMON.uid, GROUP)
        folder.chmod(0o2775)
