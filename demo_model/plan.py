"""The parts that the stages of training share: plan, log of losses, batches, learning rates."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import data
from .data import Course, Pictures
from .world import render

WARMUP_STEPS = 200
LOG_EVERY = 200  # steps


Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Plan:
    """How much to train, and where; the defaults made the shipped checkpoint."""

    work: Path
    out: Path
    device: str = "cuda"
    seed: int = 0
    vae_steps: int = 2500
    vae_pixels: int = 160 * 160 * 32  # in a batch
    words_steps: int = 900
    words_prompts: int = 256  # in a batch
    flow_steps: int = 17_000
    flow_tokens: int = 24_576  # in a batch
    courses: tuple[Course, ...] = (data.FIRST_COURSE, *data.LATER_COURSES)
    workers: int = 14
    eval_prompts: int = 500
    compile: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the frozen parts compute in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Log:
    """Losses and stage times of a run, kept in the work folder; a resumed run appends.

    `sittings` counts how often the run was started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {
            "sittings": 0, "seconds": {}, "vae": [], "words": [], "flow": [],
        }  # fmt: skip
        if path.exists():
            self.entries = json.loads(path.read_text())

    def loss(self, stage: str, step: int, **values: float) -> None:
        row = {"step": step} | {k: float(f"{v:.5g}") for k, v in values.items()}
        self.entries[stage].append(row)
        print(stage, row, flush=True)

    def spent(self, stage: str, seconds: float) -> None:
        self.entries["seconds"][stage] = round(seconds, 1)
        self.write()

    def write(self) -> None:
        replace_text(self.path, json.dumps(self.entries))


def replace_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def batches_from(dataset: Dataset[Batch], steps: range, plan: Plan) -> Iterator[Batch]:
    """The batches of these steps, in order, made by worker processes ahead of need."""
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=list(steps),
        num_workers=plan.workers,
        prefetch_factor=4 if plan.workers else None,
    )
    yield from loader


def draw(pictures: Pictures, device: str) -> Tensor:
    """Pictures on the device: [B, 3, H, W] in -1..1."""
    packed = pictures.packed.to(device, non_blocking=True)  # [B, 17]
    return render(packed, pictures.height, pictures.width)


def rate_at(step: int, steps: int, peak: float, decay_share: float) -> float:
    """The learning rate: it rises over the first steps, holds, then falls linearly to zero."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = min(1.0, (1 - step / steps) / decay_share)
    return peak * min(rise, fall)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
