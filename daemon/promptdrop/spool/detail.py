"""The large part of a job: its images as asked for, and its settings; and their form in request.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from promptdrop.config import Output, Prompt
from promptdrop.nouns import ImageSpec
from promptdrop.spool.paths import REQUEST

_LONG = ("prompt", "negative_prompt", "meta")  # fields of an image, recorded once for the whole job
# The fields that a record must have. All others have a default, also those that later versions add.
_NEEDED = frozenset(("id", "sub", "file", "folder", "claimed", "texts"))
_NEEDED_SETTINGS = frozenset(("prompt", "output", "max_attempts", "on_timeout"))
_NEEDED_OF_IMAGE = (
    frozenset(ImageSpec._fields) - frozenset(ImageSpec._field_defaults) - {"negative_prompt"}
)


@dataclass(frozen=True, slots=True)
class ClaimedSettings:
    """The part of the configuration that a job keeps from its claim to its end."""

    prompt: Prompt
    output: Output
    max_attempts: int
    on_timeout: str

    @property
    def file_mode(self) -> int:
        """Permission bits of the files of the job in the outbox."""
        return int(self.output.mode, 8)

    @property
    def folder_mode(self) -> int:
        """Permission bits of the folders of the job in the outbox."""
        return int(self.output.directory_mode, 8)


@dataclass(frozen=True, slots=True)
class Settled:
    """The moment at which a drop settled: seconds on the monotonic clock of one boot."""

    monotonic: float
    boot: str

    def milliseconds_to(self, monotonic: float, boot: str) -> float | None:
        """Return the milliseconds from then to a moment; None if the machine restarted in between."""
        return (monotonic - self.monotonic) * 1e3 if boot == self.boot else None


@dataclass(frozen=True, slots=True)
class Detail:
    """The large part of a job, needed only while it is worked on."""

    claimed: str  # timestamp
    settled: Settled
    settings: ClaimedSettings
    specs: tuple[ImageSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of request.json that `parse` reads."""
        texts = _Texts()
        images = [
            {**spec.to_json(), **{name: texts.index(getattr(spec, name)) for name in _LONG}}
            for spec in self.specs
        ]
        settings = self.settings
        return {
            "claimed": self.claimed,
            "settled": asdict(self.settled),
            "settings": {
                "prompt": settings.prompt.model_dump(),
                "output": settings.output.model_dump(),
                "max_attempts": settings.max_attempts,
                "on_timeout": settings.on_timeout,
            },
            "images": images,
            "texts": texts.known,
        }


def read(home: Path) -> Detail:
    """Read the detail of the job in this folder. Raises OSError."""
    return parse(json.loads((home / REQUEST).read_bytes()))


def require_whole(record: dict[str, Any]) -> None:
    """Raise LookupError, TypeError or ValueError if a field that has no default is missing.

    Called when a record is first read, since the detail of a job is parsed much later.
    """
    pieces = [(record, _NEEDED), (record["settings"], _NEEDED_SETTINGS)]
    pieces += [(image, _NEEDED_OF_IMAGE) for image in record["images"]]
    for piece, needed in pieces:
        if missing := needed - piece.keys():
            raise ValueError(f"{REQUEST} lacks {', '.join(sorted(missing))}")


def parse(record: dict[str, Any]) -> Detail:
    """Make a detail of a whole request.json. Fields that we do not know are ignored."""
    settings, settled, texts = record["settings"], record.get("settled", {}), record["texts"]
    return Detail(
        record["claimed"],
        Settled(settled.get("monotonic", 0.0), settled.get("boot", "")),
        ClaimedSettings(
            Prompt(**_known(settings["prompt"], Prompt.model_fields)),
            Output(**_known(settings["output"], Output.model_fields)),
            settings["max_attempts"],
            settings["on_timeout"],
        ),
        tuple(_spec(image, texts) for image in record["images"]),
    )


def _spec(image: dict[str, Any], texts: list[Any]) -> ImageSpec:
    """Make a spec of an image's part of request.json and the texts of the whole job."""
    known = _known(image, ImageSpec._fields)
    long = {name: texts[known[name]] for name in _LONG if name in known}
    return ImageSpec(**{"negative_prompt": None, **known, **long})


def _known(recorded: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return the part of a record that these fields name."""
    return {name: recorded[name] for name in fields if name in recorded}


class _Texts:
    """Collects each prompt and meta of a job once: 80 KB of prompt may be asked for 10,000 times."""

    def __init__(self) -> None:
        self.known: list[Any] = []
        self._places: dict[int, int] = {}  # by the id() of the object, which the images share

    def index(self, text: Any) -> int:
        """Return the place of a text in `known`, to which a new one is added."""
        if id(text) not in self._places:
            self._places[id(text)] = len(self.known)
            self.known.append(text)
        return self._places[id(text)]
