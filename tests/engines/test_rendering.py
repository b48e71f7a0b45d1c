"""Rendering against diffusers' own pipeline, on a small real checkpoint."""

from typing import Any

import numpy as np
import pytest

from engines import FOX, OUT_OF_MEMORY, by_library, encodings, failing, poisoned, rendered
from promptdrop.config import Prompt
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError, ImageCancelled, ImageTimeout


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"width": 256, "height": 256, "steps": 9},
        {"width": 320, "height": 192, "steps": 4, "seed": 2**63 - 1},
        {"steps": 1, "prompt": "一只猫坐在窗台上 🐈"},
        {"steps": 3, "guidance_scale": 3.5, "negative_prompt": "blurry, low quality"},
        {"steps": 3, "guidance_scale": 3.5, "width": 128},
        {"guidance_scale": 1.0, "negative_prompt": ""},
        {"negative_prompt": "not used without guidance"},
    ],
)
def test_the_pixels_are_the_librarys(
    zimage: ZImageEngine, library: Any, change: dict[str, Any]
) -> None:
    """Section 7 of the contract: pixels are identical to those of ZImagePipeline's own call."""
    spec = FOX._replace(**change)
    rendering, pixels = rendered(zimage, spec)

    assert np.array_equal(by_library(library, spec), pixels)
    assert spec.steps == rendering.evaluations == len(rendering.steps_ms)
    assert (rendering.prompt, rendering.truncated) == (spec.prompt, False)


@pytest.mark.parametrize("interruption", [ImageCancelled, ImageTimeout])
def test_an_abandoned_image_leaves_no_trace(
    zimage: ZImageEngine, library: Any, interruption: type[BaseException]
) -> None:
    """An exception that on_step raises ends the image; the next one is what it would have been."""

    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise interruption

    spec = FOX._replace(steps=4)
    with pytest.raises(interruption):
        rendered(zimage, spec._replace(width=128), on_step=stop)

    rendering, pixels = rendered(zimage, spec)
    assert np.array_equal(by_library(library, spec), pixels)
    assert rendering.evaluations == 4


def test_every_step_is_reported(zimage: ZImageEngine) -> None:
    """Each step is reported once, in order, also during warm-up."""
    steps: list[tuple[int, int]] = []
    rendered(zimage, FOX._replace(steps=3), on_step=lambda *step: steps.append(step))
    signs: list[None] = []
    zimage.warm_up(lambda: signs.append(None))

    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(signs) == 2 * 9


def test_the_latency_adds_up(zimage: ZImageEngine) -> None:
    """render is encode + denoise + decode + transfer; the steps lie within denoise."""
    rendering, _ = rendered(zimage, FOX._replace(steps=5))
    latency = rendering.latency_ms

    assert min(latency.encode, latency.denoise, latency.decode, latency.transfer) > 0
    assert 0.5 * latency.denoise < sum(rendering.steps_ms) <= latency.denoise
    assert (rendering.memory_peak_mib is None) == (zimage.info.device == "cpu")


def test_not_a_number_is_an_error(zimage: ZImageEngine, library: Any) -> None:
    """An image with NaN fails; the library would return a black one."""
    pipe, nan = zimage.model.pipe, float("nan")
    with poisoned(pipe.transformer.layers[0], nan), pytest.raises(EngineError, match="latents"):
        rendered(zimage, FOX)
    with poisoned(pipe.vae.decoder.conv_out, nan), pytest.raises(EngineError, match="decoded"):
        rendered(zimage, FOX)

    assert np.array_equal(by_library(library, FOX), rendered(zimage, FOX)[1])


def test_one_colour_is_an_error(zimage: ZImageEngine) -> None:
    """An image of one colour is a failure, whatever the colour."""
    layer = zimage.model.pipe.vae.decoder.conv_out
    with poisoned(layer, 0.0), pytest.raises(EngineError, match="same colour"):
        rendered(zimage, FOX)


def test_the_next_text_is_encoded_between_two_steps(zimage: ZImageEngine, library: Any) -> None:
    """Neither image's pixels change, and the next one encodes nothing itself."""
    coming = FOX._replace(prompt="an owl", guidance_scale=2.0, negative_prompt="a hen", seed=8)

    def prepare(step: int, steps: int) -> None:
        if step == 1:
            zimage.prepare(coming, Prompt())

    with encodings(zimage.model.pipe) as before:
        first = rendered(zimage, FOX, on_step=prepare)[1]
    with encodings(zimage.model.pipe) as after:
        pixels = rendered(zimage, coming)[1]

    assert before[-2:] == [512, 512]  # the library's own padding
    assert after == []
    assert np.array_equal(by_library(library, FOX), first)
    assert np.array_equal(by_library(library, coming), pixels)


def test_what_is_wrong_with_the_next_image_is_its_own(zimage: ZImageEngine, library: Any) -> None:
    """If its text is too long or memory is short, preparing it raises nothing, but its own render does."""
    refuse = Prompt(max_tokens=64, overflow="refuse")
    long, owl = FOX._replace(prompt="word " * 100), FOX._replace(prompt="a white owl")
    zimage.prepare(long, refuse)
    with failing(zimage.model.pipe.text_encoder.layers[0], OUT_OF_MEMORY):
        zimage.prepare(owl, Prompt())

    assert np.array_equal(by_library(library, owl), rendered(zimage, owl)[1])
    with pytest.raises(EngineError, match="at most 64"):
        rendered(zimage, long, refuse)
