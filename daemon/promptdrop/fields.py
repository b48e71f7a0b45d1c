"""The fields of job files: their types, ranges, units and defaults, and the words that describe them.

The readers of job files, `defaults` and `folders` in config.yaml, the options of `generate` and
`submit`, the JSON Schema and every refusal follow from FIELDS. CONTRIBUTING.md says how to add one.
The command line imports this module, so pydantic is imported only where a type is asked for.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from promptdrop.nouns import FORMATS, SCHEDULERS

SIDES = range(64, 4096 + 1, 16)  # px, of width and height
SIDES_IN_WORDS = f"multiples of {SIDES.step} in [{SIDES[0]}, {SIDES[-1]}]"
PRIORITIES = range(-100, 100 + 1)
MAX_SEED = 2**63 - 1
TEXT_LENGTH = 20_000  # characters of a prompt
META_BYTES = 16 * 1024  # of meta, as JSON

_PART = r"[0-9]{1,4}(\.[0-9]{1,4})?"
SIZE = rf"^\s*([0-9]{{1,5}}\s*[xX×]\s*[0-9]{{1,5}}|{_PART}\s*:\s*{_PART})\s*$"  # WxH or a ratio

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobField:
    """One field: the values it takes, and the words that describe them."""

    kind: type  # of one value: str, int, float, bool, dict or list
    limits: Mapping[str, Any] | None = None  # as pydantic spells them: ge, le, multiple_of ...
    words: tuple[str, ...] = ()  # the values, where only these are taken
    check: Callable[[Any], Any] | None = None  # raises ValueError for what no limit can say
    items: str | None = None  # the field that each item of a list is of; None: no list is taken
    expected: str  # ends the refusal "width=100 is not ..."
    description: str = ""  # in the JSON Schema; `expected` if it is empty
    examples: tuple[Any, ...] = ()  # in the JSON Schema
    option: str | None = None  # help of --NAME of `generate` and `submit`; None: no such option
    default: Any = None  # of an image whose job file does not give the field
    configured: bool = False  # whether `defaults` and `folders` in config.yaml give it
    top_only: bool = False  # whether it cannot stand in an entry of `images`


def _integer(low: int, high: int, **more: Any) -> JobField:
    words = {"expected": f"an integer in [{low}, {high}]", **more}
    return JobField(kind=int, limits={"ge": low, "le": high}, **words)


def _number(low: float, high: float, **more: Any) -> JobField:
    words = {"expected": f"a number in [{low:g}, {high:g}]", **more}
    return JobField(kind=float, limits={"ge": low, "le": high}, **words)


def _one_of(words: tuple[str, ...], **more: Any) -> JobField:
    listed = f"{', '.join(words[:-1])} or {words[-1]}"
    expected = f"one of {', '.join(words)}"
    return JobField(kind=str, words=words, expected=expected, option=listed, **more)


def _side(example: int) -> JobField:
    one = f"a multiple of {SIDES.step} in [{SIDES[0]}, {SIDES[-1]}]"
    return JobField(
        kind=int,
        limits={"ge": SIDES[0], "le": SIDES[-1], "multiple_of": SIDES.step},
        expected=one,
        description=f"pixels, {one}",
        examples=(example,),
        option=f"pixels, a multiple of {SIDES.step}",
        default=1024,
        configured=True,
    )


def _clean(text: str) -> str:
    if bad := _CONTROL.search(text):
        message = f"contains the control character {bad[0]!r}"
        raise ValueError(f"{message}; of these only line breaks and tabs are allowed")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; expected " + FIELDS["prompt"].expected)
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


# The JSON Schema and the help of the commands list the fields in this order.
FIELDS: dict[str, JobField] = {
    "prompt": JobField(
        kind=str,
        limits={"min_length": 1, "max_length": TEXT_LENGTH},
        check=_not_blank,
        expected=f"text of 1 to {TEXT_LENGTH:,} characters",
        examples=("a cat on a sofa",),
    ),
    "negative_prompt": JobField(
        kind=str,
        limits={"max_length": TEXT_LENGTH},
        check=_clean,
        expected=f"text of at most {TEXT_LENGTH:,} characters",
        description=f"text of at most {TEXT_LENGTH:,} characters; used only when guidance_scale > 0",
        examples=("blurry",),
        option="used only when guidance_scale > 0",
        configured=True,
    ),
    "width": _side(example=1024),
    "height": _side(example=768),
    "size": JobField(
        kind=str,
        limits={"pattern": SIZE},
        expected=f"WxH such as 1024x768 ({SIDES_IN_WORDS}) or an aspect ratio such as 16:9",
        examples=("1024x768", "16:9"),
        option="WxH, or an aspect ratio such as 16:9",
    ),
    "steps": _integer(
        1,
        100,
        description="transformer evaluations, 1 to 100",
        examples=(9,),
        option="transformer evaluations, 1 to 100",
        default=9,
        configured=True,
    ),
    "guidance_scale": _number(
        0, 20, examples=(0.0,), option="0 to 20", default=0.0, configured=True
    ),
    "seed": _integer(
        0,
        MAX_SEED,
        items="seed",
        expected="an integer in [0, 2**63-1] or a list of them",
        description="0 to 2**63-1, or a list (one image per prompt and seed; count then stays 1)",
        examples=(7, [1, 2, 3]),
        option="0 to 2**63-1",
    ),
    "count": JobField(
        kind=int,
        limits={"ge": 1},
        expected="an integer of at least 1",
        description="images per prompt, taking seed, seed + 1, ...",
        examples=(4,),
        option="images per prompt",
        default=1,
        configured=True,
    ),
    "scheduler": _one_of(SCHEDULERS, examples=("euler",), default="euler", configured=True),
    "format": _one_of(FORMATS, examples=("png",)),
    "timeout_seconds": JobField(
        kind=float,
        limits={"gt": 0, "allow_inf_nan": False},
        expected="a number of seconds above 0, at most limits.timeout_seconds",
        description="per image: seconds above 0, at most limits.timeout_seconds",
        examples=(60,),
        option="per image, at most limits.timeout_seconds",
    ),
    "meta": JobField(
        kind=dict,
        check=_storable,
        expected=f"a mapping of at most {META_BYTES // 1024} KiB as JSON",
        description=f"any mapping of at most {META_BYTES // 1024} KiB as JSON, copied into the sidecars",
        examples=({"client": "acme"},),
        default={},
    ),
    "prompts": JobField(
        kind=list,
        items="prompt",
        expected="a list of prompts",
        description="one image or more for each",
        examples=(["a cat", "a dog"],),
        top_only=True,
    ),
    "images": JobField(
        kind=list,
        expected="a list of mappings such as {prompt: a cat}",
        description="one mapping for each; its fields win over those at the top",
        top_only=True,
    ),
    "priority": _integer(
        PRIORITIES[0],
        PRIORITIES[-1],
        description=f"{PRIORITIES[0]} to limits.priority, higher first",
        examples=(10,),
        default=0,
        configured=True,
        top_only=True,
    ),
}

IMAGE_FIELDS = tuple(name for name, field in FIELDS.items() if not field.top_only)
TEXT_FIELDS = frozenset(name for name, field in FIELDS.items() if field.kind is str)
OPTIONS = {
    name: field for name, field in FIELDS.items() if field.option
}  # of `generate` and `submit`
INTEGERS = frozenset(name for name, field in FIELDS.items() if field.kind is int)


def type_of(name: str) -> Any:
    """Return a field's type for pydantic, without null, which stands for a field that is not given."""
    from pydantic import Field

    field = FIELDS[name]
    if field.items is None:
        return _single(field)
    item = _single(FIELDS[field.items])
    many = Annotated[list[item], Field(min_length=1, fail_fast=True)]  # type: ignore[valid-type]  # made of FIELDS
    return many if field.kind is list else item | many


def _single(field: JobField) -> Any:
    """Return the type of one value of a field, where the file may also give a list of them."""
    if field.words:
        return Literal[field.words]
    kind = dict[str, Any] if field.kind is dict else field.kind
    constraints = tuple(_constraints(field))
    return Annotated[(kind, *constraints)] if constraints else kind


def _constraints(field: JobField) -> Iterator[Any]:
    from pydantic import AfterValidator, Field

    if field.limits:
        yield Field(**field.limits)
    if field.check:
        yield AfterValidator(field.check)
