"""Every path and file name of the spool, spelled once.

ROOT/inbox/SUB/FILE                   dropped; with FILE.done where watch.ready_suffix asks for it
outbox/SUB/JOB/                       images, their sidecars, request.EXT, job.json
outbox/status.json                    for those who see nothing but the outbox
failed/SUB/FILE, FILE.error.json      refused or failed, with the reason
ROOT/.promptdrop/                     the state folder
    lock, version, mounts.json, status.json
    last-words                        the traceback of a daemon that a fatal signal ended
    control/                          commands; spool/control.py names the files
    cache/taken/                      files that were taken before (inbox.duplicates: refuse)
    cluster                           the prefix of actors' names; see cluster/backend.py
    pending/ID/  active/ID/  parked/ID/  finished/ID/
        drop/SUB/FILE                 the dropped file
        ready                         its FILE.done
        request.json                  what the job asks for
        cancelled                     there if the job was cancelled
        failing.json                  where in failed/ the file goes, and why
        NNNN.begun  NNNN.publishing  NNNN.published  NNNN.failed     of image NNNN
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from promptdrop import fs
from promptdrop.config import Config
from promptdrop.spool.ids import is_job_id
from promptdrop.trust import Trust

State = Literal["pending", "active", "parked", "finished"]
STATES: tuple[State, ...] = ("pending", "active", "parked", "finished")
IN_HAND: tuple[State, ...] = ("pending", "active")  # where jobs lie that have not ended
ImageRecord = Literal["begun", "publishing", "published", "failed"]
IMAGE_RECORDS: tuple[ImageRecord, ...] = ("begun", "publishing", "published", "failed")

DROP = "drop"
READY = "ready"
REQUEST = "request.json"
CANCELLED = "cancelled"
FAILING = "failing.json"
SUMMARY = "job.json"
STATUS = "status.json"
REQUEST_STEM = "request"  # request.EXT in a job's outbox folder: the dropped file
RESERVED = frozenset((SUMMARY, STATUS, "index.html"))  # no job's or mirrored folder's name
_DIGITS = 10  # more than the number of any image has
SUB_BYTES = (
    1024  # of the longest path that is entered below the inbox: it must fit below our folders, too
)
REASON = ".error.json"  # appended to the name of a file in failed/


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders of the spool of one configuration."""

    root: Path
    inbox: Path
    outbox: Path
    failed: Path
    state: Path
    cache: Path
    trust: Trust = field(compare=False)  # which of what lies below `state` is ours

    @classmethod
    def of(cls, config: Config) -> "Paths":
        """Return the absolute paths of a configuration."""
        root = config.spool
        return cls(
            root,
            root / "inbox",
            config.outbox,
            config.failed,
            config.state,
            config.cache,
            trust=Trust(config.state),
        )

    @property
    def lock(self) -> Path:
        """The file that the daemon locks with flock(2); it holds the daemon's pid."""
        return self.state / "lock"

    @property
    def last_words(self) -> Path:
        """The file for the traceback of a daemon that a fatal signal ends; the next start logs it."""
        return self.state / "last-words"

    @property
    def version(self) -> Path:
        """The file with the version of the state folder's format."""
        return self.state / "version"

    @property
    def mounts(self) -> Path:
        """The record of which of inbox, outbox and failed have been mount points."""
        return self.state / "mounts.json"

    @property
    def status(self) -> Path:
        """The daemon's status, for its commands."""
        return self.state / STATUS

    @property
    def shared_status(self) -> Path:
        """The copy of the daemon's status in the outbox."""
        return self.outbox / STATUS

    @property
    def control(self) -> Path:
        """The folder of commands, which the spool's group may write."""
        return self.state / "control"

    @property
    def taken(self) -> Path:
        """The folder of the SHA-256 sums of files that were taken before."""
        return self.cache / "taken"

    def of_state(self, state: State) -> Path:
        """Return the folder of the jobs in this state."""
        return self.state / state

    def home(self, state: State, job_id: str) -> Path:
        """Return the folder of a job in this state."""
        return self.state / state / job_id

    def is_in_hand(self, job_id: str) -> bool:
        """Whether a job of this id was claimed and has not ended. Raises OSError: nobody can tell.

        Thread: clerk.
        """
        return any(fs.exists(self.home(state, job_id)) for state in ("pending", "active"))

    def homes(self, *states: State) -> Iterator[str]:
        """Yield the folders of all jobs in these states; as text, since there may be a hundred thousand.

        Anything else among them is not ours and left out. Raises OSError: a state cannot be listed.
        """
        for state in states:
            for entry in fs.entries(self.of_state(state)):
                if is_job_id(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield entry.path


def state_of(home: Path | str) -> State:
    """Return the state whose folder a job's folder lies in."""
    name = os.path.basename(os.path.dirname(home))
    return next(state for state in STATES if state == name)


def dropped_path(sub: str, file: str) -> str:
    """Return SUB/FILE, or FILE at the top of the inbox."""
    return f"{sub}/{file}" if sub else file


def reason_file(target: Path) -> Path:
    """Return the path of the error record beside a file in failed/."""
    return target.with_name(target.name + REASON)


def image_record(home: Path, number: int, kind: ImageRecord) -> Path:
    """Return the path of a record of an image in its job's folder."""
    return home / f"{number:04d}.{kind}"


def parse_image_record(name: str) -> tuple[int, ImageRecord] | None:
    """Split a record's file name into (number, kind); None for any other name in a job's folder."""
    digits, _, ending = name.partition(".")
    kind = next((kind for kind in IMAGE_RECORDS if kind == ending), None)
    if kind is None or not (digits.isascii() and digits.isdecimal() and len(digits) < _DIGITS):
        return None
    return (int(digits), kind) if f"{int(digits):04d}" == digits else None
