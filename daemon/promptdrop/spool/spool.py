"""The queue on disk. The directory is the state, every transition is one rename.

    inbox/SUB/FILE -> pending/ID/drop/SUB/FILE -> active/ID -> outbox, and finished/ID is removed
                                                            -> failed/SUB/FILE, parked/ID kept for retry

A job's folder holds the dropped file, its resolved request and one record per image, so a crash
anywhere leaves a folder that says what is left. Everything here may block on a disk and is called
off the daemon's loop; an OSError that escapes is trouble with a disk, never a job's fault.
"""

import bisect
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import socket
import stat
import sys
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from promptdrop import __version__, clock, fs, names
from promptdrop.config import Config, Output, Prompt
from promptdrop.errors import (
    ConfigError,
    DiskTrouble,
    Problem,
    PromptdropError,
    SpoolBusy,
    UsageError,
)
from promptdrop.nouns import ImageSpec, JobOutcome, Request
from promptdrop.records import (
    ErrorProblem,
    ErrorRecord,
    JobSummary,
    SummaryImage,
    SummaryTime,
    Totals,
    to_bytes,
)
from promptdrop.spool import control

VERSION = 1
STATES = ("pending", "active", "parked", "finished")
DEATHS_BEHIND = 3  # daemon deaths in a row after which an image goes behind all other work
DEATHS_FAILED = 10  # ... and after which it fails
HOST = socket.gethostname()
RECORD = "request.json"  # in a job's folder: what it asks for, resolved
_LOOKERS, _SLICE = 8, 128  # threads that read folders at start, and how many folders at a time
STATUS = "status.json"  # at the top of the outbox, for those who see nothing but the share
CLOSED_IMAGES = 16  # a job of more is never closed: reading it again would take too long
ADOPTED = 64  # newest jobs whose outbox folder is looked into after a crash; one is enough
TWIN_DAYS = 30  # how long inbox.duplicates: refuse remembers a file
_LOCK_TRIES = 10  # `status` holds the lock for microseconds when it looks who is there
_TREE_MODE = 0o2775  # inbox, outbox, failed and control: the whole group may write
_LONG = ("prompt", "negative_prompt", "meta")  # of an image, each recorded once for the job
_OWN_MODE = 0o2755  # what only the daemon writes
_NEVER = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)  # no cure of a disk makes such a path good
_CAP_FOWNER = 3  # linux/capability.h
_ID = re.compile(r"\d{8}T\d{12}-[0-9a-f]{6}\Z")  # what else lies among our folders is a stranger's


@dataclass(frozen=True, slots=True)
class Settings:
    """What a job keeps of the configuration it was claimed under."""

    prompt: Prompt
    output: Output
    max_attempts: int
    on_timeout: str


@dataclass(frozen=True, slots=True)
class Settled:
    """When a drop settled: on the monotonic clock of one boot."""

    monotonic: float
    boot: str

    def milliseconds_to(self, monotonic: float, boot: str) -> float | None:
        """How long ago that was; None if the machine restarted in between."""
        return (monotonic - self.monotonic) * 1e3 if boot == self.boot else None


@dataclass(slots=True)
class ImageState:
    """What came of one image so far."""

    outcome: Literal["todo", "rendered", "placeholder", "failed"] = "todo"
    file: str | None = None
    error: str | None = None
    attempts: int = 0
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Detail:
    """What of a job is needed only while it is worked on."""

    claimed: str
    settled: Settled
    settings: Settings
    specs: tuple[ImageSpec, ...]


