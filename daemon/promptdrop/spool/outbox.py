"""The jobs' folders in the outbox, and which names there are taken.

Thread: clerk, all of it.
"""

import bisect
import os
from array import array
from pathlib import Path

from promptdrop import fs, names
from promptdrop.spool import record
from promptdrop.spool.job import Job
from promptdrop.spool.paths import STATUS, SUMMARY, Paths
from promptdrop.spool.permissions import is_for_us

_NAME_BYTES = names.NAME_BYTES + 10  # of a folder's name with its ~2, ~3 ...


class Taken:
    """The names in one folder of the outbox, compared without case: 8 bytes each, listed once.

    Names of ours are added as they are made, so that a claim costs the same however many there
    are. A folder that others make or remove later is noticed when its name is wanted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes = array("q")
        self._list()

    def add(self, name: str) -> None:
        """Note a name that was made."""
        bisect.insort(self._hashes, hash(names.fold(name)))

    def real_name(self, name: str) -> str | None:
        """Return the existing name that equals `name` without case; None if it is free."""
        if os.path.lexists(self._folder / name):
            return name
        if not self._knows(name):
            return None
        there = self._list()  # it exists in another case, or is gone meanwhile
        return there.get(names.fold(name))

    def _knows(self, name: str) -> bool:
        wanted = hash(names.fold(name))
        place = bisect.bisect_left(self._hashes, wanted)
        return place < len(self._hashes) and self._hashes[place] == wanted

    def _list(self) -> dict[str, str]:
        there = {names.fold(entry.name): entry.name for entry in fs.entries(self._folder)}
        self._hashes = array("q", sorted(map(hash, there)))
        return there


class Outbox:
    """Gives each job a folder of its own. A job's folder is live until the job has ended."""

    def __init__(self, paths: Paths) -> None:
        self._root = paths.outbox
        self._live: set[str] = set()  # SUB/JOB of jobs that have not ended
        self._taken: dict[Path, Taken] = {}

    def hold(self, job: Job) -> None:
        """Keep the name of the job's folder taken, even while the folder is missing."""
        self._live.add(job.folder)

    def release(self, job: Job) -> None:
        """Let go of the folder of a job that has ended: readers may do with it what they like."""
        self._live.discard(job.folder)

    def choose_folder(self, job: Job) -> None:
        """Record a free folder, then make it; if somebody was faster, try the next one."""
        mode = job.settings.folder_mode
        stem = names.split(job.file)[0]
        stem = names.safe(stem if _is_text(stem) else names.printable(stem))
        while True:
            mirror = self._mirror(job.sub, mode)
            name = self._first_free(mirror, stem)
            job.folder = str((mirror / name).relative_to(self._root))
            record.write(job)
            self._names_in(mirror).add(name)
            try:
                fs.make_directory(mirror / name, mode)
                fs.sync_directory(mirror)
            except FileExistsError:
                continue
            except OSError:
                fs.remove_empty_tree(mirror / name)  # tried again, under the same name
                raise
            self.hold(job)
            return

    def make_folder(self, job: Job) -> None:
        """Make the job's folder if it is gone: readers may take it away."""
        fs.make_directories(self._root, job.folder, job.settings.folder_mode)

    def recover_folder(self, job: Job, is_new: bool) -> None:
        """Hold the recorded folder again, and make it if a crash came before it was made.

        A fresh job's folder is made just after its record, so only that of a new one can be missing.
        """
        if job.is_fresh and not is_new and os.path.isdir(f"{self._root}/{job.folder}"):
            self.hold(job)
        else:
            self._adopt_folder(job)

    def _adopt_folder(self, job: Job) -> None:
        """Make the recorded folder again; if a stranger filled it before us, choose another."""
        has_records = any(entry.name[0].isdigit() for entry in fs.entries(job.home))
        if not has_records and self._is_strangers(job):
            self.choose_folder(job)
        if not fs.exists(job.outbox_folder):
            self.make_folder(job)
        self.hold(job)

    def _is_strangers(self, job: Job) -> bool:
        """Whether somebody else made the recorded folder. One that has the job's job.json is ours."""
        folder = job.outbox_folder
        if not fs.exists(folder):
            return False
        if not is_for_us(folder):
            return True
        filled = [e for e in fs.entries(folder) if not e.name.startswith(fs.TEMPORARY)]
        return bool(filled) and record.read_json(folder / SUMMARY).get("id") != job.id

    def _first_free(self, folder: Path, stem: str) -> str:
        """Return the first free name of `stem`, `stem~2`, `stem~3` ... in this outbox folder."""
        n = 1
        while True:
            name = names.numbered(stem, "", n, _NAME_BYTES)
            is_reserved = folder == self._root and names.fold(name) == STATUS
            if not (
                is_reserved
                or self._is_live(folder / name)
                or self._names_in(folder).real_name(name)
            ):
                return name
            n += 1

    def _mirror(self, sub: str, mode: int) -> Path:
        """Return the outbox folder of an inbox sub-folder, made if need be; never a job's folder.

        If we may not use a folder of that name, its jobs go to SUB~2, so that no other job waits.
        """
        folder = self._root
        for part in Path(sub).parts:
            stem, n = names.safe(part), 1
            while True:
                name = names.numbered(stem, "", n, _NAME_BYTES)
                real = self._names_in(folder).real_name(name)
                existing = folder / (real or name)
                if real is None or (is_for_us(existing) and not self._is_job_folder(existing)):
                    break
                n += 1
            if real is None:
                fs.make_directories(self._root, str(existing.relative_to(self._root)), mode)
                self._names_in(folder).add(name)
            folder = existing
        return folder

    def _names_in(self, folder: Path) -> Taken:
        if folder not in self._taken:
            self._taken[folder] = Taken(folder)
        return self._taken[folder]

    def _is_job_folder(self, folder: Path) -> bool:
        return fs.exists(folder / SUMMARY) or self._is_live(folder)

    def _is_live(self, folder: Path) -> bool:
        return str(folder.relative_to(self._root)) in self._live


def _is_text(name: str) -> bool:
    """Whether the name is valid UTF-8 on the disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
