"""What a job asks for, image by image, under which configuration; and how request.json says it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from promptdrop.config import EngineSection, Output, Prompt
from promptdrop.nouns import ImageSpec
from promptdrop.spool.paths import REQUEST

_LONG = ("prompt", "negative_prompt", "meta")  # fields of an image, recorded once for the whole job
_BRIEF = tuple(name for name in ImageSpec._fields if name not in _LONG)
_ENGINE = EngineSection()  # its defaults, for records that lack them


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
    """When a drop settled: seconds on the monotonic clock of one boot."""

    monotonic: float
    boot: str

    def milliseconds_to(self, monotonic: float, boot: str) -> float | None:
        """How long after that a moment is; None if the machine restarted in between."""
        return (monotonic - self.monotonic) * 1e3 if boot == self.boot else None


@dataclass(frozen=True, slots=True)
class Detail:
    """The large part of a job, needed only while it is worked on."""

    claimed: str  # timestamp
    settled: Settled
    settings: ClaimedSettings
    specs: tuple[ImageSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields of request.json that `parse` reads."""
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
    """The detail of the job in this folder. Raises OSError."""
    return parse(json.loads((home / REQUEST).read_bytes()))


def parse(record: dict[str, Any]) -> Detail:
    """A detail from request.json. Fields that we do not know are ignored.

    A field that is missing has its default. Raises KeyError, TypeError, ValueError: it has none.
    """
    settings, settled, texts = record["settings"], record.get("settled", {}), record["texts"]
    return Detail(
        record["claimed"],
        Settled(settled.get("monotonic", 0.0), settled.get("boot", "")),
        ClaimedSettings(
            Prompt(**_known(Prompt, settings.get("prompt", {}))),
            Output(**_known(Output, settings.get("output", {}))),
            settings.get("max_attempts", _ENGINE.max_attempts),
            settings.get("on_timeout", _ENGINE.on_timeout),
        ),
        tuple(
            ImageSpec(
                **{name: spec[name] for name in _BRIEF if name in spec},
                **{name: texts[spec[name]] for name in _LONG if name in spec},
            )
            for spec in record["images"]
        ),
    )


def _known(section: type[BaseModel], fields: dict[str, Any]) -> dict[str, Any]:
    """Those fields that a section of the configuration has."""
    return {name: value for name, value in fields.items() if name in section.model_fields}


class _Texts:
    """Each prompt and meta of a job, once: 80 KB of prompt may be asked for 10,000 times."""

    def __init__(self) -> None:
        self.known: list[Any] = []
        self._places: dict[int, int] = {}  # by the id() of the object, which the images share

    def index(self, text: Any) -> int:
        """Its place in `known`."""
        if id(text) not in self._places:
            self._places[id(text)] = len(self.known)
            self.known.append(text)
        return self._places[id(text)]
