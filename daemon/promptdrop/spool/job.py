"""A job in memory: one claimed file, and what has come of each image so far."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from promptdrop import names
from promptdrop.nouns import ImageSpec
from promptdrop.spool import detail
from promptdrop.spool.detail import ClaimedSettings, Detail, Settled
from promptdrop.spool.lanes import Lane, lane_of
from promptdrop.spool.paths import DROP, ImageRecord, Paths, State, dropped_path, image_record

CLOSED_IMAGES = 16  # a job of more images is never closed: reading it again would take too long
DEATHS_BEHIND = 3  # daemon deaths in a row after which an image goes behind all other work
DEATHS_FAILED = 10  # ... and after which it fails
_STEM_BYTES = 220  # of an image's file name, so that suffixes and temporaries still fit into 255


@dataclass(slots=True)
class ImageState:
    """The result of one image so far."""

    outcome: Literal["todo", "rendered", "placeholder", "failed"] = "todo"
    file: str | None = None  # its name in the job's outbox folder
    error: str | None = None
    attempts: int = 0  # charged to it
    deaths: int = 0  # in a row of the daemon, or losses of its hosts, with this image in hand


@dataclass(slots=True)
class Unresolved:
    """A claimed file whose request is not recorded yet, or torn."""

    id: str
    home: Path
    sub: str
    file: str
    inode: int

    @property
    def path(self) -> str:
        """SUB/FILE as dropped."""
        return dropped_path(self.sub, self.file)

    @property
    def shown(self) -> str:
        """SUB/FILE for people."""
        return names.printable(self.path)

    @property
    def drop(self) -> Path:
        """The dropped file, until the job ends."""
        return self.home / DROP / self.sub / self.file


@dataclass(slots=True)
class Job:
    """A claimed and resolved file.

    While it waits among many it is closed: its detail is on the disk only.
    """

    id: str
    paths: Paths
    place: State  # the state whose folder it lies in now
    sub: str  # folder below the inbox, as dropped; "" at the top
    file: str  # the dropped file's name
    inode: int
    owner: int  # uid of the dropped file
    folder: str  # SUB/JOB below the outbox
    priority: int
    images: int
    must_fit: bool  # a prompt that is too long refuses the whole file (prompt.overflow)
    detail_in_memory: Detail | None = None  # None while it is closed
    cancelled: bool = False
    # Of its outbox folder, as it was when it was last found to be the job's: spool/outbox.py.
    folder_identity: tuple[int, int, int] | None = field(default=None, compare=False)
    _states: dict[int, ImageState] | None = None

    @property
    def home(self) -> Path:
        """Its folder in the state folder."""
        return self.paths.home(self.place, self.id)

    def open(self) -> Detail:
        """Read the detail of a closed job, and keep it. Raises OSError.

        Thread: any.
        """
        if (found := self.detail_in_memory) is None:
            found = self.detail_in_memory = detail.read(self.home)
        return found

    def close(self) -> None:
        """Keep the detail on the disk only, unless it is large."""
        if self.images <= CLOSED_IMAGES:
            self.detail_in_memory = None

    @property
    def detail(self) -> Detail:
        """The large part of the job; of a closed one it is read from the disk. Raises OSError."""
        return self.open()

    @property
    def specs(self) -> tuple[ImageSpec, ...]:
        """Its images, as asked for: number 1 first."""
        return self.detail.specs

    @property
    def settings(self) -> ClaimedSettings:
        """The configuration it was claimed under."""
        return self.detail.settings

    @property
    def settled(self) -> Settled:
        """The moment at which the drop settled."""
        return self.detail.settled

    @property
    def claimed(self) -> str:
        """The timestamp of its claim."""
        return self.detail.claimed

    @property
    def states(self) -> dict[int, ImageState]:
        """The states of its images by number; one that is missing is plain todo."""
        if self._states is None:
            self._states = {}
        return self._states

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has come of any image."""
        return not self._states

    @property
    def name(self) -> str:
        """JOB: the name of its outbox folder, with ~2 and the like."""
        return self.folder.rpartition("/")[2]

    @property
    def outbox_folder(self) -> Path:
        """The folder in which its images are published."""
        return self.paths.outbox / self.folder

    @property
    def path(self) -> str:
        """SUB/FILE as dropped."""
        return dropped_path(self.sub, self.file)

    @property
    def shown(self) -> str:
        """SUB/FILE for people."""
        return names.printable(self.path)

    @property
    def lane(self) -> Lane:
        """Whose turn its images wait for."""
        return lane_of(self.owner, self.sub, self.file)

    @property
    def drop(self) -> Path:
        """The dropped file, until the job ends."""
        return self.home / DROP / self.sub / self.file

    def record_path(self, number: int, kind: ImageRecord) -> Path:
        """Return the path of a record of an image: begun, publishing, published or failed."""
        return image_record(self.home, number, kind)

    def state(self, number: int) -> ImageState:
        """Return the state of an image, to be changed in place."""
        return self.states.setdefault(number, ImageState())

    def todo(self) -> list[int]:
        """List the numbers of the images that are neither published nor given up."""
        numbers = range(1, self.images + 1)
        if self.is_fresh:
            return list(numbers)
        ended = {number for number, state in self.states.items() if state.outcome != "todo"}
        return [number for number in numbers if number not in ended]

    def deaths(self, number: int) -> int:
        """Count the deaths in a row of the daemon, or losses of its hosts, with this image in hand."""
        return 0 if self.is_fresh or number not in self.states else self.states[number].deaths

    def stem(self, spec: ImageSpec) -> str:
        """Return the file name of an image without its suffix, by `output.name`."""
        assert spec.seed is not None
        name = self.settings.output.name
        return names.cut(name.format(job=self.name, image=spec.image, seed=spec.seed), _STEM_BYTES)

    def unresolved(self) -> Unresolved:
        """Return the same claim, as if its request had not been recorded."""
        return Unresolved(self.id, self.home, self.sub, self.file, self.inode)
