"""`promptdrop bench`: time the configured engine, images back to back, without spool and files."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from promptdrop.cli import options, terminal
from promptdrop.errors import RequestError, UsageError

if TYPE_CHECKING:
    from promptdrop.config import Config
    from promptdrop.engines.script import Engine
    from promptdrop.nouns import ImageSpec, Rendering
    from promptdrop.records import Window

PROMPT = "a lighthouse on a cliff"
PARTS: dict[str, Callable[["Rendering"], float]] = {  # ms
    "encode": lambda one: one.latency_ms.encode,
    "denoise": lambda one: one.latency_ms.denoise,
    "one evaluation": lambda one: statistics.median(one.steps_ms),
    "decode": lambda one: one.latency_ms.decode,
    "transfer": lambda one: one.latency_ms.transfer,
    "render": lambda one: one.latency_ms.render,
}


def declare_bench(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `bench`."""
    options.add_config(parser)
    parser.add_argument("--images", type=int, default=10, metavar="N")
    parser.add_argument("--size", metavar="WxH")


class _Measured(NamedTuple):
    renderings: list["Rendering"]
    window: "Window"
    images_per_second: float  # from the start of the first image to the end of the last


def bench(arguments: argparse.Namespace) -> None:
    """Load the model, render `--images` of one prompt, `engine.batch` together, and print tables.

    Raises UsageError: size or images are out of range; nothing is loaded.
    """
    from promptdrop.engines.script import Engine

    settings, images = options.config(arguments), arguments.images
    if images < 1:
        raise UsageError(f"--images {images}: expected at least 1")
    fields = {"size": arguments.size} if arguments.size else {}
    spec = _spec(settings, fields)
    engine, together = Engine(settings), min(settings.engine.batch, images)
    measured = _measure(engine, fields, images, together)
    _print_facts(engine, spec, together, measured)
    _print_latencies(measured.renderings)


def _spec(settings: "Config", fields: dict[str, str]) -> "ImageSpec":
    """Return the image that is rendered again and again."""
    from promptdrop.request import parse

    data = json.dumps({"prompt": PROMPT, **fields}).encode()
    try:
        return parse.parse(data, ".json", settings).images[0]
    except RequestError as e:
        raise UsageError("; ".join(problem.message for problem in e.problems)) from None


def _measure(engine: "Engine", fields: dict[str, str], images: int, together: int) -> _Measured:
    """Render `images` back to back, after some that are not counted, since a first one is slower."""
    from promptdrop.metrics import Nvml, RollingWindow

    for size in sorted({1, together}):
        _render(engine, fields, range(size))
    nvml, window = Nvml(engine.info.device_index), RollingWindow(images)
    renderings: list[Rendering] = []
    begin = time.monotonic()
    for first in range(0, images, together):
        for one in _render(engine, fields, range(first, min(first + together, images))):
            renderings.append(one)
            window.add(time.monotonic(), one.latency_ms.render, nvml.utilization_percent())
    return _Measured(renderings, window.summary(), images / (time.monotonic() - begin))


def _render(engine: "Engine", fields: dict[str, str], seeds: range) -> list["Rendering"]:
    made = engine.generate(PROMPT, seed=list(seeds), count=1, **fields)
    return [one.rendering for one in (made if isinstance(made, list) else [made])]


def _print_facts(engine: "Engine", spec: "ImageSpec", together: int, measured: _Measured) -> None:
    info, renderings = engine.info, measured.renderings
    peak = max((one.memory_peak_mib or 0 for one in renderings), default=0)
    busy = measured.window.utilization_percent
    facts = {
        "device": info.device,
        "dtype": info.dtype,
        "compiled": "yes" if info.compiled else "no",
        "size": f"{spec.width}x{spec.height}",
        "evaluations": str(spec.evaluations),
        "together": str(together),
        "images": str(len(renderings)),
        "images/s": f"{measured.images_per_second:.3f}",
        "GPU busy": "-" if busy is None else f"{busy:.0f}%",
        "peak memory": f"{peak:.0f} MiB" if peak else "-",
    }
    terminal.table(("configuration", ""), facts.items())


def _print_latencies(renderings: list["Rendering"]) -> None:
    from promptdrop.metrics import percentiles

    rows = []
    for name, milliseconds in PARTS.items():
        quantiles = percentiles([milliseconds(one) for one in renderings])
        rows.append((name, *("-" if q is None else f"{q:.1f}" for q in quantiles)))
    terminal.table(("ms", "p50", "p95", "p99"), rows)