@dataclass(slots=True)
class Job:
    """One claimed file. While it waits among many it is `closed`: its detail is on the disk only."""

    id: str
    own: Path  # the spool's own tree
    place: str  # pending, active, parked: where in it the job's folder stands now
    sub: str  # folder below the inbox, as dropped; "" at the root
    file: str  # the dropped file's name
    inode: int
    outbox: Path
    folder: str  # SUB/JOB below the outbox
    priority: int
    images: int
    must_fit: bool  # a prompt that is too long refuses the whole file (prompt.overflow)
    _detail: Detail | None
    _states: dict[int, ImageState] | None = None
    cancelled: bool = False

    @property
    def home(self) -> Path:
        """Its folder in the state tree."""
        return self.own / self.place / self.id

    @property
    def detail(self) -> Detail:
        """Read from the disk if need be. Raises OSError."""
        if self._detail is None:
            self._detail = _detail(json.loads((self.home / RECORD).read_bytes()))
        return self._detail

    def close(self) -> None:
        """Let go of what can be read again; a large job is kept, to be read off the loop only."""
        if self.images <= CLOSED_IMAGES:
            self._detail = None

    @property
    def specs(self) -> tuple[ImageSpec, ...]:
        """What each image is asked to be."""
        return self.detail.specs

    @property
    def settings(self) -> Settings:
        """The configuration it was claimed under."""
        return self.detail.settings

    @property
    def settled(self) -> Settled:
        """When the drop settled."""
        return self.detail.settled

    @property
    def claimed(self) -> str:
        """When it was claimed."""
        return self.detail.claimed

    @property
    def states(self) -> dict[int, ImageState]:
        """Only what is not plain todo."""
        if self._states is None:
            self._states = {}
        return self._states

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has come of any image."""
        return not self._states

    @property
    def name(self) -> str:
        """JOB: the name of its folder, suffix included."""
        return self.folder.rpartition("/")[2]

    @property
    def outbox_folder(self) -> Path:
        """Where its images are published."""
        return self.outbox / self.folder

    @property
    def path(self) -> str:
        """SUB/FILE as dropped."""
        return f"{self.sub}/{self.file}" if self.sub else self.file

    @property
    def drop(self) -> Path:
        """The dropped file while the job is ours."""
        return self.home / "drop" / self.sub / self.file

    def record_path(self, image: int, kind: str) -> Path:
        """The record of an image: begun, publishing, published or failed."""
        return self.home / f"{image:04d}.{kind}"

    def state(self, image: int) -> ImageState:
        """The state of an image, to be changed in place."""
        return self.states.setdefault(image, ImageState())

    def todo(self) -> list[int]:
        """Images that are neither published nor given up."""
        numbers = range(1, self.images + 1)
        if self.is_fresh:
            return list(numbers)
        ended = {image for image, state in self.states.items() if state.outcome != "todo"}
        return [image for image in numbers if image not in ended]

    def deaths(self, image: int) -> int:
        """Deaths in a row of the daemon, or losses of its hosts, with this image in hand."""
        return 0 if self.is_fresh or image not in self.states else self.states[image].deaths

    def stem(self, spec: ImageSpec) -> str:
        """The file name of an image without its suffix, by `output.name`."""
        assert spec.seed is not None
        return names.cut(
            self.settings.output.name.format(job=self.name, image=spec.image, seed=spec.seed), 220
        )


@dataclass(slots=True)
class Unresolved:
    """A claimed file whose request was not recorded before the daemon ended."""

    id: str
    home: Path
    sub: str
    file: str
    inode: int

    @property
    def path(self) -> str:
        """SUB/FILE as dropped."""
        return f"{self.sub}/{self.file}" if self.sub else self.file


class _Texts:
    """Each prompt and meta of a job, once: 80 KB of prompt may be asked for 10,000 times."""

    def __init__(self) -> None:
        self.known: list[Any] = []
        self._places: dict[int, int] = {}  # of the very object: the images share it

    def index(self, text: Any) -> int:
        """Where it stands in `known`."""
        if id(text) not in self._places:
            self._places[id(text)] = len(self.known)
            self.known.append(text)
        return self._places[id(text)]


class Taken:
    """The names in one folder of the outbox, compared without case: 8 bytes each, listed once.

    Names of ours are added as they are made, so that a claim costs the same however many there
    are. A folder that others make or take away later is seen when it is in the way.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes = array("q")
        self._list()

    def add(self, name: str) -> None:
        """A name was made."""
        bisect.insort(self._hashes, hash(names.fold(name)))

    def real_name(self, name: str) -> str | None:
        """What stands there under this name, perhaps in other letters; None: it is free."""
        if os.path.lexists(self._folder / name):
            return name
        if not self._knows(name):
            return None
        there = self._list()  # in another case, or gone meanwhile
        return there.get(names.fold(name))

    def _knows(self, name: str) -> bool:
        wanted = hash(names.fold(name))
        place = bisect.bisect_left(self._hashes, wanted)
        return place < len(self._hashes) and self._hashes[place] == wanted

    def _list(self) -> dict[str, str]:
        there = {names.fold(entry.name): entry.name for entry in fs.entries(self._folder)}
        self._hashes = array("q", sorted(map(hash, there)))
        return there


