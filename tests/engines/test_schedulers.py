"""Every scheduler solves the flow it is given, from the image's own seed and nothing else."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ZImagePipeline,
)
from diffusers.pipelines.z_image.pipeline_z_image import retrieve_timesteps

from bench.schedulers import error, exact, solved, velocity, with_analytic_field
from engines import configured, rendered
from harness import REPOSITORY
from promptdrop import weights
from promptdrop.engines.schedulers import scheduler_for
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import ImageCancelled, ImageTimeout, ModelError
from promptdrop.nouns import SCHEDULERS, ImageSpec
from specs import spec

SMALL = 64  # px: 1024 latent values
OF_SECOND_ORDER = ("dpmpp_2m", "unipc", "heun")
CIRCLE = spec(prompt="a red circle", width=96, height=64, steps=4)


@pytest.fixture(scope="module")
def field() -> ZImagePipeline:
    """The pipeline around a velocity field whose exact solution is known."""
    return with_analytic_field(weights.DEMO)


@pytest.fixture(scope="module")
def engine() -> ZImageEngine:
    """The demonstration model on the CPU."""
    return ZImageEngine(configured(), lambda stage: None)


def pictures(engine: ZImageEngine, spec: ImageSpec) -> dict[str, bytes]:
    """One image by each scheduler."""
    return {
        name: rendered(engine, spec._replace(scheduler=name))[1].tobytes() for name in SCHEDULERS
    }


def test_the_exact_solution_is_one() -> None:
    """A very fine Euler walk along the velocity ends where the closed form says."""
    noise = torch.linspace(-3, 3, 31)
    x = noise.double()
    for sigma, below in pairwise(torch.linspace(1, 0, 2001, dtype=torch.float64).tolist()):
        x = x + (below - sigma) * velocity(x, sigma)

    assert float((x - exact(noise)).abs().max()) < 0.005


@pytest.mark.parametrize(
    ("scheduler", "order", "bound"),
    [("euler", 1, 0.03), *((name, 2, 0.006) for name in OF_SECOND_ORDER)],
)
def test_the_exact_solution_is_approached(
    field: ZImagePipeline, scheduler: str, order: int, bound: float
) -> None:
    """Twice the steps halve a first-order method's error and nearly quarter a second-order method's."""
    errors = [error(scheduler, *solved(field, scheduler, n, SMALL)) for n in (9, 20, 40, 80)]

    assert errors == sorted(errors, reverse=True)
    assert errors[2] / errors[3] > 1.5**order
    assert errors[3] < bound


@pytest.mark.parametrize("scheduler", OF_SECOND_ORDER)
def test_second_order_is_worth_it(field: ZImagePipeline, scheduler: str) -> None:
    """At 9 steps each second-order method is at least a third nearer than Euler."""
    euler, other = (error(n, *solved(field, n, 9, SMALL)) for n in ("euler", scheduler))

    assert other < euler * 2 / 3


def test_the_sde_keeps_the_distribution(field: ZImagePipeline) -> None:
    """Its noise leads each value elsewhere, and all of them together to the data's distribution."""
    noise, latents = solved(field, "dpmpp_2m_sde", 40)

    assert error("dpmpp_2m_sde", noise, latents) < 0.05
    assert error("as if an ODE", noise, latents) > 0.5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 100])
