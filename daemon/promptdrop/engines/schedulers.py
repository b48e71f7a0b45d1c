"""Fit diffusers' schedulers, which lead an image from noise to latents, to the pipeline.

ZImagePipeline gives every scheduler `sigmas` and `mu` (pipeline_z_image.py:482) and none a generator.
Only flow-match Euler takes these, so the others take their noise levels from it:
the checkpoint's shift and the model's timesteps are then the same for all, whatever its
scheduler_config.json says.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from promptdrop.errors import ModelError

# x_t = (1 - sigma) * x_0 + sigma * noise, and the model predicts noise - x_0.
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
LEAST_SIGNAL = 1e-6  # 1 - sigma at the first step, where the log of it must be finite; UniPC's own


class _CheckpointLevels:
    """A library scheduler whose noise levels are those of the checkpoint's flow-match Euler."""

    checkpoint: Any  # FlowMatchEulerDiscreteScheduler
    generator: Any  # torch.Generator, or one for each image of the batch

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin an image. The signature is what `retrieve_timesteps` of the pipeline looks for."""
        self.checkpoint.set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
        levels = (
            self.checkpoint.sigmas
        )  # [N + 1], falling to 0; on the CPU, where the library keeps them
        timesteps = self.checkpoint.timesteps  # [N], not rounded to whole ones as the library does
        super().set_timesteps(len(timesteps))  # type: ignore[misc]  # the scheduler's
        self._take(levels, timesteps.to(device))

    def _take(self, levels: torch.Tensor, timesteps: torch.Tensor) -> None:
        self.sigmas, self.timesteps = levels, timesteps


class _LogSignalLevels(_CheckpointLevels):
    """Noise levels for solvers that step in log((1 - sigma) / sigma), which is infinite for pure noise.

    UniPC would solve a linear system with an infinity in it, with results that differ between devices.
    Anything from 1e-6 to 1e-3 changed no error against the exact solution by 1% at 4 to 9 steps.
    """

    def _take(self, levels: torch.Tensor, timesteps: torch.Tensor) -> None:
        super()._take(levels.clamp(max=1 - LEAST_SIGNAL), timesteps)


class DPMSolver(_LogSignalLevels, DPMSolverMultistepScheduler):  # type: ignore[misc]  # untyped
    """DPM-Solver++(2M) of Lu et al. (2022), arXiv 2211.01095, and its SDE variant."""

    def step(self, *arguments: Any, **options: Any) -> Any:
        """Do a step; the SDE variant draws its noise from the image's own generator."""
        return super().step(*arguments, generator=self.generator, **options)


class UniPC(_LogSignalLevels, UniPCMultistepScheduler):  # type: ignore[misc]  # untyped
    """UniPC of Zhao et al. (2023), arXiv 2302.04867, B2(h), order 2."""


class Heun(_CheckpointLevels, FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]  # untyped
    """Algorithm 1 of Karras et al. (2022), arXiv 2206.00364, without churn."""

    def _take(self, levels: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Repeat every level but the first and the final 0: there are 2N - 1 evaluations."""
        inner = levels[1:-1].repeat_interleave(2)  # [2N - 2]
        self.sigmas = torch.cat([levels[:1], inner, levels[-1:]])  # [2N]
        self.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])  # [2N - 1]


_NEW: dict[str, Callable[[], Any]] = {
    "dpmpp_2m": partial(DPMSolver, algorithm_type="dpmsolver++", **FLOW),
    "dpmpp_2m_sde": partial(DPMSolver, algorithm_type="sde-dpmsolver++", **FLOW),
    "unipc": partial(UniPC, solver_type="bh2", **FLOW),
    "heun": Heun,
}


def checkpoint_scheduler(pipe: Any, directory: Path) -> Any:
    """Return the scheduler of a loaded pipeline. Raises ModelError: it is not flow-match Euler."""
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ModelError(
            f"{directory}/scheduler: is a {type(pipe.scheduler).__name__};"
            " expected a FlowMatchEulerDiscreteScheduler"
        )
    return pipe.scheduler


def scheduler_for(name: str, checkpoint: Any, generator: Any) -> Any:
    """Make the scheduler of one batch, by its name in nouns.SCHEDULERS.

    checkpoint: the model's own scheduler, which is `euler`. generator: the image's, from which its latents
    have been drawn; a list for several images.
    """
    if name == "euler":
        return checkpoint
    scheduler = _NEW[name]()
    scheduler.checkpoint, scheduler.generator = checkpoint, generator
    return scheduler
