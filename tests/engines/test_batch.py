"""Images rendered together equal those rendered alone; an error of one is not that of others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo_model.judge import look
from engines import Pixels, configured, rendered_together
from promptdrop import config as configuration
from promptdrop.config import Prompt
from promptdrop.engines import engine
from promptdrop.engines.engine import Engine
from promptdrop.engines.gradient import GradientEngine
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError, ImageCancelled
from promptdrop.nouns import SCHEDULERS, ImageSpec, Rendering
from specs import spec

CIRCLE = spec(prompt="a large red circle", width=128, height=128, steps=9)
PROMPTS = ("a large red circle in the center on a white background", "右下角有一个小的黄色三角形，蓝色背景", "a blue star " * 9)  # fmt: skip
TRIO = [CIRCLE._replace(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def zimage() -> ZImageEngine:
    """The demonstration model, three images together, on the CPU."""
    loaded = configured(engine={"batch": 3, "warmup": []})
    return ZImageEngine(loaded, lambda stage: None)


def pixels_of(results: list[tuple[Rendering, Pixels] | EngineError]) -> list[Pixels]:
    """Return the pixels of the images of a batch; none of them may have failed."""
    return [result[1] for result in results if not isinstance(result, EngineError)]


def alone(loaded: Engine, specs: list[ImageSpec]) -> list[Pixels]:
    """The same images, each a batch of its own."""
    return [pixels_of(rendered_together(loaded, [spec]))[0] for spec in specs]


def distance(some: list[Pixels], others: list[Pixels]) -> int:
    """The largest difference of any channel, of 255."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(one.astype(int) - other).max()) for one, other in pairs)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [0.0, 3.5])
def test_a_batch_draws_what_its_images_draw_alone(
    zimage: ZImageEngine, scheduler: str, guidance_scale: float
) -> None:
    """Each has the noise of its own seed, and texts of other lengths beside it change nothing."""
    specs = [
        spec._replace(
            scheduler=scheduler,
            guidance_scale=guidance_scale,
            negative_prompt="a green square " * spec.seed if spec.seed else None,
        )
        for spec in TRIO
        if spec.seed is not None
    ]
    results = rendered_together(zimage, specs)
    one, two, three = alone(zimage, specs)

    assert distance(pixels_of(results), [one, two, three]) <= 1
    assert distance([one], [two]) > 100


def test_a_batch_is_judged_as_its_images_are(zimage: ZImageEngine) -> None:
    """The judge sees the same things in images of a batch as in those rendered alone."""
    pictures = zip(pixels_of(rendered_together(zimage, TRIO)), alone(zimage, TRIO), strict=True)

    for mine, theirs in pictures:
        assert look(mine) == look(theirs)


def test_batches() -> None:
    """Batches are in order, each of one kind, and none is larger than asked for."""
    small, large = CIRCLE, CIRCLE._replace(width=256)
    specs = [small] * 5 + [large] + [small, small._replace(prompt="b", seed=1, meta={"a": 1})]

    assert [len(batch) for batch in engine.batches(specs, 2)] == [2, 2, 1, 1, 2]
    assert specs == [spec for batch in engine.batches(specs, 2) for spec in batch]


def test_what_the_renderings_say(zimage: ZImageEngine) -> None:
    """Denoising is timed for the batch, encoding and decoding for each image; `batch` is the number."""
    renderings = [
        one[0] for one in rendered_together(zimage, TRIO) if not isinstance(one, EngineError)
    ]

    assert [(3, 9, text) for text in PROMPTS] == [
        (one.batch, one.evaluations, one.prompt) for one in renderings
    ]
    assert len({one.latency_ms.denoise for one in renderings}) == 1
    assert len({one.latency_ms.decode for one in renderings}) == 3
    assert len({one.tokens for one in renderings}) == 3


def test_not_a_number_is_one_images_own(zimage: ZImageEngine) -> None:
    """NaN in one image does not reach the images beside it."""
    expected = alone(zimage, [TRIO[0], TRIO[2]])
    embeds = zimage.model.embeddings.of(PROMPTS[1], Prompt()).embeds
    kept = embeds.clone()
    embeds.fill_(float("nan"))
    try:
        first, second, third = rendered_together(zimage, TRIO)
    finally:
        embeds.copy_(kept)

    assert isinstance(second, EngineError)
    assert "latents are not finite" in str(second)
    assert distance(pixels_of([first, third]), expected) <= 1


def test_a_prompt_too_long_is_one_images_own(zimage: ZImageEngine) -> None:
    """The image is left out of the batch, and the others are rendered."""
    prompt = Prompt(max_tokens=32, overflow="refuse")
    results = rendered_together(zimage, TRIO, prompt)
    batches = [r[0].batch if not isinstance(r, EngineError) else str(r)[:7] for r in results]

    assert batches == [2, 2, "prompt:"]
    assert all(isinstance(r, EngineError) for r in rendered_together(zimage, [TRIO[2]] * 2, prompt))


def test_an_abandoned_batch_leaves_no_trace(zimage: ZImageEngine) -> None:
    """The next image, rendered alone, is what it was before, bit for bit."""

    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise ImageCancelled

    before = alone(zimage, TRIO[:1])
    buffers = [memoryview(bytearray(128 * 128 * 3)) for _ in TRIO]
    with pytest.raises(ImageCancelled):
        zimage.render(TRIO, Prompt(), stop, buffers)

    assert distance(alone(zimage, TRIO[:1]), before) == 0


def test_warm_up_meets_the_largest_batch() -> None:
    """Memory for the largest batch is allocated before jobs are taken."""
    engine = {"batch": 3, "warmup": ["64x64"]}
    loaded = ZImageEngine(configured(engine=engine, defaults={"steps": 2}), lambda stage: None)
    sizes: list[int] = []
    loaded.model.pipe.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))  # fmt: skip
    loaded.warm_up(lambda: None)

    assert sizes == [1, 1, 3, 3]


# The engine without a model


@pytest.fixture
def gradient() -> Engine:
    """The engine that draws gradients, without torch."""
    loaded = configuration.parse({"model": {"id": "gradient"}, "engine": {"batch": 3}})
    return engine.load(loaded, lambda stage: None)


def test_gradients_are_what_they_are_alone(gradient: Engine) -> None:
    """Images of a batch are, byte for byte, those rendered alone."""
    assert isinstance(gradient, GradientEngine)
    assert distance(pixels_of(rendered_together(gradient, TRIO)), alone(gradient, TRIO)) == 0


@pytest.mark.parametrize("fault", ["!raise", "!constant", "!once-constant {flag}"])
def test_a_scripted_fault_of_one_image(gradient: Engine, fault: str, tmp_path: Path) -> None:
    """The fault of one image leaves the others of its batch rendered."""
    prompt = fault.format(flag=tmp_path / "flag")
    first, second, third = rendered_together(
        gradient, [TRIO[0], CIRCLE._replace(prompt=prompt), TRIO[2]]
    )

    assert isinstance(second, EngineError)
    assert distance(pixels_of([first, third]), alone(gradient, [TRIO[0], TRIO[2]])) == 0


def test_a_scripted_fault_of_a_batch(gradient: Engine) -> None:
    """`!together` fails its whole batch, and is rendered when it is alone."""
    spec: Any = CIRCLE._replace(prompt="!together")
    with pytest.raises(EngineError, match="scripted by !together"):
        rendered_together(gradient, [TRIO[0], spec])

    assert len(alone(gradient, [spec])) == 1
