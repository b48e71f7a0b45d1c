"""Commands to the daemon: files in `.promptdrop/control`, which the spool's group may write.

`pause` is a flag that lasts; a command is a small JSON file that the daemon removes once it is done.
"""

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from promptdrop import fs, log, names, untrusted
from promptdrop.errors import DiskTrouble
from promptdrop.spool.paths import Paths

PAUSE = "pause"
MOST_TARGETS = 1000  # of one command
_LIMIT = 1 << 20  # bytes of a command
_AT_ONCE = 100  # commands in memory, however many there are
_BYTES_AT_ONCE = 4 * _LIMIT  # read at one look
_FIRST_WAIT, _LONGEST_WAIT = (
    0.1,
    5.0,
)  # seconds until a command that waits is read again; doubled each time
_MODE = 0o640  # of a command: for the daemon, which is of the group
_TRIES = 5  # to write a file
_EXPECTED = (
    f'expected a file of at most {_LIMIT} bytes that says {{"command": "cancel" or "retry",'
    f' "targets": [at most {MOST_TARGETS} texts]}}'
)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Withdraw or stop these jobs, by id."""

    targets: tuple[str, ...]
    file: str = ""  # its name in the control folder, once it was read


@dataclass(frozen=True, slots=True)
class Retry:
    """Resume the jobs of these files, as paths below failed/."""

    targets: tuple[str, ...]
    file: str = ""


Command = Cancel | Retry
_KINDS: dict[str, type[Cancel] | type[Retry]] = {"cancel": Cancel, "retry": Retry}


class _NoCommand(Exception):
    """The file is no command. `kind`: what it says that it is, if it says so."""

    def __init__(self, text: str, kind: str | None = None) -> None:
        super().__init__(text)
        self.kind = kind


def send(folder: Path, command: Command) -> None:
    """Leave a command for the daemon: as many files as its targets need, each in one step."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(command, kind))
    for targets in _portions(command.targets):
        document = json.dumps({"command": kind, "targets": targets})
        _write(fs.write_once, folder / f"{kind}-{secrets.token_hex(6)}.json", document.encode())


def pause(folder: Path) -> None:
    """Stop taking new images until `resume`, across restarts."""
    _write(fs.write_durably, folder / PAUSE, b"")


def _write(write: Callable[[Path, bytes, int], None], path: Path, data: bytes) -> None:
    """Write a file; again if a daemon that starts just now has removed its temporary as a leftover."""
    for left in reversed(range(_TRIES)):
        try:
            return write(path, data, _MODE)
        except FileNotFoundError:
            if not left:
                raise


def resume(folder: Path) -> None:
    """Take images again."""
    fs.remove_file(folder / PAUSE)
    fs.sync_directory(folder)


def why_paused(paths: Paths) -> str | None:
    """Say why no new image is begun and how to go on; None if nothing is paused.

    Thread: any.
    """
    if os.path.lexists(paths.control / PAUSE):
        return "paused; go on with: promptdrop resume"
    if os.path.lexists(paths.inbox / names.PAUSE):
        return f"paused by the file {names.PAUSE} in the inbox; delete it to go on"
    return None


@contextmanager
def removed_if_fatal(name: str, remove: Callable[[], None]) -> Iterator[None]:
    """Remove a command before an unknown error ends the daemon, so that it ends no second life.

    Thread: any.
    """
    try:
        yield
    except (OSError, DiskTrouble, _NoCommand):
        raise
    except Exception as e:  # raised again, whatever it is
        remove()
        log.get().error("command.failed", file=names.printable(name), error=repr(e)[:300])
        raise


