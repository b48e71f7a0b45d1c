"""What a job file asks for: bytes to a frozen Request, or every reason why not.

The fields, their ranges and their words are written here, once; the readers of the formats are
request_text.py and request_data.py. Nothing but RequestError ever leaves `parse`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from promptdrop import names, yaml12
from promptdrop.config import SIZE, Config
from promptdrop.errors import Problem, RequestError
from promptdrop.nouns import FORMATS, SCHEDULERS, ImageSpec, Request, seed_of
from promptdrop.request.data_readers import (
    TEXT_FIELDS,
    Problems,
    csv_documents,
    json_document,
    jsonl_documents,
    short,
    yaml_documents,
)
from promptdrop.request.text_reader import text_documents
from promptdrop.yaml12 import Mapping, Node, Scalar, Sequence

MAX_SEED = 2**63 - 1
META_BYTES = 16 * 1024

EXPECTED = {
    "prompt": "text of 1 to 20,000 characters",
    "negative_prompt": "text of at most 20,000 characters",
    "width": "a multiple of 16 in [64, 4096]",
    "height": "a multiple of 16 in [64, 4096]",
    "size": "WxH such as 1024x768 (multiples of 16 in [64, 4096]) or an aspect ratio such as 16:9",
    "steps": "an integer in [1, 100]",
    "guidance_scale": "a number in [0, 20]",
    "seed": "an integer in [0, 2**63-1] or a list of them",
    "count": "an integer of at least 1",
    "scheduler": f"one of {', '.join(SCHEDULERS)}",
    "format": f"one of {', '.join(FORMATS)}",
    "timeout_seconds": "a number of seconds above 0, at most 86400",
    "meta": "a mapping of at most 16 KiB as JSON",
    "prompts": "a list of prompts",
    "images": "a list of mappings such as {prompt: a cat}",
    "priority": "an integer in [-100, 100]",
}

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BOMS_OF_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_STAND_IN = {"prompt": "a", "prompts": ["a"]}  # for a refused one: the rest is still checked


def _clean(text: str) -> str:
    if bad := _CONTROL.search(text):
        message = f"contains the control character {bad[0]!r}"
        raise ValueError(f"{message}; of these only line breaks and tabs are allowed")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; expected " + EXPECTED["prompt"])
    return _clean(text)


def _storable(meta: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(meta, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise ValueError("contains half a surrogate pair, which no UTF-8 file can hold") from None
    except ValueError:
        raise ValueError("contains a number that is not finite") from None
    if size > META_BYTES:
        raise ValueError(f"takes {size} bytes as JSON; expected at most {META_BYTES}")
    return meta


def _described(name: str, **limits: Any) -> Any:
    return Field(description=EXPECTED[name], **limits)


Prompt = Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(_not_blank)]
NegativePrompt = Annotated[str, Field(max_length=20_000), AfterValidator(_clean)]
Pixels = Annotated[int, Field(ge=64, le=4096, multiple_of=16)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Meta = Annotated[dict[str, Any], AfterValidator(_storable)]


class ImageFields(BaseModel):
    """The fields of one image, as an entry of `images` may give them; null is not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="image")

    prompt: Prompt | None = _described("prompt", default=None, examples=["a cat on a sofa"])
    negative_prompt: NegativePrompt | None = Field(
        default=None,
        description="text of at most 20,000 characters; used only when guidance_scale > 0",
        examples=["blurry"],
    )
    width: Pixels | None = Field(
        default=None, description=f"pixels, {EXPECTED['width']}", examples=[1024]
    )
    height: Pixels | None = Field(
        default=None, description=f"pixels, {EXPECTED['height']}", examples=[768]
    )
    size: Annotated[str, Field(pattern=SIZE)] | None = _described(
        "size", default=None, examples=["1024x768", "16:9"]
    )
    steps: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="transformer evaluations, 1 to 100", examples=[9]
    )
    guidance_scale: Annotated[float, Field(ge=0, le=20)] | None = _described(
        "guidance_scale", default=None, examples=[0.0]
    )
    seed: Seed | Annotated[list[Seed], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None,
        description="0 to 2**63-1, or a list (one image per prompt and seed; count then stays 1)",
        examples=[7, [1, 2, 3]],
    )
    count: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="images per prompt, taking seed, seed + 1, ...", examples=[4]
    )
    scheduler: Literal[SCHEDULERS] | None = _described(  # type: ignore[valid-type]  # one list, in job.py
        "scheduler", default=None, examples=["euler"]
    )
    format: Literal[FORMATS] | None = _described(  # type: ignore[valid-type]  # one list, in job.py
        "format", default=None, examples=["png"]
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = Field(
        default=None, description="per image: seconds above 0, at most 86400", examples=[60]
    )
    meta: Meta | None = Field(
        default=None,
        description="any mapping of at most 16 KiB as JSON, copied into the sidecars",
        examples=[{"client": "acme"}],
    )


class JobFields(ImageFields):
    """A job file: `prompt`, `prompts` or `images`; other fields at the top are for all images."""

    model_config = ConfigDict(
        title="promptdrop job file",
        json_schema_extra={
            "anyOf": [{"required": [name]} for name in ("prompt", "prompts", "images")],
            "examples": [
                {"prompt": "a cat on a sofa", "size": "16:9", "seed": 7},
                {"prompts": ["a cat", "a dog"], "count": 2},
                {"steps": 9, "images": [{"prompt": "a cat", "width": 768}, {"prompt": "a dog"}]},
            ],
        },
    )

    prompts: Annotated[list[Prompt], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="one image or more for each", examples=[["a cat", "a dog"]]
    )
    images: Annotated[list[ImageFields], Field(min_length=1)] | None = Field(
        default=None, description="one mapping for each; its fields win over those at the top"
    )
    priority: Annotated[int, Field(ge=-100, le=100)] | None = Field(
        default=None, description="-100 to limits.priority, higher first", examples=[10]
    )


INTEGERS = frozenset({"width", "height", "steps", "seed", "count", "priority"})
ROW_FIELDS = (*ImageFields.model_fields, "priority")  # what a row or a line may give


def request_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of job files in YAML, JSON and of each line of JSONL."""
    schema = JobFields.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def decode(data: bytes, encodings: Seq[str]) -> str:
    """The text of a job file without its BOM.

    UTF-8 first, UTF-16 only with a BOM, then `encodings` in their order.
    Raises RequestError: none of them fits, UTF-32, or NUL bytes.
    """
    if data.startswith(_BOMS_OF_UTF32):
        raise RequestError("the file is UTF-32; save it as UTF-8")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        candidates: tuple[str, ...] = ("utf-16",)
    else:
        candidates = ("utf-8-sig", *encodings)
    for encoding in candidates:
        try:
            text = data.decode(encoding)
        except ValueError:  # UnicodeDecodeError, and what odd codecs raise
            continue
        if "\0" not in text and not _SURROGATE.search(text):
            return text
    raise _undecodable(data, candidates)


def parse(data: bytes, suffix: str, config: Config) -> Request:
    """The images a job file asks for, every default filled in; seed None where none is named.

    suffix: `.txt`, `.YAML` ... as in names.JOB_SUFFIXES.
    Raises RequestError: with up to 20 problems, in the order of their lines.
    """
    if len(data) > config.limits.job_file_kib * 1024:
        raise RequestError(
            f"the file has {len(data)} bytes;"
            f" expected at most {config.limits.job_file_kib} KiB (limits.job_file_kib)"
        )
    text = _lines(decode(data, config.inbox.encodings))
    if not text.strip():
        raise RequestError("the file is empty")
    problems = Problems()
    request = _resolve(_documents(text, suffix.lower(), problems), config, problems)
    problems.raise_if_any()
    if not request.images:
        raise RequestError("the file asks for no image; write a prompt into it")
    return request


def with_seeds(request: Request, job_id: str) -> Request:
    """The request with the seeds filled in that its file leaves to the job's id."""
    images = (
        spec if spec.seed is not None else spec._replace(seed=seed_of(job_id, spec.image))
        for spec in request.images
    )
    return replace(request, images=tuple(images))


def _undecodable(data: bytes, candidates: tuple[str, ...]) -> RequestError:
    if candidates == ("utf-16",):
        return RequestError("the file begins like UTF-16 but is not; save it as UTF-8")
    if (nul := data.find(0)) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        return _refusal("a NUL byte: not text, or UTF-16 without a BOM; save it as UTF-8", line)
    try:
        data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        return _refusal(
            f"byte 0x{data[e.start]:02x} is not UTF-8;"
            " save the file as UTF-8, or name its encoding in inbox.encodings",
            line,
        )
    return RequestError("the file is not text; save it as UTF-8")


def _refusal(message: str, line: int) -> RequestError:
    return RequestError([Problem(message, line)])


def _documents(text: str, suffix: str, problems: Problems) -> Iterable[Node]:
    if suffix in (".yaml", ".yml"):
        return yaml_documents(text)
    if suffix == ".json":
        return [json_document(text)]
    if suffix == ".jsonl":
        return jsonl_documents(text, problems)
    if suffix == ".csv":
        return csv_documents(text, problems, ROW_FIELDS)
    if suffix in (".txt", ".prompt"):
        return text_documents(text, problems)
    raise RequestError(f"{short(suffix)} is not one of {', '.join(names.JOB_SUFFIXES)}")


@dataclass(slots=True)
class _Level:
    """A mapping of the file, read: the document itself, or an entry of its `images`."""

    node: Mapping
    label: str  # "" or "images[3]."
    values: dict[str, Any]

    def line(self, name: str) -> int | None:
        """Where the field stands, else where the mapping begins."""
        stands_for = "size" if name in ("width", "height") else name
        return self.node.line_of(name) or self.node.line_of(stands_for) or self.node.line

    def add(self, problems: Problems, name: str, message: str) -> None:
        """Note a problem with one of its fields."""
        problems.add(self.label + message, self.line(name), self.label + name)


def _resolve(documents: Iterable[Node], config: Config, problems: Problems) -> Request:
    images: list[ImageSpec] = []
    priorities: dict[int, int | None] = {}  # value -> the first line that gives it
    limit = config.limits.images_per_job
    total = 0
    defaults = _defaults(config)
    for document in documents:
        if not isinstance(document, Mapping):
            problems.add(_not_a_mapping(document), document.line)
            continue
        top = _read(document, "", JobFields, config, problems)
        _read_priority(top, config, priorities, problems)
        for entry, values in _entries(top, defaults | top.values, config, problems):
            asked = len(values["prompts"]) * max(len(values["seeds"]), values["count"])
            total += asked
            if total > limit:  # before anything is multiplied
                name = "count" if values["count"] > 1 else "seed" if values["seeds"] else "prompts"
                value = f"count={values['count']}: " if name == "count" else ""
                entry.add(problems, name, value + _too_many(limit))
                problems.raise_if_any()
            if problems:
                continue
            if asked == 1:  # as of 10,000 rows
                images.append(
                    _image(len(images) + 1, values["prompts"][0], values["seeds"][0], values)
                )
            else:
                images.extend(_expand(values, len(images)))
    return Request(tuple(images), next(iter(priorities), config.defaults.priority))


def _too_many(limit: int) -> str:
    return f"more than {limit} images in one job (limits.images_per_job)"


def _not_a_mapping(node: Node) -> str:
    if isinstance(node, Sequence):
        return "expected a mapping, not a list; write `images:` (or `prompts:`) above the list"
    return f"expected a mapping such as `prompt: a cat`, not {_show(node)}"


def _defaults(config: Config) -> dict[str, Any]:
    return {
        **config.defaults.model_dump(exclude={"priority"}),
        "format": config.output.format,
        "timeout_seconds": config.engine.image_timeout_seconds,
        "meta": {},
    }


def _entries(
    top: _Level, base: dict[str, Any], config: Config, problems: Problems
) -> Iterator[tuple[_Level, dict[str, Any]]]:
    """Each entry of `images` over the fields at the top, or the document itself, and its values."""
    if "prompts" in top.values:
        given = [name for name in ("prompt", "prompts", "images") if name in top.values]
        if len(given) > 1:
            top.add(problems, "prompts", f"{' and '.join(given)} cannot stand together; keep one")
    if "images" not in top.values:
        yield top, _complete(top, top, base, config, problems)
        return
    for index, node in enumerate(top.values.pop("images")):
        label = f"images[{index}]"
        if not isinstance(node, Mapping):
            message = f"{label}={_show(node)} is not a mapping such as {{prompt: a cat}}"
            problems.add(message, node.line, label)
            continue
        entry = _read(node, f"{label}.", ImageFields, config, problems)
        yield entry, _complete(top, entry, base | entry.values, config, problems)


def _read(
    node: Mapping, label: str, model: type[ImageFields], config: Config, problems: Problems
) -> _Level:
    """The fields a mapping gives, each within its range; `size` has become width and height."""
    level, known = _Level(node, label, {}), _validators(model)
    for (name, child), line in zip(node.items.items(), node.key_lines, strict=True):
        if name not in known:
            problems.add(_unknown(label, name, model), line or node.line, label + name[:60])
        elif (value := _value(name, child)) is None:
            continue
        elif name == "images":
            level.values[name] = _images(level, child, config, problems)
        elif (value := _valid(level, name, value, known[name], problems)) is not None:
            level.values[name] = value
    if "size" in level.values:
        _shape(level, config, problems)
    return level


def _images(level: _Level, node: Node, config: Config, problems: Problems) -> list[Node]:
    limit = config.limits.images_per_job
    if not isinstance(node, Sequence) or not node.items:
        message = f"images={_show(node)} is not {EXPECTED['images']}"
    elif len(node.items) > limit:
        message = _too_many(limit)
    else:
        return node.items
    problems.add(message, level.line("images"), "images")
    return []


def _unknown(label: str, name: str, model: type[ImageFields]) -> str:
    if name in JobFields.model_fields:
        return f"{label}{name} can stand only at the top of the file, not in an entry of images"
    hint = names.nearest(name[:60], model.model_fields)
    return f"unknown field {short(label + name)}" + (
        hint or f"; expected any of {', '.join(model.model_fields)}"
    )


def _value(name: str, node: Node) -> Any:
    """What a field's node says; None if it is not given.

    A prompt is any text but an empty one without quotes; other text fields may be null.
    """
    if isinstance(node, Scalar):
        return _scalar(name, node)
    if name == "images":
        return node
    if isinstance(node, Sequence) and name in ("seed", "prompts"):
        one = {"seed": "seed", "prompts": "prompt"}[name]
        return [_item(one, item) for item in node.items]
    return yaml12.plain(node)


def _item(name: str, node: Node) -> Any:
    if not isinstance(node, Scalar):
        return yaml12.plain(node)
    return _lines(node.text) if name == "prompt" else _scalar(name, node)


def _scalar(name: str, node: Scalar) -> Any:
    value = node.value
    if name in TEXT_FIELDS and (value is not None or (name == "prompt" and node.text)):
        return _lines(node.text)
    if name in INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _lines(text: str) -> str:
    """Line ends as LF: a CR in a prompt would be a token of its own."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _valid(
    level: _Level, name: str, value: Any, validate: Callable[[Any], object], problems: Problems
) -> Any:
    """The value; one that is out of range is reported, and a stand-in or None returned."""
    try:
        validate(value)
    except ValidationError as e:  # a union fails once for each of its members
        errors = e.errors(include_url=False)
        _report(level, name, max(errors, key=lambda error: len(error["loc"])), problems)
        return _STAND_IN.get(name)
    return value


@cache
def _validators(model: type[ImageFields]) -> dict[str, Callable[[Any], object]]:
    """One for each field: a whole model takes three times as long for one prompt."""
    strict = ConfigDict(strict=True)
    annotations: dict[str, Any] = {name: f.annotation for name, f in model.model_fields.items()}
    return {
        name: TypeAdapter(annotation, config=strict).validator.validate_python
        for name, annotation in annotations.items()
    }


def _report(level: _Level, name: str, error: ErrorDetails, problems: Problems) -> None:
    node = level.node.items[name]
    line = level.line(name)
    label = f"{level.label}{name}"
    index = error["loc"][-1] if error["loc"] else None
    if isinstance(index, int) and isinstance(node, Sequence):
        node = node.items[index]
        line = node.line or line
        label = f"{label}[{index}]"
        name = {"prompts": "prompt"}.get(name, name)
    if error["type"] == "value_error":
        message = f"{label}={_show(node)} {error['ctx']['error']}"
    elif error["type"] == "string_unicode":
        message = f"{label}={_show(node)} contains half a surrogate pair; expected Unicode text"
    elif _is_quoted_number(name, node):
        message = f"{label}={_show(node)} is text; write {EXPECTED[name]}, without quotes"
    else:
        message = f"{label}={_show(node)} is not {EXPECTED[name]}{_hint(name, node, error)}"
    problems.add(message, line, label)


def _hint(name: str, node: Node, error: ErrorDetails) -> str:
    if not isinstance(node, Scalar):
        is_list = name == "prompt" and isinstance(node, Sequence)
        return "; write prompts: for a list" if is_list else ""
    if error["type"] == "string_too_long":
        return f"; it has {len(node.text):,}"
    if error["type"] == "literal_error":
        return names.nearest(node.text[:60], {"scheduler": SCHEDULERS, "format": FORMATS}[name])
    return ""


def _is_quoted_number(name: str, node: Node) -> bool:
    if name in TEXT_FIELDS or not isinstance(node, Scalar) or node.plain:
        return False
    value = Scalar(node.text, True, None).value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(node: Node) -> str:
    """A value for a message: as written, quoted if it is text, cut to one line."""
    if isinstance(node, Mapping):
        return "{...}" if node.items else "{}"
    if isinstance(node, Sequence):
        return "[...]" if node.items else "[]"
    if node.plain and not isinstance(node.value, str):
        return node.text[:60] or "null"
    return short(node.text)


def _shape(level: _Level, config: Config, problems: Problems) -> None:
    """Put width and height in the place of `size`."""
    size = level.values.pop("size")
    sides = config.sides(size)
    if not all(64 <= side <= 4096 and side % 16 == 0 for side in sides):
        ratio = f" (it would be {sides[0]}x{sides[1]})" if ":" in size and all(sides) else ""
        level.add(problems, "size", f"size={short(size)} is not {EXPECTED['size']}{ratio}")
        return
    for name, side in zip(("width", "height"), sides, strict=True):
        if (given := level.values.setdefault(name, side)) != side:
            message = f"size={short(size)} and {name}={given} disagree; give one of them"
            level.add(problems, name, message)


def _read_priority(
    top: _Level, config: Config, priorities: dict[int, int | None], problems: Problems
) -> None:
    priority = top.values.pop("priority", None)
    if priority is None:
        return
    line, limit = top.line("priority"), config.limits.priority
    if priority > limit:
        message = f"priority={priority} is not an integer in [-100, {limit}] (limits.priority)"
        top.add(problems, "priority", message)
    priorities.setdefault(priority, line)
    if len(priorities) == 2:
        (first, at), (second, _) = priorities.items()
        message = f"priority={second} but {first} on line {at}; a job has one priority"
        top.add(problems, "priority", message)
        del priorities[second]


def _complete(
    top: _Level, entry: _Level, values: dict[str, Any], config: Config, problems: Problems
) -> dict[str, Any]:
    """`values`, the entry over the top over the defaults, with `prompts` and `seeds` as lists."""
    if "prompts" not in values:
        prompt = values.get("prompt")
        values["prompts"] = [prompt]
        if prompt is None:
            entry.add(problems, "prompt", "prompt is required")
    seed = values.get("seed")
    values["seeds"] = seed if isinstance(seed, list) else [seed]
    if isinstance(seed, list) and "count" not in {**top.values, **entry.values}:
        values["count"] = 1  # the default's: one image per prompt and seed
    if contradiction := _contradiction(values, seed, config):
        name, message = contradiction
        (entry if name in entry.values else top).add(problems, name, message)
    return values


def _contradiction(
    values: dict[str, Any], seed: int | list[int] | None, config: Config
) -> tuple[str, str] | None:
    """Field and message of what only the fields of an image together can get wrong."""
    width, height, count = values["width"], values["height"], values["count"]
    limit = config.limits.megapixels
    if width * height > limit * 1e6:
        made = f"width={width} and height={height} make {width * height / 1e6:.2f} megapixels"
        return "width", f"{made}; expected at most {limit:g} (limits.megapixels)"
    if isinstance(seed, list) and count > 1:
        return "count", f"count={count} with a list of seeds; count then stays 1"
    if isinstance(seed, int) and seed + count - 1 > MAX_SEED:
        return "seed", f"seed={seed} and count={count} go beyond 2**63-1"
    return None


def _expand(values: dict[str, Any], before: int) -> Iterator[ImageSpec]:
    """The images of one entry in the order prompt, seed, count."""
    number = before
    for prompt in values["prompts"]:
        for seed in values["seeds"]:
            for offset in range(values["count"]):
                number += 1
                yield _image(number, prompt, None if seed is None else seed + offset, values)


def _image(number: int, prompt: str, seed: int | None, values: dict[str, Any]) -> ImageSpec:
    return ImageSpec(
        number,
        prompt,
        values["negative_prompt"],
        values["width"],
        values["height"],
        values["steps"],
        float(values["guidance_scale"]),
        seed,
        values["scheduler"],
        values["format"],
        float(values["timeout_seconds"]),
        values["meta"],
    )
