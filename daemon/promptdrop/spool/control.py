"""Commands to the daemon: files in `.promptdrop/control`, which the spool's group may write.

`pause` is a flag that lasts; a command is a small JSON file that the daemon removes once it is done.
"""

import errno
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from promptdrop import fs, names, untrusted
from promptdrop.spool.paths import Paths

PAUSE = "pause"
_LIMIT = 1 << 20  # bytes of a command
_TARGETS = 100  # of one command: paths of 1,279 bytes, each of them escaped, still fit
_AT_ONCE = 100  # commands heeded at one look, however many there are


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


def send(folder: Path, command: Command) -> None:
    """Leave a command for the daemon: one file for each hundred targets, each in one step."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(command, kind))
    for n in range(0, len(command.targets), _TARGETS):
        document = json.dumps({"command": kind, "targets": command.targets[n : n + _TARGETS]})
        path = folder / f"{kind}-{secrets.token_hex(6)}.json"
        fs.write_once(path, document.encode(), 0o640)  # for the daemon, which is of the group


def pause(folder: Path) -> None:
    """Stop taking new images until `resume`, across restarts."""
    fs.write_durably(folder / PAUSE, b"", 0o640)


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


def read(folder: Path) -> tuple[Command, ...]:
    """Return the first commands in the folder; a file that is no command is removed.

    Raises OSError: the disk is in trouble. Every command stays.

    Thread: scanner.
    """
    commands: list[Command] = []
    for entry in sorted(fs.entries(folder), key=lambda entry: entry.name):
        if len(commands) == _AT_ONCE:
            break
        if entry.name.endswith(".json") and not entry.name.startswith("."):
            command = _parse(Path(entry.path))
            if command:
                commands.append(command)
            else:
                done(folder, entry.name)
    return tuple(commands)


def done(folder: Path, file: str) -> None:
    """Remove a command that was carried out. If a crash comes first, it is carried out again.

    Thread: clerk; scanner for what is no command.
    """
    try:
        os.unlink(folder / file)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.EISDIR, errno.EPERM):
            raise


def _parse(path: Path) -> Command | None:
    """Return the command in a file; None if it is none, since anybody in the group may write here.

    Raises OSError: the disk did not give the file, so that nobody can tell what it is.
    """
    try:
        data, _ = untrusted.read_plain(path, _LIMIT)
        document = json.loads(data)
        kind, targets = _KINDS[document["command"]], document["targets"]
    except (untrusted.NotPlain, FileNotFoundError, PermissionError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return None
    return kind(tuple(dict.fromkeys(targets)), path.name)