class CommandFiles:
    """The commands in the control folder. The scanner reads them; the loop says what becomes of each.

    New ones are read first, then those that have waited longest for a job or a disk, so that none of
    them keeps another from its turn. One that waits is not kept in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Changed on the loop and copied by the scanner, each in one step (set.copy, dict.copy).
        self._under_way: set[str] = set()
        self._waits: dict[str, tuple[float, float]] = {}  # until when, and for how long, seconds
        # What cannot be removed, each with its inode and whether it is a folder: it is named once.
        self._immovable: dict[str, tuple[int, bool]] = {}

    # --- what becomes of them -----------------------------------------------------------------

    def begin(self, file: str) -> None:
        """Note that a command is being obeyed.

        Thread: loop.
        """
        self._under_way.add(file)

    def set_aside(self, file: str) -> None:
        """Note that what is left of a command waits for a disk, and so takes nobody's place.

        Thread: loop.
        """
        self._waits[file] = math.inf, 0.0
        self._under_way.discard(file)

    def wait(self, file: str, now: float) -> None:
        """Have a command read again in a while, each time a longer one.

        Thread: loop; scanner for what cannot be read.
        """
        seconds = min(2 * self._waits.get(file, (0.0, _FIRST_WAIT / 2))[1], _LONGEST_WAIT)
        self._waits[file] = now + seconds, seconds
        self._under_way.discard(file)

    def end(self, file: str) -> None:
        """Note that a command was obeyed.

        Thread: loop.
        """
        self._under_way.discard(file)
        self._waits.pop(file, None)

    def remove(self, file: str) -> None:
        """Remove a command that was carried out. If a crash comes first, it is carried out again.

        Thread: clerk; scanner for what is no command.
        """
        path = self._folder / file
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass  # somebody was faster
        except OSError as e:
            if e.errno not in (errno.EISDIR, errno.EPERM):
                raise
            status = os.lstat(path)
            self._immovable[file] = status.st_ino, stat.S_ISDIR(status.st_mode)

    def removed_if_fatal(self, file: str) -> AbstractContextManager[None]:
        """As the function of this name, for a command in this folder.

        Thread: any.
        """
        return removed_if_fatal(file, partial(self.remove, file))

    # --- reading them -------------------------------------------------------------------------

    def read(self, now: float) -> tuple[Command, ...]:
        """Return the commands whose turn has come. What is no command is answered and removed.

        One that the disk does not give waits, and the others are read.
        Raises OSError: the folder cannot be listed.

        Thread: scanner.
        """
        under_way = self._under_way.copy()
        found: list[Command] = []
        length = 0
        for entry in self._due(under_way, now):
            if len(found) + len(under_way) >= _AT_ONCE or length >= _BYTES_AT_ONCE:
                break
            try:
                with self.removed_if_fatal(entry.name):
                    data = _read(Path(entry.path))
                    length += len(data)
                    found.append(_parse(data, entry.name))
            except _NoCommand as e:
                self._refuse(entry.name, e, now)
            except FileNotFoundError:
                pass  # withdrawn
            except OSError as e:
                self._wait_for_disk(entry.name, e, now)
        return tuple(found)

    def _due(self, under_way: set[str], now: float) -> list[os.DirEntry[str]]:
        """List the commands that may be read now, in the order of their turns."""
        waits = self._waits.copy()
        listed = {
            entry.name: entry
            for entry in fs.entries(self._folder)
            if entry.name.endswith(".json") and not entry.name.startswith(".")
        }
        for name in waits.keys() - listed.keys():
            self._waits.pop(name, None)
        for name, what in list(self._immovable.items()):
            if name not in listed or what != _identity(listed[name]):
                del self._immovable[name]
        due = {name: waits.get(name, (-math.inf, 0.0))[0] for name in listed}
        turns = sorted((since, name) for name, since in due.items() if since <= now)
        skipped = under_way | self._immovable.keys()
        return [listed[name] for _, name in turns if name not in skipped]

    def _refuse(self, file: str, why: _NoCommand, now: float) -> None:
        """Remove a file that is no command, and say so."""
        try:
            self.remove(file)
        except OSError as e:
            self._wait_for_disk(file, e, now)
            return
        kind = {} if why.kind is None else {"command": why.kind}
        reason = f"{why}; {_EXPECTED}"
        log.get().warning("command.refused", file=names.printable(file), **kind, reason=reason)

    def _wait_for_disk(self, file: str, error: OSError, now: float) -> None:
        """Try a file again in a while; say so the first time."""
        if file not in self._waits:
            reason = f"{names.printable(str(self._folder / file))}: {error.strerror or error}"
            log.get().warning("disk.trouble", reason=reason)
        self.wait(file, now)


def _identity(entry: os.DirEntry[str]) -> tuple[int, bool]:
    return entry.inode(), entry.is_dir(follow_symlinks=False)


def _portions(targets: Iterable[str]) -> Iterator[list[str]]:
    """Split targets into portions that fit into a command each, in number and in bytes."""
    portion: list[str] = []
    length = 0
    for target in targets:
        size = len(json.dumps(target)) + 2
        if portion and (len(portion) == MOST_TARGETS or length + size > _LIMIT - 100):
            yield portion
            portion, length = [], 0
        portion.append(target)
        length += size
    if portion:
        yield portion


def _read(path: Path) -> bytes:
    """Read a file in the control folder; anybody of the group may write there.

    Raises _NoCommand: it is no file that we can read. OSError: the disk did not give it, so that nobody
    can tell what it is.
    """
    try:
        data, _ = untrusted.read_plain(path, _LIMIT)
    except (untrusted.NotPlain, PermissionError) as e:
        raise _NoCommand(e.strerror or str(e)) from None
    return data


def _parse(data: bytes, file: str) -> Command:
    """Return the command that a file holds. Raises _NoCommand: it holds none."""
    if len(data) > _LIMIT:
        raise _NoCommand(f"more than {_LIMIT} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise _NoCommand("not JSON") from None
    if not isinstance(document, dict):
        raise _NoCommand("no JSON object")
    kind, targets = document.get("command"), document.get("targets")
    said = names.printable(kind[:40]) if isinstance(kind, str) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _NoCommand(f"command={said or 'no text'}", said)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _NoCommand("targets is no list of texts", said)
    if len(targets) > MOST_TARGETS:
        raise _NoCommand(f"{len(targets)} targets", said)
    return _KINDS[kind](tuple(dict.fromkeys(targets)), file)
