"""Measure how near each scheduler comes to the exact solution, and what its pictures are worth.

    python -m bench.schedulers --results bench/schedulers.json     # about ten minutes on one core

First a velocity field whose exact solution is known takes the transformer's place in the pipeline;
then the demonstration model draws held-out prompts, which its judge looks at.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray

from demo_model.evaluate import Case, batched, held_out_cases, load
from demo_model.judge import is_right, look
from promptdrop import weights
from promptdrop.engines.schedulers import scheduler_for
from promptdrop.nouns import SCHEDULERS

Pixels = NDArray[np.uint8]  # [H, W, 3]

STEPS = (4, 6, 9, 20)  # of the analytic field
DRAWN = [(name, 9) for name in SCHEDULERS] + [("heun", 5)]
DRAWN += [(name, steps) for steps in (6, 4) for name in ("euler", "dpmpp_2m", "unipc")]
DRAWN_SIDE = 128  # px, of the demonstration model's pictures: its least, so that minutes do
REFERENCE = ("euler", 100)
SIDE = 512  # px: 65,536 latent values

MEANS = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # of the data's two equal halves
WIDTH = 0.5  # standard deviation of each


class AnalyticField(torch.nn.Module):
    """Stands in for the transformer with the exact velocity of data that is one of two Gaussians."""

    in_channels = 16
    dtype, device = torch.float32, torch.device("cpu")

    def forward(
        self, latents: list[torch.Tensor], time: torch.Tensor, *ignored: Any, **options: Any
    ) -> tuple[list[torch.Tensor]]:
        """Evaluate B latents [16, 1, h, w]; time [B] is 1 - sigma. The pipeline inverts the sign."""
        pairs = zip(latents, time.tolist(), strict=True)
        return ([-velocity(x, 1 - t) for x, t in pairs],)


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise - data | (1 - sigma) * data + sigma * noise = x], for each value on its own."""
    off = x.double()[..., None] - (1 - sigma) * MEANS  # [..., 2]
    variance = ((1 - sigma) * WIDTH) ** 2 + sigma**2
    share = (-0.5 * off**2 / variance).softmax(-1)  # which half the value comes from
    data = MEANS + (1 - sigma) * WIDTH**2 / variance * off
    return (share * (sigma / variance * off - data)).sum(-1).float()


