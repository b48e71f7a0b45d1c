"""Decode a job file: UTF-8, UTF-16 with a BOM, or an encoding that the configuration names."""

import re
from collections.abc import Sequence

from promptdrop.errors import Problem, RequestError

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BOMS_OF_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")


def decode(data: bytes, encodings: Sequence[str]) -> str:
    """Return the text of a job file, without its BOM.

    A BOM of UTF-16 decides; else UTF-8 is tried, then `encodings` in their order.
    Raises RequestError: none of them fits, or the file is UTF-32 or has NUL bytes.
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


def with_lf(text: str) -> str:
    """Turn all line ends into LF: a CR in a prompt would be a token of its own."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
