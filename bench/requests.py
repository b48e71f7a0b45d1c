"""What job files cost to parse: a normal one, and the dearest hostile ones at 64 KiB and 1 MiB.

    python bench/requests.py

Each is parsed in this process; the memory is the peak that tracemalloc sees in a second run.
"""

import time
import tracemalloc

from promptdrop import config, request
from promptdrop.errors import RequestError

CONFIG = config.parse({"model": {"id": "x"}})
NORMAL = {
    "text": (".txt", "a red fox in fresh snow, morning light\n" * 5),
    "yaml": (".yaml", "prompts: [a cat, a dog]\nseed: 7\ncount: 2\nsize: 16:9\nmeta: {a: 1}\n"),
    "json": (".json", '{"prompt": "a cat", "seed": 7, "size": "16:9"}'),
}
HOSTILE = {
    "yaml, empty mappings": (".yaml", "- {a: {b: {c: {d: []}}}}\n"),
    "yaml, empty documents": (".yaml", "---\n"),
    "yaml, brackets": (".yaml", "["),
    "json, depth": (".json", '{"a":'),
    "jsonl, a job a line": (".jsonl", '{"prompt":"a"}\n'),
    "csv, columns": (".csv", "a,"),
    "text, a line each": (".txt", "a\n"),
    "text, infotext": (".txt", 'aa: "\\",'),
}


def cost(data: bytes, suffix: str) -> tuple[float, float]:
    """Milliseconds and MiB of one parse."""
    began = time.perf_counter()
    _answer(data, suffix)
    milliseconds = (time.perf_counter() - began) * 1e3
    tracemalloc.start()
    _answer(data, suffix)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return milliseconds, peak


def _answer(data: bytes, suffix: str) -> None:
    try:
        request.parse(data, suffix, CONFIG)
    except RequestError:
        pass  # a refusal is an answer


def main() -> None:
    """Print a row for each input."""
    for name, (suffix, text) in NORMAL.items():
        milliseconds, peak = cost(text.encode(), suffix)
        print(f"{name:24} {len(text):>8} B  {milliseconds:8.2f} ms  {peak:6.2f} MiB")
    for name, (suffix, unit) in HOSTILE.items():
        for size in (1 << 16, 1 << 20):
            data = (unit * (size // len(unit))).encode()
            milliseconds, peak = cost(data, suffix)
            print(f"{name:24} {size:>8} B  {milliseconds:8.1f} ms  {peak:6.1f} MiB")


if __name__ == "__main__":
    main()
