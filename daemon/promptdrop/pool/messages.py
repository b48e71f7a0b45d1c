"""The protocols: of the pipe between daemon and engine process, and of the socket to the gateway.

A ticket is the daemon's number for one request; every answer to it carries the ticket. After a Render
comes a file descriptor: the memory for the pixels, uint8 [height, width, 3].
"""

from dataclasses import dataclass
from typing import Any

from promptdrop.config import Config, Prompt
from promptdrop.nouns import EngineInfo, ImageSpec, Rendering

# daemon -> engine


@dataclass(frozen=True, slots=True)
class Render:
    """Render one image, once a Begin has followed.

    An engine takes the first image that waits and renders others of its `kind` with it, at most
    `engine.batch` together. Meanwhile it encodes the texts of the next ones.
    """

    ticket: int
    spec: ImageSpec
    prompt: Prompt
    kind: tuple[Any, ...] | None  # None: render it alone, and encode no other text meanwhile
    empty_cache: bool  # give cached memory back afterwards


@dataclass(frozen=True, slots=True)
class Begin:
    """Begin to render: for now, no other image is sent that could join a batch."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this image at its next step; one that has not begun is skipped."""

    ticket: int


@dataclass(frozen=True, slots=True)
class CountTokens:
    """Count the tokens of these prompts, the template included."""

    ticket: int
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the requests that were sent before."""


# engine -> daemon


@dataclass(frozen=True, slots=True)
class Stage:
    """A sign of life while loading: what is being done now."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is loaded and warm."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The engine cannot load or warm up, and ends."""

    error: str
    exit_status: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A relay has found a host for the engine, which begins to load now."""

    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The last answer of a relay: the engine has ended, or its host is lost."""

    how: str
    is_lost: bool  # the host or the way there was lost: no image's fault


@dataclass(frozen=True, slots=True)
class Began:
    """The engine begins this image now; its timeout runs from here."""

    ticket: int
    images: int  # how many are rendered together, this one included


@dataclass(frozen=True, slots=True)
class Step:
    """One transformer evaluation is done, of this image and of all in its batch."""

    ticket: int
    step: int
    steps: int
    prepares: bool = False  # the text of an image that waits is encoded before the next step


@dataclass(frozen=True, slots=True)
class Rendered:
    """The image is rendered; its pixels are in the memory that came with Render."""

    ticket: int
    rendering: Rendering


@dataclass(frozen=True, slots=True)
class Failed:
    """This image failed; the engine is still good."""

    ticket: int
    error: str
    timed_out: bool = False
    images: int = 1  # how many were worked on; of several, nobody knows which one is at fault


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The image was stopped or skipped, as asked."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """The answer to CountTokens."""

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

PACKET = 1 << 17  # bytes of the longest packet


@dataclass(frozen=True, slots=True)
class Open:
    """Start an engine, and relay it over the socket that comes with this."""

    actor: str  # the name in the cluster by which the daemon's next life finds it
    settings: Config
    gpus: float
    outlives: bool  # it stays when the daemon and its gateway end


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to an engine."""

    actor: str


@dataclass(frozen=True, slots=True)
class Release:
    """End these actors and their engines, so that others can have their devices."""

    actors: tuple[str, ...]


# gateway -> daemon


@dataclass(frozen=True, slots=True)
class Connected:
    """The gateway is connected to the cluster."""

    actors: tuple[str, ...]  # the actors there that belong to this daemon, of earlier lives too


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life of the gateway, once a second."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The cluster cannot be reached, or was lost. The gateway ends."""

    reason: str
