"""Remember which bytes were taken from which folder, to refuse duplicates (inbox.duplicates: refuse)."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from promptdrop import fs, untrusted
from promptdrop.spool.ids import is_job_id
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.paths import Paths

_NOTE_MODE, _FOLDER_MODE = 0o600, 0o2700  # of the notes, which nobody but a daemon reads
_NOTE_BYTES = 64 * 1024  # SUB/FILE has at most 4,096 bytes, each of which JSON may write as six
KEPT_DAYS = 30  # how long a file is remembered


class Duplicates:
    """Remembers each file that was taken in a small note, named by the SHA-256 of folder and bytes.

    limit: bytes of a job file, limits.job_file_kib; larger files are not remembered.

    Thread: clerk.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def _read(self, path: Path) -> dict[str, Any]:
        """Return a note; empty if there is none, or none that can be believed."""
        note = self._paths.trust.read_json(path, _NOTE_BYTES)
        is_whole = all(isinstance(note.get(key), str) for key in ("id", "file"))
        return note if is_whole and is_job_id(note["id"]) else {}

    def find_or_remember(self, claimed: Unresolved, limit: int) -> str | None:
        """Return SUB/FILE of an earlier job with the same bytes; if there is none, note this one."""
        if (path := self._note_of(claimed, limit)) is None:
            return None
        known = self._read(path)
        if known and known["id"] != claimed.id:
            return str(known["file"])
        fs.make_directories(
            self._paths.cache, f"{self._paths.taken.name}/{path.parent.name}", _FOLDER_MODE
        )
        note = {"id": claimed.id, "file": claimed.path}
        fs.write_quickly(path, json.dumps(note).encode(), _NOTE_MODE)
        return None

    def forget(self, job: Job | Unresolved, limit: int) -> None:
        """Forget a job that did not end well, so that its file may be dropped again."""
        path = self._note_of(job, limit)
        if path and self._read(path).get("id") == job.id:
            fs.remove_file(path)

    def forget_old(self) -> None:
        """Forget what was taken more than KEPT_DAYS ago."""
        oldest = time.time() - KEPT_DAYS * 86400
        folders = fs.entries(self._paths.taken)
        for folder in (one for one in folders if one.is_dir(follow_symlinks=False)):
            for entry in fs.entries(Path(folder.path)):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    fs.remove_file(Path(entry.path))

    def _note_of(self, claimed: Job | Unresolved, limit: int) -> Path | None:
        """Return the path of the note on this drop; None if the drop cannot be read whole.

        It may have been moved already, swapped before its claim, or grown by a writer that held it.
        """
        try:
            data, _ = untrusted.read_plain(claimed.drop, limit)
        except (FileNotFoundError, untrusted.NotPlain):
            return None
        if len(data) > limit:
            return None
        digest = hashlib.sha256(os.fsencode(claimed.sub) + b"\0" + data).hexdigest()
        return self._paths.taken / digest[:2] / digest
