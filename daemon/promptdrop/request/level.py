"""Read the fields of one mapping of a job file: the document itself or an entry of its `images`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from promptdrop import names, yaml12
from promptdrop.config import Config
from promptdrop.fields import FIELDS, IMAGE_FIELDS, INTEGERS, SIDES, TEXT_FIELDS, type_of
from promptdrop.request.decode import with_lf
from promptdrop.request.problems import Problems, short, show
from promptdrop.yaml12 import Mapping, Node, Scalar, Sequence

# Values that stand in for refused ones, so that the other fields are still checked.
_STAND_IN = {"prompt": "a", "prompts": ["a"]}


@dataclass(slots=True)
class Level:
    """The fields that a mapping gives, each within its range; `size` is replaced by width and height."""

    node: Mapping
    label: str  # "" or "images[3]."
    values: dict[str, Any]

    @property
    def known(self) -> Collection[str]:
        """The names of the fields that may stand here."""
        return IMAGE_FIELDS if self.label else FIELDS

    def line(self, name: str) -> int | None:
        """The line of the field, else the line where the mapping begins."""
        stands_for = "size" if name in ("width", "height") else name
        return self.node.line_of(name) or self.node.line_of(stands_for) or self.node.line

    def add(self, problems: Problems, name: str, message: str) -> None:
        """Note a problem with one of its fields."""
        problems.add(self.label + message, self.line(name), self.label + name)


def read_level(node: Mapping, label: str, config: Config, problems: Problems) -> Level:
    """Read the fields of a mapping; each wrong one adds to `problems`."""
    level = Level(node, label, {})
    known, validators = level.known, _validators()
    for (name, child), line in zip(node.items.items(), node.key_lines, strict=True):
        if name not in known:
            problems.add(_unknown(level, name), line or node.line, label + name[:60])
        elif (value := _value(name, child)) is None:
            continue
        elif name == "images":
            level.values[name] = _images(level, child, config, problems)
        elif (value := _valid(level, name, value, validators[name], problems)) is not None:
            level.values[name] = value
    if "size" in level.values:
        _resolve_size(level, config, problems)
    _limit_timeout(level, config, problems)
    return level


def too_many(limit: int) -> str:
    """Say that a job has more images than `limits.images_per_job`."""
    return f"more than {limit} images in one job (limits.images_per_job)"


@cache
def _validators() -> dict[str, Callable[[Any], Any]]:
    """Make a validator for each field; a joint one would take three times as long for a prompt."""
    strict = ConfigDict(strict=True)
    return {
        name: TypeAdapter(type_of(name), config=strict).validator.validate_python
        for name in FIELDS
        if name != "images"
    }


def _images(level: Level, node: Node, config: Config, problems: Problems) -> list[Node]:
    limit = config.limits.images_per_job
    if not isinstance(node, Sequence) or not node.items:
        message = f"images={show(node)} is not {FIELDS['images'].expected}"
    elif len(node.items) > limit:
        message = too_many(limit)
    else:
        return node.items
    problems.add(message, level.line("images"), "images")
    return []


def _unknown(level: Level, name: str) -> str:
    if name in FIELDS:
        return (
            f"{level.label}{name} can stand only at the top of the file, not in an entry of images"
        )
    hint = names.nearest(name[:60], level.known)
    return f"unknown field {short(level.label + name)}" + (
        hint or f"; expected any of {', '.join(level.known)}"
    )


def _value(name: str, node: Node) -> Any:
    """Return the value of a field before it is checked; None if it is not given.

    null and an empty value without quotes are not given, except that `prompt: null` is the text "null".
    """
    if isinstance(node, Scalar):
        return _scalar(name, node)
    if name == "images":
        return node
    if isinstance(node, Sequence) and (one := FIELDS[name].items):
        return [_item(one, item) for item in node.items]
    return yaml12.plain(node)


def _item(name: str, node: Node) -> Any:
    if not isinstance(node, Scalar):
        return yaml12.plain(node)
    return with_lf(node.text) if name == "prompt" else _scalar(name, node)


def _scalar(name: str, node: Scalar) -> Any:
    value = node.value
    if name in TEXT_FIELDS and (value is not None or (name == "prompt" and node.text)):
        return with_lf(node.text)
    if name in INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _valid(
    level: Level, name: str, value: Any, validate: Callable[[Any], Any], problems: Problems
) -> Any:
    """Return the checked value; if it is refused, report it and return a stand-in or None."""
    try:
        return validate(value)
    except (
        ValidationError
    ) as e:  # a union has one error for each of its types; that of the list says most
        errors = e.errors(include_url=False)
        _report(level, name, max(errors, key=lambda error: len(error["loc"])), problems)
        return _STAND_IN.get(name)


def _report(level: Level, name: str, error: ErrorDetails, problems: Problems) -> None:
    node = level.node.items[name]
    line = level.line(name)
    label = f"{level.label}{name}"
    index = error["loc"][-1] if error["loc"] else None
    if isinstance(index, int) and isinstance(node, Sequence):
        node = node.items[index]
        line = node.line or line
        label = f"{label}[{index}]"
        name = FIELDS[name].items or name
    expected = FIELDS[name].expected
    if error["type"] == "value_error":
        message = f"{label}={show(node)} {error['ctx']['error']}"
    elif error["type"] == "string_unicode":
        message = f"{label}={show(node)} contains half a surrogate pair; expected Unicode text"
    elif _is_quoted_number(name, node):
        message = f"{label}={show(node)} is text; write {expected}, without quotes"
    else:
        message = f"{label}={show(node)} is not {expected}{_hint(name, node, error)}"
    problems.add(message, line, label)


def _hint(name: str, node: Node, error: ErrorDetails) -> str:
    if not isinstance(node, Scalar):
        is_list = name == "prompt" and isinstance(node, Sequence)
        return "; write prompts: for a list" if is_list else ""
    if error["type"] == "string_too_long":
        return f"; it has {len(node.text):,}"
    if error["type"] == "literal_error":
        return names.nearest(node.text[:60], FIELDS[name].words)
    return ""


def _is_quoted_number(name: str, node: Node) -> bool:
    if name in TEXT_FIELDS or not isinstance(node, Scalar) or node.plain:
        return False
    value = Scalar(node.text, True, None).value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _limit_timeout(level: Level, config: Config, problems: Problems) -> None:
    """Refuse more than the administrator allows; his own timeouts, which are defaults, may be longer."""
    limit = config.limits.timeout_seconds
    if level.values.get("timeout_seconds", limit) > limit:
        asked = f"timeout_seconds={show(level.node.items['timeout_seconds'])}"
        expected = f"a number of seconds above 0, at most {limit:g} (limits.timeout_seconds)"
        level.add(problems, "timeout_seconds", f"{asked} is not {expected}")


def _resolve_size(level: Level, config: Config, problems: Problems) -> None:
    """Replace `size` by width and height."""
    size = level.values.pop("size")
    sides = config.sides(size)
    if not all(side in SIDES for side in sides):
        ratio = f" (it would be {sides[0]}x{sides[1]})" if ":" in size and all(sides) else ""
        expected = FIELDS["size"].expected
        level.add(problems, "size", f"size={short(size)} is not {expected}{ratio}")
        return
    for name, side in zip(("width", "height"), sides, strict=True):
        if (given := level.values.setdefault(name, side)) != side:
            message = f"size={short(size)} and {name}={given} disagree; give one of them"
            level.add(problems, name, message)
