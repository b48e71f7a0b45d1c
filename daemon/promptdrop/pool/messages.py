"""The whole protocol of the pipe between the daemon and its engine process.

A ticket is the daemon's number for one request; every answer carries it. Render is followed by a
file descriptor: the memory the pixels are written to, uint8 [height, width, 3].
"""

from dataclasses import dataclass
from typing import Any

from promptdrop.config import Config, Prompt
from promptdrop.nouns import EngineInfo, ImageSpec, Rendering

# daemon -> engine


@dataclass(frozen=True, slots=True)
class Render:
    """Render one image, once a Begin has followed; requests are worked off in order.

    An engine takes the first, and with it, up to `engine.batch`, what else waits with the same `kind`.
    Meanwhile it encodes the texts of those it takes next.
    """

    ticket: int
    spec: ImageSpec
    prompt: Prompt
    kind: tuple[Any, ...] | None  # None: alone, and no text encoded beside it
    empty_cache: bool  # afterwards


@dataclass(frozen=True, slots=True)
class Begin:
    """All that was to be sent now has been: the engine need not wait for more."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this image at its next step; one that has not begun is skipped."""

    ticket: int


@dataclass(frozen=True, slots=True)
class CountTokens:
    """How long are these prompts, templated?"""

    ticket: int
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the requests sent before."""


# engine -> daemon


@dataclass(frozen=True, slots=True)
class Stage:
    """Loading goes on: what is being done now."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Loaded and warm."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The engine process ends: it can neither load nor warm up."""

    error: str
    exit_status: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A relay has found the engine a host; its loading begins now."""

    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The last thing a relay says: the engine has ended, or its host is lost to us."""

    how: str
    is_lost: bool  # the host or the way there: no image's fault


@dataclass(frozen=True, slots=True)
class Began:
    """The engine works on this image now; its time runs."""

    ticket: int
    images: int  # that are rendered together, this one included


@dataclass(frozen=True, slots=True)
class Step:
    """One transformer evaluation is done of this image, and of all that were begun with it."""

    ticket: int
    step: int
    steps: int
    prepares: bool = False  # before the next one, the text of an image that waits is encoded


@dataclass(frozen=True, slots=True)
class Rendered:
    """The pixels stand in the memory that came with Render."""

    ticket: int
    rendering: Rendering


@dataclass(frozen=True, slots=True)
class Failed:
    """This image failed; the engine is still good."""

    ticket: int
    error: str
    timed_out: bool = False
    images: int = 1  # that were worked on; of several nobody knows whose fault it was


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The image was stopped or skipped as asked."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Answer to CountTokens."""

    ticket: int
    counts: tuple[int, ...]


Request = Render | Begin | Cancel | CountTokens | Stop
Answer = (
    Stage
    | Ready
    | CannotStart
    | Placed
    | Gone
    | Began
    | Step
    | Rendered
    | Failed
    | Cancelled
    | Tokens
)


# daemon -> gateway to a Ray cluster, one packet each

PACKET = 1 << 17  # bytes, the longest


@dataclass(frozen=True, slots=True)
class Open:
    """Bring up an engine at the other end of the descriptor that comes with this."""

    actor: str  # its name in the cluster: another daemon life finds it there
    settings: Config
    gpus: float
    outlives: bool  # the daemon and its gateway


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL an engine."""

    actor: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give devices back: end these actors and their engines."""

    actors: tuple[str, ...]


# gateway -> daemon


@dataclass(frozen=True, slots=True)
class Connected:
    """The cluster is there."""

    actors: tuple[str, ...]  # of this daemon, that it or its earlier lives have left there


@dataclass(frozen=True, slots=True)
class Beat:
    """The gateway does not hang: once a second."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why it is not there, or why it is lost."""

    reason: str
