"""The engine in this process: loaded, warm, rendering back to back."""

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.gpu.setting import device
from promptdrop import metrics
from promptdrop.config import Config, Prompt
from promptdrop.engines.engine import batches
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError
from promptdrop.nouns import ImageSpec, Rendering


def warm(settings: Config) -> ZImageEngine:
    """Load an engine in this process, and warm it up."""
    engine = ZImageEngine(settings, lambda stage: None)
    engine.warm_up(lambda: None)
    return engine


def render(
    engine: ZImageEngine,
    specs: list[ImageSpec],
    most: int = 1,
    ahead: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> list[Rendering]:
    """Render images back to back, `most` together.

    ahead: encode the texts of the next images meanwhile, as the daemon does. on_image is called in the
    middle of each batch.
    """
    renderings: list[Rendering] = []
    waiting = [*batches(specs, most)]
    for batch, following in zip(waiting, [*waiting[1:], []], strict=True):
        coming = iter(following if ahead else [])

        def on_step(step: int, steps: int, coming: Iterator[ImageSpec] = coming) -> None:
            if step == steps // 2:
                on_image()
            if step < steps and (spec := next(coming, None)):
                engine.prepare(spec, Prompt())

        buffers = [memoryview(bytearray(spec.height * spec.width * 3)) for spec in batch]
        for result in engine.render(batch, Prompt(), on_step, buffers):
            if isinstance(result, EngineError):
                raise result
            renderings.append(result)
    return renderings


@torch.no_grad()
def velocity(
    engine: ZImageEngine,
    latents: list[torch.Tensor],
    level: torch.Tensor,
    texts: list[torch.Tensor],
) -> torch.Tensor:
    """Evaluate the engine's transformer once."""
    out: torch.Tensor = engine.model.pipe.transformer(latents, level, texts, return_dict=False)[0][
        0
    ]
    return out.float().cpu()


def quantiles(milliseconds: list[float]) -> dict[str, float | None]:
    """The quantiles of how long images took."""
    p50, p95, p99 = metrics.percentiles(milliseconds)
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def drift(values: list[float]) -> float:
    """The median of the last tenth divided by the median of the first."""
    first, last = tenths(values)
    return last / first


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the first tenth and of the last."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:])


def megahertz() -> int:
    """The clock rate of the device's multiprocessors now; 0 on the CPU."""
    return torch.cuda.clock_rate() if device().type == "cuda" else 0


def on_device(one: Rendering) -> float:
    """The milliseconds of a render that depend on compiled code."""
    return one.latency_ms.denoise + one.latency_ms.decode
