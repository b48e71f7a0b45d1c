"""Real users: droppers and readers of the spool's group, the daemon's own user, a stranger.

Only root can become them; elsewhere, and where they may not read this checkout, the tests skip.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from harness import REPOSITORY, Daemon

GROUP = 64000  # of the spool


@dataclass(frozen=True, slots=True)
class Person:
    """One user of this machine; uids and gids need no name."""

    uid: int
    gid: int

    def prefix(self) -> list[str]:
        """The words before a command that run it as this user, whose umask is 022."""
        who = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
        return ["setpriv", *who, "sh", "-c", 'umask 022; exec "$@"', "sh"]

    def sh(self, script: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell script as this user."""
        command = [*self.prefix(), "sh", "-c", script]
        return subprocess.run(command, cwd=cwd, check=check, capture_output=True, text=True)

    def start(self, script: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a shell script as this user, without waiting for its end."""
        command = [*self.prefix(), "sh", "-c", script]
        return subprocess.Popen(command, cwd=cwd, text=True, start_new_session=True)

    def python(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python program as this user; it may wait for the end of its standard input."""
        command = [*self.prefix(), *python(), "-c", code, *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/", text=True)

    def drop(self, daemon: Daemon, name: str, content: str) -> Path:
        """Drop a file of this user; a sub-folder that is missing is made, his, and open to the group."""
        path = daemon.inbox / name
        if not path.parent.exists():
            path.parent.mkdir()
            os.chown(path.parent, self.uid, GROUP)
            path.parent.chmod(0o2775)
        hidden = path.with_name(f".{path.name}")
        hidden.write_text(content)
        os.chown(hidden, self.uid, self.gid)
        hidden.rename(path)
        return path


DAEMON = Person(64001, GROUP)
ALICE = Person(64002, GROUP)
BOB = Person(64003, GROUP)
STRANGER = Person(64004, 64004)
CAROL = Person(64005, GROUP)
DAVE = Person(64006, GROUP)
ERIN = Person(64007, GROUP)


@cache
def python() -> list[str]:
    """The words of a Python with promptdrop that every user can run.

    This one, or the system's of the same version, if this one lies below a folder that is root's alone.
    """
    closed = [*Person(STRANGER.uid, STRANGER.gid).prefix(), sys.executable, "-c", "pass"]
    if not subprocess.run(closed, capture_output=True, check=False).returncode:
        return [sys.executable]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    paths = (REPOSITORY / "daemon", *map(sysconfig.get_path, ("purelib", "platlib")))
    path = ":".join(dict.fromkeys(map(str, paths)))
    return ["env", f"PYTHONPATH={path}", f"/usr/bin/python{version}"]


def promptdrop_as(person: Person) -> list[str]:
    """`python -m promptdrop` as this user."""
    if os.geteuid():
        pytest.skip("only root can become other users")
    command = [*person.prefix(), *python(), "-m", "promptdrop"]
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


@contextmanager
def shared_daemon(changes: dict[str, Any] | None = None) -> Iterator[Daemon]:
    """A daemon of its own user, on a spool that it owns and its group uses; started."""
    wrapper = promptdrop_as(DAEMON)
    with open_home() as home:
        daemon = Daemon(home, changes)
        give_to_group(daemon)
        try:
            yield daemon.start(wrapper=wrapper)
        finally:
            if daemon.process and daemon.process.poll() is None:
                daemon.kill()


def drain_as(person: Person, daemon: Daemon) -> subprocess.CompletedProcess[str]:
    """Run `run --drain` to its end as this user."""
    command = [*promptdrop_as(person), "run", "--drain", "--config", str(daemon.config)]
    return subprocess.run(
        command, cwd=daemon.home, capture_output=True, text=True, timeout=120, check=False
    )


def give_to_group(daemon: Daemon) -> None:
    """Make a spool that the daemon's user owns and its group may drop into, as the README sets it up."""
    for folder in (daemon.home, daemon.root, daemon.own):
        os.chown(folder, DAEMON.uid, GROUP)
    for folder in (daemon.inbox, daemon.outbox, daemon.failed, daemon.own / "control"):
        os.chown(folder, DAEMON.uid, GROUP)
        folder.chmod(0o2775)