def test_every_number_of_steps(field: ZImagePipeline, scheduler: str, steps: int) -> None:
    """The first level, where there is no signal, and the last, without noise, leave no NaN."""
    _, latents = solved(field, scheduler, steps, SMALL)

    assert bool(torch.isfinite(latents).all())
    assert float(latents.abs().max()) < 6


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_batch_is_what_its_images_are_alone(field: ZImagePipeline, scheduler: str) -> None:
    """Every image of a batch has its own generator."""
    together = solved(field, scheduler, 4, SMALL, 5, 6)[1]
    alone = [solved(field, scheduler, 4, SMALL, seed)[1] for seed in (5, 6)]

    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    "settings", [{"shift": 3.0}, {"shift": 6.0}, {"use_dynamic_shifting": True}]
)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_checkpoints_levels(scheduler: str, settings: dict[str, Any]) -> None:
    """Noise levels and timesteps are those of the checkpoint's own scheduler, whatever its shift."""
    asked = {"sigmas": torch.linspace(1, 1 / 9, 9).tolist(), "mu": 0.8}
    own = FlowMatchEulerDiscreteScheduler(**settings)
    retrieve_timesteps(own, 9, "cpu", **asked)
    checkpoint = FlowMatchEulerDiscreteScheduler(**settings)
    ours = scheduler_for(scheduler, checkpoint, None)
    timesteps, count = retrieve_timesteps(ours, 9, "cpu", **asked)

    assert len(timesteps) == count == (17 if scheduler == "heun" else 9)
    assert torch.equal(timesteps.unique(), own.timesteps.unique())
    assert torch.allclose(ours.sigmas.unique(), own.sigmas.unique(), atol=2e-6, rtol=0)
    assert (float(ours.sigmas[0]) == 1) == (scheduler in ("euler", "heun"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_every_evaluation_is_counted_and_told(
    engine: ZImageEngine, scheduler: str, steps: int
) -> None:
    """There are N evaluations, heun has 2N - 1; progress goes up to that number one by one."""
    told: list[tuple[int, int]] = []
    spec = CIRCLE._replace(scheduler=scheduler, steps=steps)
    rendering, _ = rendered(engine, spec, on_step=lambda *step: told.append(step))
    expected = 2 * steps - 1 if scheduler == "heun" else steps

    assert rendering.evaluations == len(rendering.steps_ms) == spec.evaluations == expected
    assert told == [(n + 1, expected) for n in range(expected)]


def test_a_seed_is_a_picture(engine: ZImageEngine) -> None:
    """A seed gives the same bits, whatever was rendered or abandoned before and whatever else is drawn."""

    def disturbed(step: int, steps: int) -> None:
        torch.rand(step)

    def abandoned(step: int, steps: int) -> None:
        if step == 2:
            raise ImageTimeout if steps == CIRCLE.steps else ImageCancelled

    torch.manual_seed(1)
    first = pictures(engine, CIRCLE)
    others = pictures(engine, CIRCLE._replace(seed=8))
    pictures(engine, CIRCLE._replace(seed=8, width=64, steps=3))
    for scheduler in SCHEDULERS:
        with pytest.raises((ImageTimeout, ImageCancelled)):
            rendered(engine, CIRCLE._replace(scheduler=scheduler), on_step=abandoned)
        _, again = rendered(engine, CIRCLE._replace(scheduler=scheduler), on_step=disturbed)
        assert again.tobytes() == first[scheduler]

    assert len({*first.values(), *others.values()}) == 2 * len(SCHEDULERS)


def test_nobody_elses_numbers_are_drawn(engine: ZImageEngine) -> None:
    """The state of torch's global generator does not change."""
    before = torch.get_rng_state()
    pictures(engine, CIRCLE)

    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_with_another_scheduler(tmp_path: Path) -> None:
    """Whatever is not flow-match Euler is refused when loading, by name."""
    model = tmp_path / "model"
    weights.copy_demo(model)
    FlowMatchHeunDiscreteScheduler().save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(ModelError, match="is a FlowMatchHeunDiscreteScheduler; expected"):
        ZImageEngine(configured(model=model), lambda stage: None)


def test_the_documented_figures_were_measured() -> None:
    """The table of docs/performance.md is what bench/schedulers.py recorded."""
    document = (REPOSITORY / "docs/performance.md").read_text()
    measured = json.loads((REPOSITORY / "bench/schedulers.json").read_text())
    for name, errors in measured["analytic"].items():
        drawn = measured["demonstration model"]["rows"][f"{name} 9"]
        cells = ", ".join(f"{e:.3f}" for e in errors.values())
        row = f"| {cells} | {drawn['psnr_db']:.1f} dB | {drawn['right']:.0%} |\n"
        evaluations = CIRCLE._replace(scheduler=name, steps=9).evaluations

        assert f"| `{name}` | {evaluations} {row}" in document
    for also in ("unipc 6", "heun 5", "euler 9, another seed"):
        assert f"{measured['demonstration model']['rows'][also]['psnr_db']:.1f} dB" in document
