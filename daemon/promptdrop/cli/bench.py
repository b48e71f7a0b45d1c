"""`promptdrop bench`: the user's own configuration, images back to back, without spool and files."""

import json
import statistics
import time
from collections.abc import Callable

from promptdrop import metrics
from promptdrop.cli import terminal
from promptdrop.config import Config
from promptdrop.engines.script import Engine, Generated
from promptdrop.errors import RequestError, UsageError
from promptdrop.metrics import Nvml, RollingWindow
from promptdrop.nouns import Rendering
from promptdrop.request import parse

PROMPT = "a lighthouse on a cliff"
PARTS: dict[str, Callable[[Rendering], float]] = {  # ms
    "encode": lambda one: one.latency_ms.encode,
    "denoise": lambda one: one.latency_ms.denoise,
    "one evaluation": lambda one: statistics.median(one.steps_ms),
    "decode": lambda one: one.latency_ms.decode,
    "transfer": lambda one: one.latency_ms.transfer,
    "render": lambda one: one.latency_ms.render,
}


def run(settings: Config, images: int, size: str | None) -> None:
    """Load the model, render `images` of one prompt, `engine.batch` together, and print tables.

    Raises UsageError: size or images are out of range; nothing is loaded.
    """
    fields = {"size": size} if size else {}
    if images < 1:
        raise UsageError(f"--images {images}: expected at least 1")
    try:
        data = json.dumps({"prompt": PROMPT, **fields}).encode()
        (spec,) = parse.parse(data, ".json", settings).images[:1]
    except RequestError as e:
        raise UsageError("; ".join(problem.message for problem in e.problems)) from None
    engine, most = Engine(settings), min(settings.engine.batch, images)

    def render(seeds: range) -> list[Generated]:
        made = engine.generate(PROMPT, seed=list(seeds), count=1, **fields)
        return made if isinstance(made, list) else [made]

    for together in sorted({1, most}):
        render(range(together))  # not counted: a first one is slower
    nvml, window = Nvml(engine.info.device_index), RollingWindow(images)
    renderings: list[Rendering] = []
    begin = time.monotonic()
    for first in range(0, images, most):
        for one in render(range(first, min(first + most, images))):
            renderings.append(one.rendering)
            latency = one.rendering.latency_ms.render
            window.add(time.monotonic(), latency, nvml.utilization_percent())
    rate = images / (time.monotonic() - begin)

    info, summary = engine.info, window.summary()
    peak = max((one.memory_peak_mib or 0 for one in renderings), default=0)
    facts = {
        "device": info.device,
        "dtype": info.dtype,
        "compiled": "yes" if info.compiled else "no",
        "size": f"{spec.width}x{spec.height}",
        "evaluations": str(spec.evaluations),
        "together": str(most),
        "images": str(images),
        "images/s": f"{rate:.3f}",
        "GPU busy": _percent(summary.utilization_percent),
        "peak memory": f"{peak:.0f} MiB" if peak else "-",
    }
    terminal.table(("configuration", ""), facts.items())
    rows = [(name, *_quantiles([part(one) for one in renderings])) for name, part in PARTS.items()]
    terminal.table(("ms", "p50", "p95", "p99"), rows)


def _quantiles(values: list[float]) -> tuple[str, ...]:
    return tuple("-" if q is None else f"{q:.1f}" for q in metrics.percentiles(values))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%"
