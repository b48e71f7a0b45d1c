"""Errors of the device, too little memory, and a warm-up that fails."""

from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from engines import (
    FOX,
    OUT_OF_MEMORY,
    by_library,
    cures,
    failing,
    limited,
    poisoned,
    rendered,
    rendered_together,
)
from promptdrop.config import Prompt
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError, EngineStartError

EMPTIED = "the cache was emptied"
HALVED = "the batch is halved"
TILED = "the image is decoded in tiles"
ENCODER, MODEL = (
    f"offloaded as with engine.offload: {offload}, until a restart"
    for offload in ("text_encoder", "model")
)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
    ],
    ids=lambda error: str(error).replace(" ", "-"),
)
def test_an_error_of_the_device_ends_the_engine_process(
    zimage: ZImageEngine, error: RuntimeError
) -> None:
    """After one of these every later call fails too, so that nobody may take it for an EngineError."""
    with (
        failing(zimage.model.pipe.transformer.layers[0], error),
        pytest.raises(type(error)) as escaped,
    ):
        rendered(zimage, FOX)

    assert escaped.value is error


def test_an_error_of_the_device_in_the_next_text_ends_the_engine_process(
    zimage: ZImageEngine,
) -> None:
    """It is not taken for an EngineError of either image, since every later call fails, too."""
    layer, error = zimage.model.pipe.text_encoder.layers[0], RuntimeError("CUDA error: device-side")
    with failing(layer, error), pytest.raises(RuntimeError) as escaped:
        zimage.prepare(FOX._replace(prompt="a grey owl"), Prompt())

    assert escaped.value is error


def test_out_of_device_memory_costs_an_image_and_not_the_engine(
    fresh: ZImageEngine, library: Any
) -> None:
    """The next image is what it would have been, alone and in a batch, from an engine that offloads."""
    with (
        capture_logs() as logged,
        failing(fresh.model.pipe.transformer.layers[0], OUT_OF_MEMORY),
        pytest.raises(EngineError, match="out of device memory at 64x96: CUDA out of memory"),
    ):
        rendered(fresh, FOX)

    assert cures(logged) == [(1, cure) for cure in (EMPTIED, TILED, ENCODER, MODEL)]
    assert np.array_equal(by_library(library, FOX), rendered(fresh, FOX)[1])


@pytest.mark.parametrize("enough", ["text_encoder", "model"])
def test_out_of_memory_until_it_offloads(fresh: ZImageEngine, library: Any, enough: str) -> None:
    """No more is offloaded than has to be, and it stays so for later images."""
    layer = fresh.model.pipe.vae.decoder.conv_in
    with (
        capture_logs() as logged,
        limited(layer, OUT_OF_MEMORY, lambda _: fresh.model.offload == enough),
    ):
        pixels = [rendered(fresh, FOX)[1], rendered(fresh, FOX)[1]]

    tried = [EMPTIED, TILED, ENCODER, MODEL]
    assert cures(logged) == [(1, cure) for cure in tried[: 3 if enough == "text_encoder" else 4]]
    assert all(np.array_equal(by_library(library, FOX), each) for each in pixels)


def test_out_of_memory_for_a_moment(zimage: ZImageEngine, library: Any) -> None:
    """The image is tried again, and is what it would have been."""
    evaluations = iter(range(100))
    layer = zimage.model.pipe.transformer.layers[0]
    with capture_logs() as logged, limited(layer, OUT_OF_MEMORY, lambda _: next(evaluations) != 1):
        pixels = rendered(zimage, FOX)[1]

    assert np.array_equal(by_library(library, FOX), pixels)
    assert cures(logged) == [(1, EMPTIED)]


def test_out_of_memory_for_a_batch(zimage: ZImageEngine, library: Any) -> None:
    """It is halved until it fits, and every image is finished."""
    specs = [FOX._replace(seed=seed) for seed in range(3)]
    with (
        capture_logs() as logged,
        limited(zimage.model.pipe.transformer, OUT_OF_MEMORY, lambda latents: len(latents) < 2),
    ):
        results = rendered_together(zimage, specs)

    for spec, result in zip(specs, results, strict=True):
        assert not isinstance(result, EngineError)
        assert result[0].batch == 1
        assert np.array_equal(by_library(library, spec), result[1])
    assert cures(logged) == [(3, EMPTIED), (3, HALVED), (2, EMPTIED), (2, HALVED)]


def test_out_of_memory_for_the_decoder(zimage: ZImageEngine, library: Any) -> None:
    """The image is decoded in tiles, with nearly the same picture; the next one is decoded whole again."""
    spec = FOX._replace(width=320, height=288)
    decoder = zimage.model.pipe.vae.decoder
    with (
        capture_logs() as logged,
        limited(decoder, OUT_OF_MEMORY, lambda latents: max(latents.shape[2:]) <= 32),
    ):
        pixels = rendered(zimage, spec)[1]
    whole = by_library(library, spec)

    assert cures(logged) == [(1, EMPTIED), (1, TILED)]
    assert np.abs(pixels.astype(int) - whole).mean() < 2
    assert np.array_equal(whole, rendered(zimage, spec)[1])


def test_warm_up_failing_is_a_failed_start(zimage: ZImageEngine) -> None:
    """An engine that cannot render is not ready."""
    layer = zimage.model.pipe.vae.decoder.conv_out
    with poisoned(layer, 0.0), pytest.raises(EngineStartError, match="64x64"):
        zimage.warm_up(lambda: None)