class Spool:
    """The folders of one configuration. `lock` first: one daemon per spool."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = config.spool
        self.inbox = self.root / "inbox"
        self.outbox = config.outbox
        self.failed = config.failed
        self.own = self.root / ".promptdrop"
        self.control = self.own / "control"
        self.cache = self.own / "cache"
        self._lock: int | None = None
        self._locked: tuple[int, int] | None = None  # device and inode of the lock we hold
        self._mark = f"{os.getpid()}\n{secrets.token_hex(8)}\n"  # what we write into it
        self._relocking = threading.Lock()
        self._mounts: list[str] = []  # which of inbox, outbox, failed have been mount points
        self._last_id = ""
        self._live: set[str] = set()  # outbox folders of jobs that have not ended
        self._taken: dict[Path, Taken] = {}
        self.boot = clock.boot_id()

    def why_paused(self) -> str | None:
        """How to go on, while nobody wants new images."""
        if control.is_paused(self.control):
            return "paused; go on with: promptdrop resume"
        if os.path.lexists(self.inbox / names.PAUSE):
            return f"paused by the file {names.PAUSE} in the inbox; delete it to go on"
        return None

    # --- the tree -----------------------------------------------------------------------------

    def init(self) -> None:
        """Make every folder, configured ones too. For `promptdrop init`."""
        _make(self.root, _OWN_MODE)
        for path in (self.outbox, self.failed):
            _make(path)
        self.prepare()

    def require_mount(self) -> None:
        """Raise PromptdropError: there is no spool yet, and its place in /etc/fstab is not mounted.

        An empty mount point would make a fine new spool, and hide the real one's jobs.
        """
        if not self.own.is_dir() and (place := fs.missing_mount(self.root)):
            raise PromptdropError(
                f"{self.root}: there is no spool here: {place} is in /etc/fstab and not mounted"
            )

    def prepare(self) -> None:
        """Make what `run` may make: never a configured outbox or failed.

        Raises ConfigError: the folders cannot work together, or a newer promptdrop wrote them.
        """
        self._refuse_nesting()
        _make(self.root, _OWN_MODE)  # nobody else may put another inbox or state in its place
        _make(self.inbox)
        for path in (self.own, self.cache, *(self.own / state for state in STATES)):
            _make(path, _OWN_MODE)
        _make(self.control)
        for path, configured in (
            (self.outbox, self.config.paths.outbox),
            (self.failed, self.config.paths.failed),
        ):
            if configured is None:
                _make(path)
        self._check_version()
        self._mounts = read_json(self.own / "mounts.json").get("mounts", [])
        self._check_file_systems()

    def lock(self) -> None:
        """Own the spool until this process ends. Raises SpoolBusy naming the other daemon."""
        fd = os.open(self.own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt == _LOCK_TRIES - 1:
                    owner = _owner(fd) or "unknown"
                    os.close(fd)
                    raise SpoolBusy(
                        f"{self.root}: another promptdrop daemon (pid {owner}) owns this spool"
                    ) from None
                time.sleep(0.05)
            else:
                break
        os.ftruncate(fd, 0)
        os.pwrite(fd, self._mark.encode(), 0)
        status = os.fstat(fd)
        old, self._lock, self._locked = self._lock, fd, (status.st_dev, status.st_ino)
        if old is not None:
            _close_quietly(old)

    def unlock(self) -> None:
        """Let the spool go."""
        if self._lock is not None:
            _close_quietly(self._lock)
            self._lock = None

    def daemon_pid(self) -> int | None:
        """The pid of the daemon that owns this spool, or None."""
        try:
            fd = os.open(self.own / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _owner(fd)
        else:
            return None
        finally:
            os.close(fd)

    def require_folders(self) -> None:
        """Raise DiskTrouble: a folder is missing; an empty mount point is not the folder."""
        self._require_state()
        for name, path in self._folders().items():
            if not path.is_dir():
                raise DiskTrouble(f"{name} {path} is missing; waiting for it")
            if name == "inbox" and path.stat().st_dev != self.own.stat().st_dev:
                raise DiskTrouble(
                    f"{name} {path}: another file system is mounted over it, and a claim is one"
                    f" rename; waiting until it is gone, or mounted on {self.root} instead"
                )
            mounted = os.path.ismount(path)
            if name in self._mounts and not mounted:
                raise DiskTrouble(
                    f"{name} {path} was a mount point and is not mounted; waiting for it"
                )
            if mounted and name not in self._mounts:
                self._mounts.append(name)
                fs.write_durably(
                    self.own / "mounts.json", json.dumps({"mounts": self._mounts}).encode()
                )

    def _require_state(self) -> None:
        """Raise DiskTrouble: .promptdrop is not the one we locked: a file system came or went.

        The same one, mounted anew, is locked anew: the old lock went with the old mount.
        Raises SpoolBusy: another daemon was faster.
        """
        if self._lock is None:
            return  # nothing is owned: `init`, `doctor`
        with self._relocking:
            try:
                status = os.stat(self.own / "lock")
            except FileNotFoundError:
                raise DiskTrouble(f"state {self.own} is missing; waiting for it") from None
            if (status.st_dev, status.st_ino) == self._locked:
                return
            if (self.own / "lock").read_text() != self._mark:
                raise DiskTrouble(f"state {self.own} is not the one we own; waiting for that one")
            self.lock()

    def require_space(self, min_free_mib: int) -> None:
        """Raise DiskTrouble: a folder is not to be written, or its disk is nearly full."""
        self.require_folders()
        self._share_folders()
        for name, path in {**self._folders(), "state": self.own}.items():
            if not os.access(path, os.W_OK | os.X_OK):
                raise DiskTrouble(f"{name} {describe_permissions(path)} cannot be written")
            if (free := fs.free_mib(path)) < min_free_mib:
                raise DiskTrouble(
                    f"{name} {path} has {free:.0f} MiB free, less than limits.min_free_disk_mib: {min_free_mib}"
                )

    def _share_folders(self) -> None:
        """Outbox and failed have the inbox's group, which all that is made below them inherits."""
        group = os.stat(self.inbox).st_gid
        for path in (self.outbox, self.failed):
            if os.stat(path).st_gid != group:
                try:
                    os.chown(path, -1, group)
                except OSError:
                    pass  # not ours to give, or a share that has no groups: doctor says so

    def _folders(self) -> dict[str, Path]:
        return {"inbox": self.inbox, "outbox": self.outbox, "failed": self.failed}

    def _refuse_nesting(self) -> None:
        for name, path in (("outbox", self.outbox), ("failed", self.failed)):
            for other, inside in (("inbox", self.inbox), (".promptdrop", self.own)):
                if path.resolve().is_relative_to(inside.resolve()):
                    raise ConfigError(
                        f"paths.{name}: {path} lies inside the {other} {inside}: what is written there would be taken as a job; choose a folder beside it"
                    )
                if inside.resolve().is_relative_to(path.resolve()):
                    raise ConfigError(
                        f"paths.{name}: {path} contains the {other} {inside}; choose a folder beside it"
                    )
        if self.outbox.resolve() == self.failed.resolve():
            raise ConfigError(f"paths.outbox and paths.failed are one folder: {self.outbox}")

    def _check_version(self) -> None:
        path = self.own / "version"
        try:
            found = int(path.read_text())
        except FileNotFoundError:
            fs.write_durably(path, f"{VERSION}\n".encode())
            return
        except ValueError:
            raise ConfigError(f"{path}: expected the number {VERSION}") from None
        if found > VERSION:
            raise ConfigError(
                f"{path}: this spool is of version {found}, written by a newer promptdrop; this one knows up to {VERSION}"
            )

    def _check_file_systems(self) -> None:
        if os.stat(self.inbox).st_dev != os.stat(self.own).st_dev:
            raise ConfigError(
                f"{self.inbox} and {self.own} are on different file systems; a claim is one rename, so mount the file system on {self.root} instead"
            )

    # --- claiming -----------------------------------------------------------------------------

    def claim(self, sub: str, file: str) -> Unresolved:
        """Take a file out of the inbox.

        Raises FileNotFoundError: it was withdrawn. NotPlain: a folder above it is a link by now.
        """
        job_id = self._new_id()
        home = self.own / "pending" / job_id
        folder = home / "drop" / sub
        os.makedirs(folder)
        source = self.inbox / sub / file
        try:
            with fs.below(self.inbox, sub) as inner:
                fs.rename(inner / file, folder / file)
                if stat.S_ISDIR(os.lstat(folder / file).st_mode):  # swapped in, and no file to move
                    fs.rename(folder / file, inner / file)
                    raise fs.NotPlain(errno.EISDIR, os.strerror(errno.EISDIR), str(source))
        except OSError:
            fs.remove_empty_tree(home)  # never the file, if it came after all
            raise
        self._take_marker(home, sub, file)
        between = [folder, *folder.parents]
        for path in (*between[: between.index(home.parent) + 1], source.parent):
            _sync_if_there(path)
        return Unresolved(job_id, home, sub, file, os.lstat(folder / file).st_ino)

    def _take_marker(self, home: Path, sub: str, file: str) -> None:
        """FILE.done goes with FILE: the next file of this name needs a marker of its own."""
        suffix = self.config.watch.ready_suffix
        if suffix and not fs.exists(self.inbox / sub / file):
            try:
                with fs.below(self.inbox, sub) as inner:
                    fs.rename(inner / f"{file}{suffix}", home / "ready")
            except OSError:
                pass  # gone, or claimed with it before a crash; the file itself is ours

    def twin(self, claimed: Unresolved) -> str | None:
        """SUB/FILE of a job taken before from the same folder with the same bytes; else remember these.

        A job that did not end well is forgotten: its file may come back.
        """
        if (path := self._memory_of(claimed)) is None:
            return None
        known = read_json(path)
        if known and known["id"] != claimed.id:
            return str(known["file"])
        fs.make_directories(path.parent, _OWN_MODE, below=self.own)
        note = {"id": claimed.id, "file": claimed.path}
        fs.write_quickly(path, json.dumps(note).encode())
        return None

    def _memory_of(self, claimed: "Job | Unresolved") -> Path | None:
        """None: moved already, swapped before its claim, or grown since by a writer that held it."""
        limit = self.config.limits.job_file_kib * 1024
        try:
            data, _ = fs.read_plain(claimed.home / "drop" / claimed.sub / claimed.file, limit)
        except (FileNotFoundError, fs.NotPlain):
            return None
        if len(data) > limit:
            return None
        digest = hashlib.sha256(os.fsencode(claimed.sub) + b"\0" + data).hexdigest()
        return self.cache / "taken" / digest[:2] / digest

    def _forget_bytes(self, job: "Job | Unresolved") -> None:
        path = self._memory_of(job)
        if path and read_json(path).get("id") == job.id:
            fs.remove_file(path)

    def _forget_old_bytes(self) -> None:
        oldest = time.time() - TWIN_DAYS * 86400
        for folder in fs.entries(self.cache / "taken"):
            for entry in fs.entries(Path(folder.path)):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    fs.remove_file(Path(entry.path))

    def resolve(
        self, claimed: Unresolved, request: Request, settled: Settled, settings: Settings
    ) -> Job:
        """Record what a claimed file asks for, seeds included, then make its outbox folder. Once in a job's life."""
        job = Job(
            claimed.id,
            self.own,
            claimed.home.parent.name,
            sys.intern(claimed.sub),
            claimed.file,
            claimed.inode,
            self.outbox,
            "",
            request.priority,
            len(request.images),
            settings.prompt.overflow == "refuse",
            Detail(clock.timestamp(), settled, settings, request.images),
        )
        self._choose_folder(job)
        return job

    def _choose_folder(self, job: Job) -> None:
        """Record a free folder, then mkdir it; if somebody was faster, the next one."""
        mode = int(job.settings.output.directory_mode, 8)
        stem = names.split(job.file)[0]
        stem = names.safe(names.printable(stem) if not _is_text(stem) else stem)
        while True:
            mirror = self._mirror(job.sub, mode)
            name = self._first_free(mirror, stem)
            job.folder = str((mirror / name).relative_to(self.outbox))
            self._record(job)
            self._names_in(mirror).add(name)
            try:
                fs.make_directory(mirror / name, mode)
                fs.sync_directory(mirror)
            except FileExistsError:
                continue
            except OSError:
                fs.remove_empty_tree(mirror / name)  # tried again, under the same name
                raise
            self._live.add(job.folder)
            return

    def _first_free(self, folder: Path, stem: str) -> str:
        """The first of `stem`, `stem~2`, `stem~3` ... that nobody has in this outbox folder."""
        n = 1
        while True:
            name = names.numbered(stem, "", n, names.NAME_BYTES + 10)
            is_reserved = folder == self.outbox and names.fold(name) == STATUS
            is_live = str((folder / name).relative_to(self.outbox)) in self._live
            if not (is_reserved or is_live or self._names_in(folder).real_name(name)):
                return name
            n += 1

    def _names_in(self, folder: Path) -> Taken:
        if folder not in self._taken:
            self._taken[folder] = Taken(folder)
        return self._taken[folder]

    def _mirror(self, sub: str, mode: int) -> Path:
        """The outbox folder of an inbox sub-folder, made if need be; never a job's folder.

        Nor one that somebody keeps to himself: his jobs go to SUB~2, and nobody else's wait.
        """
        folder = self.outbox
        for part in Path(sub).parts:
            stem, n = names.safe(part), 1
            while True:
                name = names.numbered(stem, "", n, names.NAME_BYTES + 10)
                real = self._names_in(folder).real_name(name)
                existing = folder / (real or name)
                if real is None or (_is_for_us(existing) and not self._is_job_folder(existing)):
                    break
                n += 1
            if real is None:
                fs.make_directories(existing, mode, below=folder)
                self._names_in(folder).add(name)
            folder = existing
        return folder

    def _is_job_folder(self, folder: Path) -> bool:
        return fs.exists(folder / "job.json") or str(folder.relative_to(self.outbox)) in self._live

    def _record(self, job: Job) -> None:
        texts = _Texts()
        images = [
            {**spec.to_json(), **{name: texts.index(getattr(spec, name)) for name in _LONG}}
            for spec in job.specs
        ]
        document = {
            "id": job.id,
            "sub": job.sub,
            "file": job.file,
            "inode": job.inode,
            "folder": job.folder,
            "priority": job.priority,
            "claimed": job.claimed,
            "settled": asdict(job.settled),
            "settings": {
                "prompt": job.settings.prompt.model_dump(),
                "output": job.settings.output.model_dump(),
                "max_attempts": job.settings.max_attempts,
                "on_timeout": job.settings.on_timeout,
            },
            "images": images,
            "texts": texts.known,
        }
        fs.write_durably(job.home / RECORD, json.dumps(document).encode())

    # --- one image ----------------------------------------------------------------------------

    def take(self, job: Job) -> None:
        """The job's first image is on its way: pending -> active."""
        assert job.detail  # read now, so that nothing later meets trouble on its way
        if job.place == "pending":
            fs.rename(job.home, self.own / "active" / job.id)
            job.place = "active"

    def begin_image(self, job: Job, image: int) -> None:
        """Count a daemon death in advance; whatever ends the image otherwise takes it back."""
        state = job.state(image)
        self._write_begun(job, image, state.attempts, state.deaths + 1)

    def end_attempt(self, job: Job, image: int) -> None:
        """The image was put down while the daemon lives: only charged attempts are remembered."""
        state = job.state(image)
        self._write_begun(job, image, state.attempts, state.deaths)

    def fail_image(self, job: Job, image: int, error: str) -> None:
        """Give an image up, durably."""
        fs.write_durably(job.record_path(image, "failed"), json.dumps({"error": error}).encode())
        fs.remove_file(job.record_path(image, "begun"))
        job.states[image] = ImageState("failed", None, error)

    def _write_begun(self, job: Job, image: int, attempts: int, deaths: int) -> None:
        path = job.record_path(image, "begun")
        if attempts or deaths:
            fs.write_quickly(path, json.dumps({"attempts": attempts, "deaths": deaths}).encode())
        else:
            fs.remove_file(path)

    # --- the end of a job ---------------------------------------------------------------------

    def cancel(self, job: Job) -> None:
        """Remember durably that nobody wants the rest of this job."""
        if fs.exists(job.home):
            fs.write_durably(job.home / "cancelled", b"")

    def take_cancel(self, path: str) -> None:
        """SUB/NAME.cancel has done its work; where it cannot be taken away, it names no job any more."""
        sub, _, file = path.rpartition("/")
        try:
            with fs.below(self.inbox, sub) as folder:
                fs.remove_file(folder / file)
        except (FileNotFoundError, PermissionError, fs.NotPlain):
            pass  # taken back, in a folder that is not ours to change, or swapped

    def finish(self, job: Job) -> JobOutcome:
        """Move the dropped file to its last place, write job.json, let the job go."""
        outcome = outcome_of(job)
        if outcome != "done":
            self._forget_bytes(job)
        if outcome == "done":
            self._ensure_folder(job)
            self._move_request(job)
        else:
            self._move_to_failed(job, _error_record(job, outcome))
        self._write_summary(job, outcome)
        self._leave(job.home, "finished" if outcome == "done" else "parked")
        self._live.discard(job.folder)
        return outcome

    def refuse(self, claimed: Unresolved, problems: Iterable[Problem]) -> ErrorRecord:
        """Move a file that is no job to failed/, with the reason."""
        listed = tuple(problems)
        record = ErrorRecord(
            file=names.printable(claimed.file),
            outcome="refused",
            error="; ".join(str(p) for p in listed),
            problems=[ErrorProblem(line=p.line, field=p.field, message=p.message) for p in listed],
            retry=_retry_command(claimed.sub, claimed.file),
            time=clock.timestamp(),
            host=HOST,
            version=f"promptdrop {__version__}",
        )
        self._move_to_failed(claimed, record)
        self._leave(claimed.home, "finished")
        return record

    def refuse_job(self, job: Job, problems: Iterable[Problem]) -> ErrorRecord:
        """Refuse a resolved job before its first image; its empty outbox folder goes."""
        claimed = Unresolved(job.id, job.home, job.sub, job.file, job.inode)
        self._forget_bytes(claimed)
        fs.remove_file(job.home / RECORD)
        try:
            os.rmdir(job.outbox_folder)
        except OSError:
            pass  # gone, or somebody put a file there: it stays
        self._live.discard(job.folder)
        return self.refuse(claimed, problems)

    def _ensure_folder(self, job: Job) -> Path:
        folder = self.outbox / job.folder
        fs.make_directories(folder, int(job.settings.output.directory_mode, 8), below=self.outbox)
        return folder

    def _move_request(self, job: Job) -> None:
        folder = self.outbox / job.folder
        suffix = names.split(job.file)[1].lower()
        n = 1
        self._share_drop(job.drop, folder)
        while fs.exists(job.drop):
            try:
                fs.move(job.drop, folder / names.numbered("request", suffix, n))
            except FileExistsError:
                n += 1

    def _share_drop(self, drop: Path, folder: Path) -> None:
        """A dropped file that is about to move to `folder` is for the whole group from then on."""
        # Of a file with other names its mode is not ours to change: those are somebody's own.
        if (status := _status_of(drop)) and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            fs.share(drop, self._mode, folder)

    @property
    def _mode(self) -> int:
        return int(self.config.output.mode, 8)

    def _make_folder_of(self, target: Path) -> None:
        mode = int(self.config.output.directory_mode, 8)
        fs.make_directories(target.parent, mode, below=self.failed)

    def _move_to_failed(self, job: Job | Unresolved, record: ErrorRecord) -> None:
        """Record the place in failed/, then move there, then say why beside it. Repeatable."""
        plan = job.home / "failing.json"
        drop = job.home / "drop" / job.sub / job.file
        planned = read_json(plan)
        if planned:
            target, record = (
                self.failed / planned["target"],
                ErrorRecord.model_validate(planned["record"]),
            )
        else:
            target = self._plan_failing(plan, job, record)
        while fs.exists(drop):
            self._make_folder_of(target)
            self._share_drop(drop, target.parent)
            try:
                fs.move(drop, target)
            except FileExistsError:
                target = self._plan_failing(plan, job, record)
        reason = _reason_file(target)
        if not fs.exists(reason):
            self._make_folder_of(target)
            fs.write_durably(reason, to_bytes(record), self._mode)

    def _plan_failing(self, plan: Path, job: Job | Unresolved, record: ErrorRecord) -> Path:
        stem, suffix = names.split(job.file)
        folder = self._failed_folder(job.sub)
        n = 1
        while True:
            name = names.numbered(stem, suffix, n, 255 - len(".error.json"))
            target = folder / name
            if not fs.exists(target) and not fs.exists(_reason_file(target)):
                break
            n += 1
        document = {
            "target": os.path.relpath(target, self.failed),
            "record": record.model_dump(mode="json"),
        }
        fs.write_durably(plan, json.dumps(document).encode())
        return target

    def _failed_folder(self, sub: str) -> Path:
        """failed/SUB; SUB~2 where a file has its name, or somebody keeps that folder to himself."""
        folder = self.failed
        for part in Path(sub).parts:
            n = 1
            while True:
                inner = folder / names.numbered(part, "", n)
                if not fs.exists(inner) or _is_for_us(inner):
                    break
                n += 1
            folder = inner
        return folder

    def _write_summary(self, job: Job, outcome: JobOutcome) -> None:
        folder = self._ensure_folder(job)
        fs.write_durably(
            folder / "job.json", to_bytes(summary(job, outcome)), int(job.settings.output.mode, 8)
        )

    def _leave(self, home: Path, state: str) -> None:
        target = self.own / state / home.name
        fs.rename(home, target)
        fs.sync_directory(target.parent)
        if state == "finished":
            fs.remove_tree(target)

    # --- retry --------------------------------------------------------------------------------

    def retry(self, target: str) -> Job | None:
        """Resume the job whose file is failed/`target`; None: it was refused, and is dropped anew.

        Raises UsageError: nothing there can be retried.
        """
        self._require_inside(target)
        if home := self._parked_home(target):
            return self._unpark(home)
        if not (self.failed / target).is_file():
            raise UsageError(f"{names.printable(target)}: no such file in {self.failed}")
        self._drop_again(target)
        return None

    def _require_inside(self, target: str) -> None:
        """Raises UsageError: nothing that could be in failed/. Anybody of the group says what is retried."""
        sub, _, file = target.rpartition("/")
        try:
            is_inside = bool(file) and ".." not in (file, *Path(sub).parts) and target[0] != "/"
            if is_inside and fs.exists(self.failed / sub):
                with fs.below(self.failed, sub) as folder:
                    status = _status_of(folder / file)
                is_inside = status is None or stat.S_ISREG(status.st_mode)
        except ValueError:  # NUL, or half a surrogate pair
            is_inside = False
        except OSError as e:
            if not isinstance(e, fs.NotPlain) and e.errno not in _NEVER:
                raise
            is_inside = False
        if not is_inside:
            raise UsageError(f"{names.printable(target[:300])}: no file in {self.failed}")

    def _parked_home(self, target: str) -> Path | None:
        known = str(read_json(_reason_file(self.failed / target)).get("id"))
        likely = [f"{self.own}/parked/{known}"] if _ID.match(known) else []
        # All of them only if its reason is gone, as in a retry that trouble with a disk cut short.
        for home in likely or self._homes("parked"):
            if read_json(f"{home}/failing.json").get("target") == target:
                return Path(home)
        return None

    def _unpark(self, home: Path) -> Job:
        job = self._load(home, [entry.name for entry in fs.entries(home)])
        plan = read_json(home / "failing.json")
        if plan and not fs.exists(job.drop):
            sub, _, file = plan["target"].rpartition("/")
            with fs.below(self.failed, sub) as folder:
                fs.move(folder / file, job.drop)
        for entry in fs.entries(home):
            image, _, kind = entry.name.partition(".")
            is_placeholder = (
                kind == "published" and read_json(Path(entry.path)).get("outcome") == "placeholder"
            )
            if image.isdecimal() and (kind in ("failed", "begun") or is_placeholder):
                os.unlink(entry.path)
        if plan:
            fs.remove_file(_reason_file(self.failed / plan["target"]))
        fs.remove_file(home / "cancelled")
        fs.remove_file(home / "failing.json")
        pending = self.own / "pending" / job.id
        fs.rename(home, pending)
        fs.sync_directory(pending.parent)
        self._live.add(job.folder)
        return self._load(pending, [entry.name for entry in fs.entries(pending)])

    def _drop_again(self, target: str) -> None:
        """A refused file goes back to the inbox. Its reason goes first: a crash repeats the command."""
        sub, _, file = target.rpartition("/")
        stem, suffix = names.split(file)
        fs.make_directories(self.inbox / sub, _TREE_MODE, below=self.inbox)
        with fs.below(self.failed, sub) as failed, fs.below(self.inbox, sub) as inbox:
            fs.remove_file(_reason_file(failed / file))
            n = 1
            while fs.exists(failed / file):
                name = names.numbered(stem, suffix, n)
                try:
                    fs.move(failed / file, inbox / name)
                except FileExistsError:
                    n += 1
                    continue
                if ready := self.config.watch.ready_suffix:
                    (inbox / f"{name}{ready}").touch()

    # --- after a crash ------------------------------------------------------------------------

    def recover(self) -> tuple[list[Job], list[Unresolved]]:
        """What was left: jobs to go on with, in the order they came, and claims to be read again.

        Half-made moves are completed here, half-published images by `publish.recover`.
        Repeatable. Raises OSError, DiskTrouble: a folder cannot be used now.
        """
        self.require_folders()
        self._forget_old_bytes()
        for home in self._homes("finished"):
            fs.remove_tree(Path(home))
        for home in self._homes("parked"):
            self._recover_parked(Path(home))
        jobs, unresolved = [], []
        homes = sorted(self._homes("pending", "active"), key=os.path.basename)
        for n, (home, found) in enumerate(zip(homes, self._look_into(homes), strict=True), 1):
            left = self._recover(Path(home), *found, is_new=n > len(homes) - ADOPTED)
            if isinstance(left, Job):
                jobs.append(left)
            elif left:
                unresolved.append(left)
        for folder in (self.own, self.control):
            fs.remove_temporaries(folder)
        for _, listed in fs.walk(self.failed):
            for entry in listed:
                if entry.name.startswith(fs.TEMPORARY) and entry.is_file(follow_symlinks=False):
                    _remove_if_ours(Path(entry.path))
        return jobs, unresolved

    def _look_into(self, homes: list[str]) -> Iterator[tuple[list[str], Job | None]]:
        """What each folder holds, and its job. Many at once: after a power cut all comes from the disk."""

        def look(some: list[str]) -> list[tuple[list[str], Job | None]]:
            found = []
            for home in some:
                listed = os.listdir(home)
                found.append((listed, self._load_if_whole(home, listed)))
            return found

        slices = [homes[n : n + _SLICE] for n in range(0, len(homes), _SLICE)]
        with ThreadPoolExecutor(_LOOKERS) as pool:
            for found in pool.map(look, slices):
                yield from found

    def _recover(
        self, home: Path, listed: list[str], job: Job | None, is_new: bool
    ) -> Job | Unresolved | None:
        if any(name.startswith(fs.TEMPORARY) for name in listed):
            fs.remove_temporaries(home)
        is_failing = "failing.json" in listed and bool(read_json(home / "failing.json"))
        if job:
            if not is_failing:
                self._recover_folder(job, is_new)
                job.close()
                return job
            fs.remove_temporaries(job.outbox_folder)
            self.finish(job)
            return None
        drop = next(fs.files(home / "drop"), None)
        if is_failing:
            claimed = _unresolved(home, drop or home / "drop" / "gone")
            self._move_to_failed(
                claimed, ErrorRecord.model_validate(read_json(home / "failing.json")["record"])
            )
            self._leave(home, "finished")
            return None
        if drop is None:
            fs.remove_tree(home)
            return None
        self._take_marker(home, _relative(drop.parent, home / "drop"), drop.name)
        return _unresolved(home, drop)

    def _recover_parked(self, home: Path) -> None:
        plan = read_json(home / "failing.json")
        if any(True for _ in fs.files(home / "drop")):
            self._unpark(home)  # a retry that had begun
        elif plan and not fs.exists(self.failed / plan["target"]):
            fs.remove_tree(home)  # somebody took the file back: it is a new job now

    def _recover_folder(self, job: Job, is_new: bool) -> None:
        """A fresh job's folder was made just after its record, so only a new one can be missing."""
        if job.is_fresh and not is_new and os.path.isdir(f"{job.outbox}/{job.folder}"):
            self._live.add(job.folder)
        else:
            self._adopt_folder(job)

    def _adopt_folder(self, job: Job) -> None:
        """Make the recorded folder again; if a stranger filled it before us, choose another."""
        folder = self.outbox / job.folder
        has_records = any(entry.name[0].isdigit() for entry in fs.entries(job.home))
        if not has_records and self._is_strangers(job, folder):
            self._choose_folder(job)
        if not fs.exists(folder):
            self._ensure_folder(job)
        self._live.add(job.folder)

    def _is_strangers(self, job: Job, folder: Path) -> bool:
        if not fs.exists(folder):
            return False
        if not _is_for_us(folder):
            return True
        filled = [e for e in fs.entries(folder) if not e.name.startswith(fs.TEMPORARY)]
        return bool(filled) and not self._is_ours(job, folder)

    def _is_ours(self, job: Job, folder: Path) -> bool:
        """Whether job.json there is this job's own, written just before the crash."""
        return read_json(folder / "job.json").get("id") == job.id

    def _load_if_whole(self, home: str, listed: list[str]) -> Job | None:
        """None: not recorded yet, or torn by a disk that lied about fsync: it is read again."""
        try:
            return self._load(home, listed) if RECORD in listed else None
        except (ValueError, KeyError):
            return None

    def _load(self, home: str | Path, listed: Iterable[str]) -> Job:
        record = json.loads(fs.read_whole(f"{home}/{RECORD}"))
        job = Job(
            record["id"],
            self.own,
            sys.intern(os.path.basename(os.path.dirname(home))),
            sys.intern(record["sub"]),
            record["file"],
            record["inode"],
            self.outbox,
            record["folder"],
            record["priority"],
            len(record["images"]),
            record["settings"]["prompt"]["overflow"] == "refuse",
            _detail(record) if len(record["images"]) > CLOSED_IMAGES else None,
        )
        for name in listed:
            image, _, kind = name.partition(".")
            job.cancelled |= name == "cancelled"
            if image.isdecimal():
                self._load_image(job, int(image), kind, read_json(f"{home}/{name}"))
        return job

    def _load_image(self, job: Job, image: int, kind: str, record: dict[str, Any]) -> None:
        state = job.state(image)
        if kind == "published" and record:
            state.outcome, state.file = record["outcome"], record["image"]["file"]
            state.error = record.get("error")
        elif kind == "failed":
            state.outcome, state.error = "failed", record.get("error")
        elif kind == "begun":
            state.attempts, state.deaths = record.get("attempts", 0), record.get("deaths", 1)

    def _homes(self, *states: str) -> Iterator[str]:
        """Paths of the jobs' folders; as text, for there may be a hundred thousand."""
        for state in states:
            for entry in fs.entries(self.own / state):
                if _ID.match(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield entry.path

    def _new_id(self) -> str:
        """Sorts by arrival, also when the wall clock was set back while we run."""
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        stamp = max(f"{moment}{time.time_ns() // 1000 % 1_000_000:06d}", self._last_id)
        if stamp == self._last_id:
            head, digits = stamp[:9], int(stamp[9:]) + 1
            stamp = f"{head}{digits:012d}"
        self._last_id = stamp
        return f"{stamp}-{secrets.token_hex(3)}"


def _detail(record: dict[str, Any]) -> Detail:
    settings = record["settings"]
    return Detail(
        record["claimed"],
        Settled(**record["settled"]),
        Settings(
            Prompt(**settings["prompt"]),
            Output(**settings["output"]),
            settings["max_attempts"],
            settings["on_timeout"],
        ),
        tuple(
            ImageSpec(**{**spec, **{name: record["texts"][spec[name]] for name in _LONG}})
            for spec in record["images"]
        ),
    )


def outcome_of(job: Job) -> JobOutcome:
    """done: every image rendered. failed: none. partial: some."""
    rendered = sum(state.outcome == "rendered" for state in job.states.values())
    if rendered == job.images:
        return "done"
    if job.cancelled:
        return "cancelled"
    return "partial" if rendered else "failed"


def summary(job: Job, outcome: JobOutcome) -> JobSummary:
    """job.json of a job at its end."""
    images = [_summary_image(job, spec) for spec in job.specs]
    counts = {
        kind: sum(image.outcome == kind for image in images) for kind in ("rendered", "cancelled")
    }
    lasted = job.settled.milliseconds_to(time.monotonic(), clock.boot_id())
    return JobSummary(
        id=job.id,
        name=job.name,
        file=names.printable(job.file),
        folder=job.folder,
        outcome=outcome,
        images=images,
        totals=Totals(
            images=len(images),
            rendered=counts["rendered"],
            cancelled=counts["cancelled"],
            failed=len(images) - counts["rendered"] - counts["cancelled"],
            seconds=None if lasted is None else round(lasted / 1e3, 3),
        ),
        time=SummaryTime(claimed=job.claimed, finished=clock.timestamp()),
        host=HOST,
        version=f"promptdrop {__version__}",
    )


def failures(failed: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file in failed/ that has a reason beside it: (path below failed/, its error record)."""
    found = (Path(entry.path) for _, listed in fs.walk(failed) for entry in listed)
    for reason in sorted(path for path in found if path.name.endswith(".error.json")):
        target = reason.with_name(reason.name.removesuffix(".error.json"))
        if target.is_file():
            yield _relative(target, failed), read_json(reason)


def describe_permissions(path: Path) -> str:
    """`/x (uid 1000, gid 1000, mode 0755; we are uid 990)`: what a permission error needs."""
    try:
        status = os.stat(path)
    except OSError as e:
        return f"{path} ({e.strerror})"
    return f"{path} (uid {status.st_uid}, gid {status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}; we are uid {os.geteuid()})"


def why_not_moved(folder: Path) -> str | None:
    """Why files of others cannot be moved out of an inbox folder by this process, and the cure."""
    status = os.stat(folder)
    described = describe_permissions(folder)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{described} is on a file system mounted read-only; mount it read-write"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{described} is read-only for us; give it to our group and: chmod g+rwx {folder}"
    is_sticky = status.st_mode & stat.S_ISVTX and os.geteuid() != status.st_uid
    if is_sticky and not _may_act_as_owner():
        return f"{described} is sticky: only the owner of a file may move it out; chmod -t {folder}"
    return None


def _may_act_as_owner() -> bool:
    """CAP_FOWNER, which root may have been left without: capabilities(7)."""
    with open("/proc/self/status", "rb") as lines:
        effective = next(line for line in lines if line.startswith(b"CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_FOWNER & 1)


def _summary_image(job: Job, spec: ImageSpec) -> SummaryImage:
    state = job.states.get(spec.image, ImageState())
    assert spec.seed is not None
    return SummaryImage(
        image=spec.image,
        file=state.file,
        seed=spec.seed,
        error=state.error,
        outcome="cancelled" if state.outcome == "todo" else state.outcome,
    )


def _error_record(job: Job, outcome: JobOutcome) -> ErrorRecord:
    assert outcome != "done"
    images = [_summary_image(job, spec) for spec in job.specs]
    missing = [image for image in images if image.outcome != "rendered"]
    reasons = [f"image {image.image}: {image.error}" for image in missing if image.error]
    return ErrorRecord(
        file=names.printable(job.file),
        outcome=outcome,
        error="; ".join(reasons[:10]) or "cancelled on request",
        id=job.id,
        folder=job.folder,
        missing=[image.image for image in missing],
        retry=f"promptdrop retry {job.id}",
        time=clock.timestamp(),
        host=HOST,
        version=f"promptdrop {__version__}",
    )


def _retry_command(sub: str, file: str) -> str:
    return f"promptdrop retry {shlex.quote(names.printable(f'{sub}/{file}' if sub else file))}"


def _reason_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.error.json")


def _owner(fd: int) -> int:
    """The pid in a lock file; 0: it cannot be read."""
    pid = os.pread(fd, 20, 0).decode("ascii", "replace").partition("\n")[0]
    return int(pid) if pid.isdecimal() else 0


def _close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # on a file system that has gone


def _unresolved(home: Path, drop: Path) -> Unresolved:
    inode = os.lstat(drop).st_ino if fs.exists(drop) else 0
    return Unresolved(home.name, home, _relative(drop.parent, home / "drop"), drop.name, inode)


def _make(path: Path, mode: int = _TREE_MODE) -> None:
    """mkdir -p of our own tree; new files inherit its group. Raises ConfigError."""
    try:
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            fs.make_directory(path, mode)
    except FileExistsError:
        if not path.is_dir():
            raise ConfigError(f"{path} exists and is not a folder") from None
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be made: {e.strerror}: {describe_permissions(path.parent)}"
        ) from None


def _is_for_us(path: Path) -> bool:
    """Whether it is a folder that we can list and fill. Raises OSError: nobody can tell now."""
    if not path.is_dir():
        return False
    is_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)  # nobody's will, but a disk's
    return is_read_only or os.access(path, os.R_OK | os.W_OK | os.X_OK)


def _status_of(path: Path) -> os.stat_result | None:
    """None: gone."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove_if_ours(path: Path) -> None:
    try:
        fs.remove_file(path)
    except PermissionError:
        pass  # in a folder where we may not


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _relative(path: Path, base: Path) -> str:
    relative = os.path.relpath(path, base)
    return "" if relative == "." else relative


def _sync_if_there(path: Path) -> None:
    try:
        fs.sync_directory(path)
    except OSError:
        pass  # the dropper's folder is gone, or the disk is sick: the file is ours all the same


def read_json(path: Path | str) -> dict[str, Any]:
    """A record of our own; one that is gone, torn or no regular file is empty."""
    try:
        loaded = json.loads(fs.read_plain(Path(path), None)[0])
    except (FileNotFoundError, NotADirectoryError, fs.NotPlain, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
