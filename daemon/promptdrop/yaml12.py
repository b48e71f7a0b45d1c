"""Read YAML 1.2 with its core schema, within limits, since anybody may have written it.

PyYAML's parser gives events; the tree is built here. So every value has its line and its text as
written, and nothing recurses or expands (an alias bomb of 414 bytes, 25,000 opening brackets).
https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 16
MAX_NODES = 250_000  # 10,000 images with a dozen fields each

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the wheel has C; a source build may not
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+\Z")
_RADIX = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_MAX_DIGITS = 400  # no field takes a longer number; int() refuses more than 4,300 digits

Plain = bool | int | float | str | None


_NODES = (yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent, yaml.AliasEvent)
_ENDS = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


class YamlError(Exception):
    """The text is no YAML that is accepted here. `line` counts from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True)
class Scalar:
    """One value. `text` is as written; `plain` is False if it was quoted or a block."""

    text: str
    plain: bool
    line: int | None

    @property
    def value(self) -> Plain:
        """The value that the text has by the core schema."""
        return _resolve(self.text) if self.plain else self.text


@dataclass(slots=True)
class Sequence:
    """A list of nodes."""

    items: list["Node"] = field(default_factory=list)
    line: int | None = None


@dataclass(slots=True)
class Mapping:
    """Keys as written, in order, with their values; `key_lines` has the line of each key."""

    items: dict[str, "Node"] = field(default_factory=dict)
    line: int | None = None
    key_lines: list[int | None] = field(default_factory=list)

    def line_of(self, key: str) -> int | None:
        """Return the line of a key; None if the key or its line is missing."""
        return dict(zip(self.items, self.key_lines, strict=False)).get(key)


Node = Scalar | Sequence | Mapping


def documents(text: str) -> list[Node]:
    """Parse every document of `text`; an empty document is a null Scalar.

    Raises YamlError: it is not YAML, has anchors, aliases, tags, duplicate keys or keys that are no
    single value, is nested deeper than 16 or has more than 250,000 values.
    """
    try:
        return list(_build(yaml.parse(text, Loader=_Loader)))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = mark.line + 1 if mark else None
        raise YamlError(f"not valid YAML: {e.problem or e.context}", line) from None
    except yaml.reader.ReaderError as e:
        line = text.encode().count(b"\n", 0, e.position) + 1  # the C reader counts bytes
        raise YamlError(f"not valid YAML: {e.reason}", line) from None


def plain(node: Node) -> object:
    """Turn a tree into Python values: dict, list and the values of its scalars."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return {key: plain(value) for key, value in node.items.items()}


class Builder:
    """Builds one tree from its parts in document order, without recursion.

    `open`, `scalar` and `close` raise YamlError: the tree is nested deeper than 16, has more than
    250,000 values, or a key that is no single value or stands twice.
    """

    def __init__(self) -> None:
        self._stack: list[Sequence | Mapping] = []
        self._keys: list[str | None] = []  # the pending key of each open collection
        self._nodes = 0

    def open(self, node: Sequence | Mapping) -> None:
        """Begin a collection; all that is added until `close` goes into it."""
        self._count(node.line)
        if len(self._stack) >= MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH}", node.line)
        if self._stack and isinstance(self._stack[-1], Mapping) and self._keys[-1] is None:
            raise YamlError("a key must be a single value", node.line)
        self._stack.append(node)
        self._keys.append(None)

    def scalar(self, node: Scalar) -> Node | None:
        """Add a value, or the next key of a mapping. Returns the whole tree if this completes it."""
        self._count(node.line)
        parent = self._stack[-1] if self._stack else None
        if isinstance(parent, Mapping) and self._keys[-1] is None:
            self._add_key(parent, node)
            return None
        return self._add(node)

    def close(self) -> Node | None:
        """End the innermost collection. Returns the whole tree if this completes it."""
        self._keys.pop()
        return self._add(self._stack.pop())

    def _count(self, line: int | None) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise YamlError(f"more than {MAX_NODES} values", line)

    def _add_key(self, parent: Mapping, node: Scalar) -> None:
        key = node.text
        if key in parent.items:
            raise YamlError(f"duplicate key {_short(key)!r}", node.line)
        self._keys[-1] = key
        parent.key_lines.append(node.line)

    def _add(self, node: Node) -> Node | None:
        if not self._stack:
            return node
        parent, key = self._stack[-1], self._keys[-1]
        if isinstance(parent, Sequence):
            parent.items.append(node)
        elif key is not None:
            parent.items[key] = node
            self._keys[-1] = None
        return None


def _build(events: Iterator[yaml.Event]) -> Iterator[Node]:
    builder = Builder()
    for event in events:
        root: Node | None = None
        if type(event) in _NODES:  # not isinstance: there may be a million events
            assert event.start_mark is not None  # only events made by hand have none
            root = _add_node(builder, event, event.start_mark.line + 1)
        elif type(event) in _ENDS:
            root = builder.close()
        if root is not None:
            yield root


def _add_node(builder: Builder, event: Any, line: int) -> Node | None:
    if type(event) is yaml.AliasEvent:
        raise YamlError(f"aliases are not allowed: *{_short(str(event.anchor))}", line)
    if event.anchor:
        raise YamlError(f"anchors are not allowed: &{_short(event.anchor)}", line)
    if event.tag:
        shown = repr(_short(event.tag))[
            1:-1
        ]  # PyYAML has turned %1b in a tag into an escape character
        raise YamlError(f"tags are not allowed: {shown}", line)
    if type(event) is yaml.ScalarEvent:
        return builder.scalar(Scalar(event.value, not event.style, line))
    builder.open(
        Mapping(line=line) if type(event) is yaml.MappingStartEvent else Sequence(line=line)
    )
    return None


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _resolve(text: str) -> Plain:
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if len(text) > _MAX_DIGITS:
        return text
    if _INT.match(text):
        return int(text)
    if _RADIX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", "", 1))
    return text
