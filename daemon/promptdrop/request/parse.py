"""Turn the bytes of a job file into a Request, or into all reasons why it is refused.

The bytes are decoded (decode.py), the reader of the format makes mappings of the text (text_reader.py,
data_readers.py), and the fields of each mapping are read and checked (level.py, promptdrop/fields.py);
here they become images. `parse` raises no other error than RequestError.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any

from promptdrop import names
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.fields import FIELDS, IMAGE_FIELDS, MAX_SEED, PRIORITIES
from promptdrop.nouns import ImageSpec, Request, seed_of
from promptdrop.request.data_readers import (
    csv_documents,
    json_document,
    jsonl_documents,
    yaml_documents,
)
from promptdrop.request.decode import decode, with_lf
from promptdrop.request.level import Level, read_level, too_many
from promptdrop.request.problems import Problems, short, show
from promptdrop.request.text_reader import text_documents
from promptdrop.yaml12 import Mapping, Node, Sequence

_ROW_FIELDS = (*IMAGE_FIELDS, "priority")  # the columns that a CSV file may have
_attributes = itemgetter(*ImageSpec._fields)  # the values of an image, from those of all fields


def parse(data: bytes, suffix: str, config: Config) -> Request:
    """Return the images that a job file asks for, every default filled in; seed: None if not given.

    suffix: `.txt`, `.YAML` ... as in names.JOB_SUFFIXES.
    Raises RequestError: it is refused, for up to 20 problems in the order of their lines.
    """
    if len(data) > config.limits.job_file_kib * 1024:
        raise RequestError(
            f"the file has {len(data)} bytes;"
            f" expected at most {config.limits.job_file_kib} KiB (limits.job_file_kib)"
        )
    text = with_lf(decode(data, config.inbox.encodings))
    if not text.strip():
        raise RequestError("the file is empty")
    problems = Problems()
    request = _resolve(_documents(text, suffix.lower(), problems), config, problems)
    problems.raise_if_any()
    if not request.images:
        raise RequestError("the file asks for no image; write a prompt into it")
    return request


def with_seeds(request: Request, job_id: str) -> Request:
    """Fill in the seeds that the job file does not give: they follow from the job's id."""
    images = (
        spec if spec.seed is not None else spec._replace(seed=seed_of(job_id, spec.image))
        for spec in request.images
    )
    return replace(request, images=tuple(images))


def _documents(text: str, suffix: str, problems: Problems) -> Iterable[Node]:
    if suffix in (".yaml", ".yml"):
        return yaml_documents(text)
    if suffix == ".json":
        return [json_document(text)]
    if suffix == ".jsonl":
        return jsonl_documents(text, problems)
    if suffix == ".csv":
        return csv_documents(text, problems, _ROW_FIELDS)
    if suffix in (".txt", ".prompt"):
        return text_documents(text, problems)
    raise RequestError(f"{short(suffix)} is not one of {', '.join(names.JOB_SUFFIXES)}")


def _resolve(documents: Iterable[Node], config: Config, problems: Problems) -> Request:
    images: list[ImageSpec] = []
    priorities: dict[int, int | None] = {}  # value -> the first line that gives it
    total = 0
    defaults = _defaults(config)
    for document in documents:
        if not isinstance(document, Mapping):
            problems.add(_not_a_mapping(document), document.line)
            continue
        top = read_level(document, "", config, problems)
        _read_priority(top, config, priorities, problems)
        for entry, values in _entries(top, defaults | top.values, config, problems):
            total += len(values["prompts"]) * max(len(values["seeds"]), values["count"])
            if total > config.limits.images_per_job:  # before any of them is made
                _refuse_as_too_many(entry, values, config, problems)
            if not problems:
                images.extend(_images(values, len(images)))
    return Request(tuple(images), next(iter(priorities), config.defaults.priority))


def _refuse_as_too_many(
    entry: Level, values: dict[str, Any], config: Config, problems: Problems
) -> None:
    name = "count" if values["count"] > 1 else "seed" if values["seeds"] else "prompts"
    value = f"count={values['count']}: " if name == "count" else ""
    entry.add(problems, name, value + too_many(config.limits.images_per_job))
    problems.raise_if_any()


def _not_a_mapping(node: Node) -> str:
    if isinstance(node, Sequence):
        return "expected a mapping, not a list; write `images:` (or `prompts:`) above the list"
    return f"expected a mapping such as `prompt: a cat`, not {show(node)}"


def _defaults(config: Config) -> dict[str, Any]:
    """Return the values of the fields that a job file does not give."""
    return {
        **{name: FIELDS[name].default for name in IMAGE_FIELDS},
        **config.defaults.model_dump(exclude={"priority"}),
        "format": config.output.format,
        "timeout_seconds": config.engine.image_timeout_seconds,
    }


def _entries(
    top: Level, base: dict[str, Any], config: Config, problems: Problems
) -> Iterator[tuple[Level, dict[str, Any]]]:
    """Read the entries of `images`, or the document itself if it has none, each with its values.

    The values of an entry win over those at the top, and these over `base`, the defaults.
    """
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
            message = f"{label}={show(node)} is not a mapping such as {{prompt: a cat}}"
            problems.add(message, node.line, label)
            continue
        entry = read_level(node, f"{label}.", config, problems)
        yield entry, _complete(top, entry, base | entry.values, config, problems)


def _read_priority(
    top: Level, config: Config, priorities: dict[int, int | None], problems: Problems
) -> None:
    priority = top.values.pop("priority", None)
    if priority is None:
        return
    line, limit = top.line("priority"), config.limits.priority
    if priority > limit:
        message = (
            f"priority={priority} is not an integer in [{PRIORITIES[0]}, {limit}] (limits.priority)"
        )
        top.add(problems, "priority", message)
    priorities.setdefault(priority, line)
    if len(priorities) == 2:
        (first, at), (second, _) = priorities.items()
        message = f"priority={second} but {first} on line {at}; a job has one priority"
        top.add(problems, "priority", message)
        del priorities[second]


def _complete(
    top: Level, entry: Level, values: dict[str, Any], config: Config, problems: Problems
) -> dict[str, Any]:
    """Add `prompts` and `seeds` as lists to the values of an entry; report contradictions."""
    if "prompts" not in values:
        prompt = values.get("prompt")
        values["prompts"] = [prompt]
        if prompt is None:
            entry.add(problems, "prompt", "prompt is required")
    seed = values.get("seed")
    values["seeds"] = seed if isinstance(seed, list) else [seed]
    if isinstance(seed, list) and "count" not in top.values and "count" not in entry.values:
        values["count"] = 1  # and not the default: one image per prompt and seed
    if contradiction := _contradiction(values, seed, config):
        name, message = contradiction
        (entry if name in entry.values else top).add(problems, name, message)
    return values


def _contradiction(
    values: dict[str, Any], seed: int | list[int] | None, config: Config
) -> tuple[str, str] | None:
    """Return field and message of a fault that only several fields together can have."""
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


def _images(values: dict[str, Any], before: int) -> Iterator[ImageSpec]:
    """Make the images of one entry in the order prompt, seed, count, numbered from `before` + 1."""
    number = before
    for prompt in values["prompts"]:
        for seed in values["seeds"]:
            for offset in range(values["count"]):
                number += 1
                values["image"], values["prompt"] = number, prompt
                values["seed"] = None if seed is None else seed + offset
                yield ImageSpec(*_attributes(values))
