"""The setting that all parts share: model, sizes and counts, device, clock, and the floor.

The floor is the time that the FLOPs of an image's evaluations would take at the rate of a large matrix
product.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import ZImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from promptdrop import config_file
from promptdrop.config import Config
from promptdrop.engines.device import find_device
from promptdrop.nouns import ImageSpec

PROMPT = "a lighthouse on a rocky coast at sunset, soft light, highly detailed, painted in oil"
STEPS = 9
TOKENS = 128  # what PROMPT is padded to, or nearly


@dataclass(frozen=True)
class Bench:
    """The options of a run. All parts share a spool, and with it compiled code."""

    model: Path
    width: int
    height: int
    images: int
    batch: int
    home: Path  # for spools and compiled code; empty at first

    def config(self, name: str, **engine: Any) -> Config:
        """Write a configuration to `home/NAME/config.yaml`, and load it."""
        size = f"{self.width}x{self.height}"
        values = {
            "root": str(self.home / "spool"),
            "model": {"path": str(self.model)},
            "engine": {"warmup": [size], "image_timeout_seconds": 600, **engine},
            "defaults": {"width": self.width, "height": self.height, "steps": STEPS},
            "limits": {"min_free_disk_mib": 0},
        }
        file = self.home / name / "config.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(values))
        return config_file.load(file)

    def spec(self, seed: int, prompt: str = PROMPT) -> ImageSpec:
        """An image of the default settings."""
        return ImageSpec(
            image=1,
            prompt=prompt,
            negative_prompt=None,
            width=self.width,
            height=self.height,
            steps=STEPS,
            guidance_scale=0.0,
            seed=seed,
            scheduler="euler",
            format="png",
            timeout_seconds=600.0,
        )


def device() -> torch.device:
    """The device that the engine takes."""
    return find_device("auto")


def dtype() -> torch.dtype:
    """The dtype that the engine computes in."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def seconds(work: Callable[[], Any], times: int) -> list[float]:
    """Time each of so many calls, the device's work included."""
    taken = []
    for _ in range(times):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - begin)
    return taken


def synchronize() -> None:
    """Wait until the device has done what was asked of it."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def forget() -> None:
    """Give memory that nobody holds any more back to the device."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative distance of two tensors, root mean square."""
    return float((one - other).norm() / other.norm())


def matrix_rates() -> tuple[float, float]:
    """Measure the FLOP/s of a large matrix product in the model's dtype.

    Returns the median of 20, and the rate of 500 without a pause, in which a GPU comes to the limit of
    its power.
    """
    side, many = (8192, 500) if device().type == "cuda" else (1024, 50)
    one, two = torch.randn(2, side, side, device=device(), dtype=dtype()).unbind()
    seconds(lambda: one @ two, 5)
    alone = statistics.median(seconds(lambda: one @ two, 20))

    def back_to_back() -> None:
        for _ in range(many):
            torch.mm(one, two, out=result)

    result = torch.empty_like(one)
    (together,) = seconds(back_to_back, 1)
    return 2 * side**3 / alone, 2 * side**3 * many / together


def evaluation_flop(bench: Bench) -> int:
    """Count the FLOPs of one evaluation by the library's transformer, without computing anything."""
    settings = ZImageTransformer2DModel.load_config(bench.model / "transformer")
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(settings)
        latents = torch.empty(16, 1, bench.height // 8, bench.width // 8)
        text = torch.empty(TOKENS, transformer.config["cap_feat_dim"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer([latents], torch.empty(1), [text])
    return counter.get_total_flops()


@functools.cache
def floor(bench: Bench) -> dict[str, float]:
    """Measure the floor of an image, in seconds, and what it follows from."""
    (alone, many), flop = matrix_rates(), evaluation_flop(bench)
    return {
        "evaluation_tflop": flop / 1e12,
        "matrix_tflop_per_s": alone / 1e12,
        "matrix_back_to_back_tflop_per_s": many / 1e12,
        "floor_s": STEPS * flop / alone,
    }
