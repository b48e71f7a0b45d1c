"""The parsers that read files of strangers, each with the rules it must keep, for properties and fuzzing."""

import json
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

from promptdrop import config, config_file, names
from promptdrop.errors import ConfigError, RequestError
from promptdrop.nouns import Request
from promptdrop.request import parse
from promptdrop.request.infotext import format_infotext, parse_infotext, parse_settings
from promptdrop.spool import control

CONFIG = config.parse({"model": {"id": "x"}})
MESSAGE_LENGTH = 700  # a refusal is read by a person
# The bound is 100 ms up to 64 KiB; here of this thread's own time, with slack for slow machines.
SECONDS = 0.5
RAW = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # categories that must not reach a terminal

# A good file in each format; a fuzzer begins with them.
SEEDS = {
    ".txt": 'a cat\n--prompt "b" --seed 7 --n_iter 2\n# c\n',
    ".prompt": "a\nNegative prompt: b\nSteps: 9, Sampler: Euler, Size: 512x512, Model: \"a\"\n",
    ".yaml": "prompt: a\nseed: [1, 2]\nmeta: {a: [1, ~]}\nimages:\n- {size: 16:9}\n- width: 64\n---\nprompts: [a]\n",
    ".json": '{"prompt": "a\\u00e9", "images": [{"seed": 1e3, "meta": {"a": null}}], "steps": 4}',
    ".jsonl": '{"prompt": "a"}\n{"prompts": ["\\ud83d\\ude00"], "seed": [1]}\n',
    ".csv": 'prompt,seed,meta.a\n"a\n""b",1 2,3\nb,,\n',
}  # fmt: skip


def job_file(data: bytes, suffix: str) -> Request | None:
    """Parse a job file: a Request that JSON can hold, or a refusal that a terminal can show, in time."""
    began = time.thread_time()
    asked, problems = None, ()
    try:
        asked = parse.parse(data, suffix, CONFIG)
    except RequestError as e:
        problems = e.problems
    assert len(data) > 1 << 16 or time.thread_time() - began < SECONDS
    assert asked or problems
    for problem in problems:
        assert len(problem.message) <= MESSAGE_LENGTH, problem.message
        assert is_printable(problem.message), ascii(problem.message)
        assert problem.line is None or problem.line >= 1
    if asked:
        assert [spec.image for spec in asked.images] == list(range(1, len(asked.images) + 1))
        json.dumps([spec.to_json() for spec in asked.images[:20]], allow_nan=False).encode()
    return asked


def settings(data: bytes) -> None:
    """Read a config.yaml: a Config, or a ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(data)
        try:
            config_file.load(file)
        except ConfigError:
            pass


def command(data: bytes) -> None:
    """Read what anybody of the group may leave in control/: a command or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.json").write_bytes(data)
        control.CommandFiles(Path(folder)).read(0.0)


def infotext(data: bytes) -> None:
    """Read an infotext: what is written of its parts can be read again."""
    text = data.decode("utf-8", "replace")
    parse_settings(text)
    parsed = parse_infotext(text)
    if parsed and {"Steps", "Sampler"} <= parsed.fields.keys():
        again = parse_infotext(
            format_infotext(parsed.prompt, parsed.negative_prompt, parsed.fields)
        )
        assert again is not None


def file_name(data: bytes) -> None:
    """Make a name safe: it is legal everywhere, and the same when it is made safe again."""
    stem = data.replace(b"\0", b"").replace(b"/", b"").decode("utf-8", "replace")
    safe = names.safe(stem)
    assert safe
    assert len(safe.encode()) <= names.NAME_BYTES
    assert names.safe(safe) == safe, (stem, safe)
    assert safe not in (".", "..")
    assert not safe.startswith((".", "-"))
    assert not set(safe) & set("/\\:*?\"<>|%{}$`'\n")
    assert is_printable(safe)
    assert is_printable(names.printable(stem))


def is_printable(text: str) -> bool:
    """Whether no character moves a cursor, colours a terminal or turns a line around."""
    return not any(unicodedata.category(c) in RAW for c in text)


OTHERS: tuple[Callable[[bytes], None], ...] = (settings, command, infotext, file_name)
