"""Rules that hold for every input, tried by hypothesis and, for some seconds, by a fuzzer."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import parsers
from bench.requests import HOSTILE, SIZES
from harness import REPOSITORY
from promptdrop import picture
from promptdrop.errors import RequestError
from promptdrop.request import parse
from promptdrop.request.infotext import format_infotext, parse_infotext

BOUNDED = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
SLACK = 10  # a loaded machine and a collector with a test run to look at
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
PROMPT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    str.strip
)
# Words of every format, so that examples get past the first line.
WORDS = st.sampled_from(
    ["prompt", "prompts", "images", "seed", "size", "meta", "count", ": ", "- ", "\n", "{", "}", "[",
     "]", ",", '"', "'", "\\", "a", "1", "-1", "1e999", "0x10", ".nan", "~", "null", "---\n", "...",
     "&a ", "*a", "!!str ", "!<%1b[31m> ", "# ", "--", "--seed ", "Steps: 9, Sampler: Euler", "|\n ",
     "? ", "<<: ", "\t", "\r", "\x85", "\u2028", "\ufeff", "\x1b[31m", "{0.__class__}", "%(a)s"]
)  # fmt: skip
FIELDS = st.fixed_dictionaries(
    {"prompt": PROMPT},
    optional={
        "negative_prompt": PROMPT,
        "size": st.sampled_from(["64x64", "16:9", "128 x 64"]),
        "steps": st.integers(1, 100),
        "guidance_scale": st.floats(0, 20),
        "seed": st.integers(0, 2**63 - 1) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
        "format": st.sampled_from(["png", "jpeg", "webp", "avif"]),
        "timeout_seconds": st.integers(1, 600),
        "meta": st.dictionaries(PROMPT, PROMPT | st.integers() | st.booleans(), max_size=3),
    },
)


@BOUNDED
@given(
    suffix=st.sampled_from(list(parsers.SEEDS)),
    data=st.binary(max_size=200) | st.lists(WORDS, max_size=40).map(lambda w: "".join(w).encode()),
)
def test_any_job_file_is_answered(suffix: str, data: bytes) -> None:
    """The answer is a Request or a RequestError, in time, in words that a terminal can show."""
    parsers.job_file(data, suffix)


def test_a_tag_cannot_colour_a_terminal() -> None:
    """YAML decodes %1b in a tag to an escape character; the refusal shows it as text."""
    with pytest.raises(RequestError, match=r"not allowed: \\x1b\[31m"):
        parse.parse(b"prompt: !<%1b[31m> a", ".yaml", parsers.CONFIG)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_dearest_inputs_are_answered_in_time(name: str) -> None:
    """They take at most ten times the bounds of bench/requests.py (100 ms up to 64 KiB, 3 s at the size
    limit) of this thread's own time; work that grows faster than the size would take longer."""
    suffix, text_of = HOSTILE[name]
    for size, seconds in zip(SIZES, (0.1, 3.0), strict=True):
        data = text_of(size).encode()[:size]
        began = time.thread_time()
        parsers.job_file(data, suffix)

        assert time.thread_time() - began < SLACK * seconds, size


GROWN = """
import resource
from bench.requests import HOSTILE, SIZES, answer

answer(b"prompt: a", ".yaml")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for suffix, text_of in HOSTILE.values():
    answer(text_of(SIZES[-1]).encode()[: SIZES[-1]], suffix)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_dearest_inputs_take_64_mib_at_most() -> None:
    """A process that parses all of them at the size limit does not grow by more."""
    done = subprocess.run(
        [sys.executable, "-c", GROWN], capture_output=True, text=True, check=True,
        cwd=REPOSITORY,
    )  # fmt: skip

    assert int(done.stdout) <= 64


@BOUNDED
@given(
    suffix=st.sampled_from(list(parsers.SEEDS)),
    at=st.integers(0, 200),
    gone=st.integers(0, 20),
    put=st.lists(WORDS, max_size=5).map("".join),
)
def test_any_change_to_a_good_file_is_answered(suffix: str, at: int, gone: int, put: str) -> None:
    """A good file that is cut, pasted into or mistyped anywhere gets an answer."""
    seed = parsers.SEEDS[suffix]

    parsers.job_file((seed[:at] + put + seed[at + gone :]).encode(), suffix)


@BOUNDED
@given(FIELDS)
def test_the_formats_agree(fields: dict[str, Any]) -> None:
    """The same fields as JSON, as JSONL and as YAML ask for the same images, as written."""
    text = json.dumps(fields, ensure_ascii=False)
    if any(ord(c) > 0xFFFF or not c.isprintable() for c in text):
        text = json.dumps(fields)  # a BOM, U+2028: legal in JSON, breaks or refused in YAML
    asked = parsers.job_file(text.encode(), ".json")

    assert asked
    assert parsers.job_file(text.encode(), ".jsonl") == asked
    assert asked.images[0].prompt == fields["prompt"]
    if text.isprintable() and "\\" not in text:
        assert parsers.job_file(text.encode(), ".yaml") == asked


@BOUNDED
@given(data=st.binary(max_size=300), parser=st.sampled_from(parsers.OTHERS))
def test_the_other_parsers_hold(data: bytes, parser: Callable[[bytes], None]) -> None:
    """Any bytes as config.yaml, command, infotext or name raise only the errors they may."""
    parser(data)


@BOUNDED
@given(st.text(max_size=120))
def test_any_name_is_made_safe(name: str) -> None:
    """A name may have half surrogates, by which Python stands for bytes that are no UTF-8."""
    parsers.file_name(name.encode("utf-8", "surrogatepass"))


@BOUNDED
@given(
    prompt=ANY_TEXT, negative=st.none() | ANY_TEXT, kind=st.sampled_from(["png", "jpeg", "webp"])
)
def test_no_prompt_breaks_out_of_its_picture(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str | None, kind: str
) -> None:
    """The infotext is read as it was written, and the XMP is ours, byte for byte, for any prompt."""
    text = format_infotext(prompt, negative, {"Steps": 9, "Sampler": "Euler", "Model": prompt})
    data = picture.encode(bytes(16 * 16 * 3), 16, 16, kind, 90, text)
    path = tmp_path_factory.getbasetemp() / f"picture.{kind}"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    whole = picture.read_parameters(path)

    assert (xmp.encode() if isinstance(xmp, str) else xmp) == picture.XMP
    assert whole == text
    parsed = parse_infotext(text)
    assert parsed
    assert parsed.fields["Steps"] == "9"
    assert parsed.fields["Sampler"] == "Euler"


@pytest.mark.timeout(180)
def test_a_fuzzer_finds_nothing_in_five_seconds(tmp_path: Path) -> None:
    """It begins with good files and is guided by coverage; `make fuzz` takes more time."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or machine")
    fuzz = REPOSITORY / "tests" / "support" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, str(fuzz), str(tmp_path), "-max_total_time=5", "-seed=1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Done " in done.stderr