def exact(noise: torch.Tensor) -> torch.Tensor:
    """The exact end of the flow from `noise`. In one dimension paths never cross: quantiles are kept."""
    quantile = torch.special.ndtr(noise.double())
    low, high = torch.full_like(quantile, -8), torch.full_like(quantile, 8)
    for _ in range(60):  # bisection, far below float32
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[..., None] - MEANS) / WIDTH).mean(-1) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def solved(pipe: ZImagePipeline, name: str, steps: int, side: int = SIDE, *seeds: int) -> Any:
    """Solve from the noise of each seed. Returns noise and latents, each [B, 16, side/8, side/8]."""
    shape = (1, 16, side // 8, side // 8)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds or (0,)]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    checkpoint = pipe.scheduler
    pipe.scheduler = scheduler_for(name, checkpoint, generators)
    latents = pipe(
        prompt_embeds=[torch.zeros(1, 1)] * len(generators),
        latents=noise,
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance_scale=0.0,
        output_type="latent",
        return_dict=False,
    )[0]
    pipe.scheduler = checkpoint
    return noise, latents


def error(name: str, noise: torch.Tensor, latents: torch.Tensor) -> float:
    """RMS distance from the exact solution; of dpmpp_2m_sde, from the exact distribution.

    New noise takes each of its values elsewhere, so there the two are compared sorted: the
    2-Wasserstein distance.
    """
    found, true = latents.double().flatten(), exact(noise).flatten()
    if name == "dpmpp_2m_sde":
        found, true = found.sort().values, true.sort().values
    return float((found - true).square().mean().sqrt())


def with_analytic_field(model: Path) -> ZImagePipeline:
    """The demonstration model's pipeline and schedule around the analytic field."""
    pipe = load(model, torch.float32)
    pipe.transformer = AnalyticField()
    return pipe


def analytic(model: Path) -> dict[str, dict[str, float]]:
    """RMS error by scheduler and steps."""
    pipe = with_analytic_field(model)
    return {
        name: {str(n): round(error(name, *solved(pipe, name, n)), 4) for n in STEPS}
        for name in SCHEDULERS
    }


def drawn(
    pipe: ZImagePipeline, cases: list[Case], name: str, steps: int, other_seed: int = 0
) -> Iterator[tuple[Case, Pixels]]:
    """Draw every case, in batches of one size and length; every image has its own generator."""
    checkpoint = pipe.scheduler
    for batch in batched(pipe, cases, limit=16):
        generators = [torch.Generator("cpu").manual_seed(c.seed + other_seed) for c in batch]
        pipe.scheduler = scheduler_for(name, checkpoint, generators)
        images = pipe(
            prompt=[case.text for case in batch],
            height=batch[0].height,
            width=batch[0].width,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=generators,
        ).images
        yield from zip(batch, map(np.asarray, images), strict=True)
    pipe.scheduler = checkpoint


def psnr(a: Pixels, b: Pixels) -> float:
    """The PSNR of two pictures in dB; 99 if they are the same."""
    mse = np.square(a.astype(float) - b).mean()
    return float(10 * np.log10(255**2 / mse)) if mse else 99.0


def judged(pictures: list[tuple[Case, Pixels]], reference: list[Pixels]) -> dict[str, Any]:
    """Shares that the judge finds right and clean, and the median PSNR to the reference."""
    seen = [(case, look(pixels)) for case, pixels in pictures]
    pairs = zip(pictures, reference, strict=True)
    return {
        "right": sum(is_right(look_, case.asked) for case, look_ in seen) / len(seen),
        "clean": sum(look_.clean for _, look_ in seen) / len(seen),
        "psnr_db": round(statistics.median(psnr(ours, theirs) for (_, ours), theirs in pairs), 1),
    }


def pictures(model: Path, count: int) -> dict[str, Any]:
    """Held-out prompts drawn by the demonstration model, by each scheduler at several steps."""
    pipe = load(model, torch.float32)
    cases = [replace(c, height=DRAWN_SIDE, width=DRAWN_SIDE) for c in held_out_cases(count)]
    exactly = list(drawn(pipe, cases, *REFERENCE))
    reference = [pixels for _, pixels in exactly]
    rows = {"euler 100": judged(exactly, reference)}
    for name, steps in DRAWN:
        rows[f"{name} {steps}"] = judged(list(drawn(pipe, cases, name, steps)), reference)
        print(f"{name} {steps}: {rows[f'{name} {steps}']}", flush=True)
    other = list(drawn(pipe, cases, "euler", 9, other_seed=1))
    rows["euler 9, another seed"] = judged(other, reference)
    return {"prompts": len(cases), "rows": rows}


def as_tables(results: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    lines = [f"| RMS error at | {' | '.join(map(str, STEPS))} steps |", "|---" * 5 + "|"]
    for name, errors in results["analytic"].items():
        lines.append(f"| {name} | {' | '.join(f'{e:.3f}' for e in errors.values())} |")
    drawings = results["demonstration model"]
    lines += ["", f"| {drawings['prompts']} prompts | PSNR | right | clean |", "|---" * 4 + "|"]
    for name, row in drawings["rows"].items():
        lines.append(f"| {name} | {row['psnr_db']:.1f} | {row['right']:.0%} | {row['clean']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=48, help="about so many held-out ones")
    parser.add_argument("--results", type=Path, help="a JSON file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="promptdrop-bench-") as folder:
        model = Path(folder) / "model"
        weights.copy_demo(model)
        results = {
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, float32",
            "analytic": analytic(model),
            "demonstration model": pictures(model, arguments.prompts),
        }
    print(as_tables(results))
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
