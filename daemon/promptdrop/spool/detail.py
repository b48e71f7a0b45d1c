"""The large part of a job: its images as asked for, and its settings; and their form in request.json.

What is read back is held to the ranges of fields.py and config.py, so that a damaged record is found
when it is first read, not in the middle of its job.
"""

import errno
import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, create_model

from promptdrop.config import EngineSection, Output, Prompt, Seconds
from promptdrop.fields import FIELDS, type_of_one
from promptdrop.nouns import ImageSpec
from promptdrop.spool.paths import REQUEST
from promptdrop.trust import Trust, parse_json

# A million images (the most that limits.images_per_job takes) of 250 bytes, and the texts of a job file of
# 64 MiB (limits.job_file_kib), of which JSON's escapes make up to three times as much.
REQUEST_BYTES = 512 << 20
INVALID = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
)  # what `parse` raises
MAX_MONOTONIC = 1e12  # seconds; no machine runs so long
KNOWN_SETTINGS = 64  # configurations whose settings are kept for the next record
_LONG = ("prompt", "negative_prompt", "meta")  # fields of an image, recorded once for the whole job
_STRICT = ConfigDict(strict=True)  # a number that stands in quotation marks is none of ours


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
    def record_mode(self) -> int:
        """Permission bits of the job's records in the state folder."""
        return self.output.record_mode

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


_known_settings: dict[str, ClaimedSettings] = {}  # by the text of their part of request.json


def read(trust: Trust, home: Path) -> Detail:
    """Read the detail of the job in this folder, whose record was whole before. Raises OSError."""
    path = home / REQUEST
    try:
        return parse(parse_json(trust.read(path, REQUEST_BYTES)))
    except INVALID as e:
        reason = "damaged by now; the file is read again after a restart"
        raise OSError(errno.EIO, reason, str(path)) from e


def parse(record: dict[str, Any]) -> Detail:
    """Make a detail of request.json. Raises one of INVALID."""
    return Detail(record["claimed"], *parts_of(record))


def parts_of(record: dict[str, Any]) -> tuple[Settled, ClaimedSettings, tuple[ImageSpec, ...]]:
    """Make the parts of a detail of request.json.

    A field that we do not know is ignored, one that is missing has its default. Raises one of INVALID: a
    field without a default is missing, or has a value that we can never have recorded.
    """
    settled = record.get("settled", {})
    monotonic, boot = settled.get("monotonic", 0.0), settled.get("boot", "")
    if not (0 <= monotonic < MAX_MONOTONIC and isinstance(boot, str)):
        raise ValueError(f"settled: {settled!r}")
    if not isinstance(record["claimed"], str):
        raise TypeError(f"claimed: {record['claimed']!r}")
    return Settled(monotonic, boot), _settings_of(record["settings"]), _specs(record)


def _settings_of(record: dict[str, Any]) -> ClaimedSettings:
    """Make settings of their part of request.json; those of equal parts are one object."""
    text = repr(record)  # the jobs of one configuration have one text
    if (known := _known_settings.get(text)) is None:
        engine = EngineSection(max_attempts=record["max_attempts"], on_timeout=record["on_timeout"])
        known = ClaimedSettings(
            Prompt(**_known(record["prompt"], Prompt.model_fields)),
            Output(**_known(record["output"], Output.model_fields)),
            engine.max_attempts,
            engine.on_timeout,
        )
        if len(_known_settings) == KNOWN_SETTINGS:
            _known_settings.clear()
        _known_settings[text] = known
    return known


def _specs(record: dict[str, Any]) -> tuple[ImageSpec, ...]:
    """Make the specs of the images in request.json and of the texts of the whole job."""
    validate_images, validate_text = _validators()
    texts, known = record["texts"], {}
    if not isinstance(texts, list):
        raise TypeError(f"texts: {type(texts)}")
    specs = []
    for number, image in enumerate(validate_images(record["images"]), 1):
        values = vars(image)
        if values["image"] != number:
            raise ValueError(f"image {values['image']} stands in the place of image {number}")
        for name in _LONG:
            if (place := values[name]) is None:
                values[name] = {} if name == "meta" else None
                continue
            if (name, place) not in known:  # images may share a text
                known[name, place] = validate_text[name](texts[place])
            values[name] = known[name, place]
        specs.append(ImageSpec(**values))
    if not specs:
        raise ValueError("no images")
    return tuple(specs)


@functools.cache
def _validators() -> tuple[Callable[[Any], list[Any]], dict[str, Callable[[Any], Any]]]:
    """Return what validates the images in request.json, and what validates a text in each of its roles."""
    types = get_type_hints(ImageSpec)
    types |= {name: type_of_one(name) for name in types.keys() & FIELDS.keys()}
    types |= {
        "timeout_seconds": Seconds
    }  # that of `engine` may be longer than a job file may ask for
    place = Annotated[int, Field(ge=0)]  # of a text in `texts`
    fields: dict[str, Any] = {
        name: (types[name], ImageSpec._field_defaults.get(name, ...)) for name in ImageSpec._fields
    }
    fields |= {"prompt": (place, ...), "negative_prompt": (place | None, None)}
    fields |= {"meta": (place | None, None)}
    image: Any = create_model("RecordedImage", __config__=_STRICT, **fields)
    of_text = {"prompt": types["prompt"], "meta": types["meta"]}
    of_text["negative_prompt"] = types["negative_prompt"] | None
    return TypeAdapter(list[image]).validator.validate_python, {
        name: TypeAdapter(kind, config=_STRICT).validator.validate_python
        for name, kind in of_text.items()
    }


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
