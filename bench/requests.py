"""Measure what job files cost to parse: normal ones, and the dearest hostile ones at 64 KiB and 1 MiB.

    python bench/requests.py

Each is read as the daemon reads it: the time is the processor's, best of three, the memory the peak
that tracemalloc sees in another run. `loop waits` is the longest that a second thread, as the
daemon's loop is one, was kept from its turn meanwhile.
"""

import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from promptdrop import config
from promptdrop.intake.reading import read_job_file

CONFIG = config.parse({"model": {"id": "x"}})
SIZES = (1 << 16, 1 << 20)
TICK_SECONDS = 0.001


def _filled(head: str, unit: str, tail: str = "") -> Callable[[int], str]:
    return lambda size: head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def _nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


NORMAL = {
    "text": (".txt", "a red fox in fresh snow, morning light\n" * 5),
    "yaml": (".yaml", "prompts: [a cat, a dog]\nseed: 7\ncount: 2\nsize: 16:9\nmeta: {a: 1}\n"),
    "json": (".json", '{"prompt": "a cat", "seed": 7, "size": "16:9"}'),
}
HOSTILE: dict[str, tuple[str, Callable[[int], str]]] = {
    "text, a line each": (".txt", _filled("", "a\n")),
    "text, 10,000 lines": (".txt", lambda size: "a\n" * 10_000),
    "text, arguments": (".txt", _filled("", "--prompt a\n")),
    "text, infotext": (".txt", _filled("", 'aa: "\\",')),
    "yaml, nested mappings": (".yaml", _filled("", f"- {_nested('{a: ', '}', 13)}\n")),
    "yaml, empty documents": (".yaml", _filled("", "---\n")),
    "yaml, empty entries": (".yaml", lambda size: "prompt: a\nimages:\n" + "- {}\n" * 10_000),
    "yaml, brackets": (".yaml", _filled("", "[")),
    "yaml, keys cut alike": (".yaml", lambda size: _keys(size, "{}: 1\n")),
    "json, depth": (".json", _filled("", '{"a":')),
    "json, nested mappings": (".json", _filled("[", _nested('{"aa":', "}", 13) + ",", "1]")),
    "json, empty entries": (
        ".json",
        lambda size: '{"prompt":"a","images":[' + "{}," * 9_999 + "{}]}",
    ),
    "jsonl, a job a line": (".jsonl", _filled("", '{"prompt":"a"}\n')),
    "csv, columns": (".csv", _filled("", "a,")),
    "csv, 10,000 rows": (".csv", lambda size: "prompt\n" + "a\n" * 10_000),
}


def _keys(size: int, line: str) -> str:
    """Unknown fields that only their end tells apart: a message shows the beginning."""
    width = 80
    count = size // (width + len(line))
    return "".join(line.format("k" * (width - 6) + f"{n:06}") for n in range(count))


def milliseconds(data: bytes, suffix: str) -> float:
    """Processor time of one parse."""
    began = time.thread_time()
    answer(data, suffix)
    return (time.thread_time() - began) * 1e3


def peak_mib(data: bytes, suffix: str) -> float:
    """The most memory that Python held during one parse."""
    tracemalloc.start()
    answer(data, suffix)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak


def longest_wait(data: bytes, suffix: str) -> float:
    """The longest that this thread was kept waiting beyond its tick while another parsed, in ms."""
    parser = threading.Thread(target=answer, args=(data, suffix))
    parser.start()
    longest = 0.0
    while parser.is_alive():
        began = time.perf_counter()
        time.sleep(TICK_SECONDS)
        longest = max(longest, time.perf_counter() - began - TICK_SECONDS)
    return longest * 1e3


def answer(data: bytes, suffix: str) -> None:
    """Read once, as if from the inbox; a refusal is an answer."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        path = Path(file.name)
        read_job_file(path, path.name, CONFIG, None)


def main() -> None:
    """Print a row for each input."""
    for name, (suffix, text) in NORMAL.items():
        _row(name, text.encode(), suffix)
    for name, (suffix, text_of) in HOSTILE.items():
        for size in SIZES:
            _row(name, text_of(size).encode()[:size], suffix)


def _row(name: str, data: bytes, suffix: str) -> None:
    best = min(milliseconds(data, suffix) for _ in range(3))
    print(
        f"{name:22} {len(data):>8} B  {best:8.2f} ms  {peak_mib(data, suffix):6.2f} MiB"
        f"  loop waits {longest_wait(data, suffix):6.1f} ms"
    )


if __name__ == "__main__":
    main()
