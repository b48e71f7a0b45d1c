"""The jobs' folders in the outbox, and which names there are taken.

Readers may take a job's folder away and put another in its place, at any time. So a folder is a job's
only if it says so, by the job's id, each time something is put there.
"""

import bisect
import errno
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from promptdrop import fs, names
from promptdrop.records import SIDECAR_BYTES, summary_bytes
from promptdrop.spool import record
from promptdrop.spool.job import Job
from promptdrop.spool.paths import REQUEST_STEM, RESERVED, SUMMARY, Paths
from promptdrop.spool.permissions import is_for_us, may_fill
from promptdrop.untrusted import NotPlain, below

_NAME_BYTES = names.NAME_BYTES + 10  # of a folder's name with its ~2, ~3 ...
_DOCUMENTS_READ = 8  # of a folder that may be somebody else's


class FolderLost(OSError):
    """A job's folder, or what was put there, was taken away. `Outbox.renew` gives the job a folder again."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.ENOENT, "was taken away, or is somebody else's by now", str(path))


class Taken:
    """The names in one folder of the outbox, compared without case: 8 bytes each, listed once.

    Names of ours are added as they are made, so that a claim costs the same however many there
    are. A folder that others make or remove later is noticed when its name is wanted.
    """

    def __init__(self, root: Path, sub: str) -> None:
        self._root, self._sub = root, sub
        self._hashes = array("q")
        self._list()

    def add(self, name: str) -> None:
        """Note a name that was made."""
        bisect.insort(self._hashes, hash(names.fold(name)))

    def real_name(self, name: str) -> str | None:
        """Return the existing name that equals `name` without case; None if it is free."""
        with below(self._root, self._sub) as folder:
            if fs.exists(folder / name):
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
        with below(self._root, self._sub) as folder:
            there = {names.fold(entry.name): entry.name for entry in fs.entries(folder)}
        self._hashes = array("q", sorted(map(hash, there)))
        return there


class Outbox:
    """Gives each job a folder of its own. A job's folder is live until the job has ended."""

    def __init__(self, paths: Paths) -> None:
        self._root = paths.outbox
        self._live: dict[str, str] = {}  # SUB/JOB of jobs that have not ended -> the job's id
        self._taken: dict[str, Taken] = {}  # by the folder below the outbox

    def hold(self, job: Job) -> None:
        """Keep the name of the job's folder taken, even while the folder is missing.

        A retried job whose name another has by now gets another folder.

        Thread: clerk.
        """
        if self._live.setdefault(job.folder, job.id) != job.id:
            self.choose_folder(job)

    def release(self, job: Job) -> None:
        """Let go of the folder of a job that has ended: readers may do with it what they like.

        Thread: clerk.
        """
        if self._live.get(job.folder) == job.id:
            del self._live[job.folder]

    @contextmanager
    def folder(self, job: Job) -> Iterator[Path]:
        """Yield a path of the job's folder, which holds while the context lasts, wherever it is moved.

        Raises FolderLost: it is gone, or somebody else's. OSError: nobody can tell now.

        Thread: any.
        """
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(below(self._root, job.folder))
                is_ours = self._is_of(job, folder)
            except (FileNotFoundError, NotPlain, PermissionError):
                is_ours = False
            if not is_ours:
                raise FolderLost(job.outbox_folder)
            yield folder

    @contextmanager
    def renewed_folder(self, job: Job) -> Iterator[Path]:
        """Do as `folder`, after `renew`.

        Thread: clerk.
        """
        self.renew(job)
        with self.folder(job) as folder:
            yield folder

    def renew(self, job: Job) -> None:
        """Give the job a folder, if it has none: under its name if that is free, else under another.

        Thread: clerk.
        """
        try:
            with self.folder(job):
                return
        except FolderLost:
            pass
        self.hold(job)
        try:
            is_made = self._make(job)
        except PermissionError:
            is_made = False
        if not is_made:
            self.choose_folder(job)

    def choose_folder(self, job: Job) -> None:
        """Record a free folder, then make it; if somebody was faster, try the next one.

        Thread: clerk.
        """
        self.release(job)
        mode = job.settings.folder_mode
        stem = names.split(job.file)[0]
        stem = names.safe(stem if _is_text(stem) else names.printable(stem))
        while True:
            mirror = self._mirror(job.sub, mode)
            name = self._first_free(mirror, stem)
            job.folder = os.path.join(mirror, name)
            record.write(job)
            self._names_in(mirror).add(name)
            if self._make(job):
                self.hold(job)
                return

    def remove_empty(self, job: Job) -> None:
        """Remove the folder of a job that is refused, if it is the job's and nothing was put there.

        Thread: clerk.
        """
        mirror, name = os.path.split(job.folder)
        with suppress(OSError):  # gone, or somebody put a file there: it stays
            with self.folder(job):
                pass
            with below(self._root, mirror) as outer:
                os.rmdir(outer / name)
        self.release(job)

    def _make(self, job: Job) -> bool:
        """Make the job's folder. Returns False if its name, or one above it, is taken meanwhile."""
        mirror, name = os.path.split(job.folder)
        mode = job.settings.folder_mode
        try:
            fs.make_directories(self._root, mirror, mode)
            with below(self._root, mirror) as outer:
                fs.make_directory(outer / name, mode)
                try:
                    fs.sync_directory(outer)
                    job.folder_identity = _identity(os.lstat(outer / name))
                except OSError:
                    fs.remove_empty_tree(outer / name)  # tried again, under the same name
                    raise
        except (FileExistsError, NotPlain):
            return False
        return True

    def _is_of(self, job: Job, folder: Path) -> bool:
        """Whether an open folder is this job's; it is read only if it is another than at the last call."""
        identity = _identity(os.stat(folder))
        if identity != job.folder_identity:
            if self._live.get(job.folder, job.id) != job.id or not self._says_so(job, folder):
                return False
            job.folder_identity = identity
        return True

    def _says_so(self, job: Job, folder: Path) -> bool:
        """Whether what lies in a folder is this job's; an empty one is, if we made it."""
        if not may_fill(folder):
            return False
        there = {e.name for e in fs.entries(folder) if not e.name.startswith(fs.TEMPORARY)}
        if not there:
            ours = (os.geteuid(), os.stat(self._root).st_uid)
            return os.stat(folder).st_uid in ours
        documents = sorted((n for n in there if n.endswith(".json")), key=lambda n: n != SUMMARY)
        for name in documents[:_DOCUMENTS_READ]:
            limit = summary_bytes(job.images) if name == SUMMARY else SIDECAR_BYTES
            if job_id := record.job_id_of(folder / name, limit):
                return job_id == job.id
        return any(name in there for name in _names_of(job))

    def _first_free(self, mirror: str, stem: str) -> str:
        """Return the first free name of `stem`, `stem~2`, `stem~3` ... in this outbox folder."""
        n = 1
        while True:
            name = names.numbered(stem, "", n, _NAME_BYTES)
            is_kept = names.fold(name) in RESERVED or os.path.join(mirror, name) in self._live
            if not (is_kept or self._names_in(mirror).real_name(name)):
                return name
            n += 1

    def _mirror(self, sub: str, mode: int) -> str:
        """Return the outbox folder of an inbox sub-folder, made if need be; never a job's folder.

        If we may not use a folder of that name, its jobs go to SUB~2, so that no other job waits.
        """
        folder = ""
        for part in filter(None, sub.split("/")):
            stem, n = names.safe(part), 1
            while True:
                name = names.numbered(stem, "", n, _NAME_BYTES)
                real = self._names_in(folder).real_name(name)
                existing = os.path.join(folder, real or name)
                is_reserved = names.fold(name) in RESERVED
                if not is_reserved and (real is None or self._may_mirror(existing)):
                    break
                n += 1
            if real is None:
                fs.make_directories(self._root, existing, mode)
                self._names_in(folder).add(name)
            folder = existing
        return folder

    def _may_mirror(self, existing: str) -> bool:
        """Whether a sub-folder's jobs may have their folders here."""
        outer, name = os.path.split(existing)
        with below(self._root, outer) as folder:
            if not is_for_us(folder / name):
                return False
            return existing not in self._live and not fs.exists(folder / name / SUMMARY)

    def _names_in(self, mirror: str) -> Taken:
        if mirror not in self._taken:
            self._taken[mirror] = Taken(self._root, mirror)
        return self._taken[mirror]


def _names_of(job: Job) -> Iterator[str]:
    """Yield the names that files in the job's folder may have by its records."""
    for state in job.states.values():
        if state.file:
            yield state.file
    yield from record.files_on_their_way(job)
    if not fs.exists(job.drop):
        yield REQUEST_STEM + names.split(job.file)[1].lower()


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_uid


def _is_text(name: str) -> bool:
    """Whether the name is valid UTF-8 on the disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
