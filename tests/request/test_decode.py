"""A job file's bytes as text: encodings, marks at the beginning, line ends."""

import pytest

from job_files import SUFFIXES, image, refusal
from promptdrop.request.decode import decode


@pytest.mark.parametrize(
    ("data", "encodings"),
    [
        ("猫 é".encode(), ["utf-8"]),
        ("猫 é".encode("utf-8-sig"), []),
        ("猫 é".encode("utf-16"), ["utf-8"]),
        (b"\xfe\xff" + "猫 é".encode("utf-16-be"), ["utf-8"]),
        ("猫 é".encode("gb18030"), ["utf-8", "gb18030"]),
        ("猫 é".encode("utf-16-le"), ["utf-16-le"]),
    ],
)
def test_text_is_decoded(data, encodings):
    """UTF-8 is tried first, UTF-16 needs a BOM, other encodings must be configured."""
    assert decode(data, encodings) == "猫 é"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\xe9", "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8, or name its encoding in inbox.encodings"),
        (b"a\nb\0", "line 2: a NUL byte: not text, or UTF-16 without a BOM; save it as UTF-8"),
        ("ab".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
        (b"\xff\xfea", "the file begins like UTF-16 but is not; save it as UTF-8"),
        ("a\0".encode("utf-16"), "the file begins like UTF-16 but is not; save it as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_text_is_refused(data, message):
    """The refusal says how to save the file."""
    assert refusal(data, ".txt") == [message]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_crlf_and_a_bom_change_nothing(suffix):
    """A file as editors on Windows write it means the same."""
    text = {".csv": "prompt\na\n", ".json": '{"prompt":\n"a"}\n', ".jsonl": '{"prompt": "a"}\n'}
    data = text.get(suffix, "prompt: a\n" if suffix in (".yaml", ".yml") else "a\n")

    assert image(data.replace("\n", "\r\n").encode("utf-8-sig"), suffix.upper()).prompt == "a"
