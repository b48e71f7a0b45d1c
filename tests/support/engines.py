"""Engines of the demonstration model: rendering with them, and faults put into them.

Importing this imports torch. Where there is a CUDA device, DEVICES has it too: rules are tried there in
bfloat16.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from promptdrop import config as configuration
from promptdrop import weights
from promptdrop.config import Config, Prompt
from promptdrop.engines.engine import Engine
from promptdrop.errors import EngineError
from promptdrop.nouns import ImageSpec, Rendering
from specs import spec

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
OnStep = Callable[[int, int], None]

torch.set_num_threads(1)  # the small model is quickest like this, by far on a busy machine

DEVICES = ["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
FOX = spec(prompt="a red fox in the snow", width=64, height=96)


def configured(
    device: str = "cpu", model: Path = weights.DEMO, **changes: dict[str, Any] | str
) -> Config:
    """An engine's configuration, by default of the demonstration model; `changes` by section."""
    of_model = {"path": str(model), "device": device}
    return configuration.parse({"model": of_model, **changes})


def say_nothing(step: int, steps: int) -> None:
    """An on_step for tests that do not look at steps."""


def rendered_together(
    engine: Engine,
    specs: list[ImageSpec],
    prompt: Prompt | None = None,
    on_step: OnStep = say_nothing,
) -> list[tuple[Rendering, Pixels] | EngineError]:
    """Render a batch: each image with its pixels, or why it failed."""
    buffers = [bytearray(spec.height * spec.width * 3) for spec in specs]
    results = engine.render(specs, prompt or Prompt(), on_step, [*map(memoryview, buffers)])
    return [
        result
        if isinstance(result, EngineError)
        else (result, np.frombuffer(buffer, np.uint8).reshape(spec.height, spec.width, 3))
        for result, buffer, spec in zip(results, buffers, specs, strict=True)
    ]


def rendered(
    engine: Engine, spec: ImageSpec, prompt: Prompt | None = None, on_step: OnStep = say_nothing
) -> tuple[Rendering, Pixels]:
    """Render an image alone. Raises EngineError: it failed."""
    (result,) = rendered_together(engine, [spec], prompt, on_step)
    if isinstance(result, EngineError):
        raise result
    return result


def by_library(library: Any, spec: ImageSpec) -> Pixels:
    """Render with diffusers' own pipeline: the call of the contract's section 7."""
    assert spec.seed is not None
    image = library(
        spec.prompt,
        negative_prompt=spec.negative_prompt,
        height=spec.height,
        width=spec.width,
        num_inference_steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        generator=torch.Generator(library.device).manual_seed(spec.seed),
    ).images[0]
    return np.asarray(image)


@contextmanager
def poisoned(module: torch.nn.Module, value: float) -> Iterator[None]:
    """Fill a layer's weights for a while."""
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    try:
        yield
    finally:
        module.load_state_dict(kept)


@contextmanager
def failing(layer: torch.nn.Module, error: Exception) -> Iterator[None]:
    """Have a layer raise for a while."""
    with limited(layer, error, lambda *_: False):
        yield


@contextmanager
def limited(
    layer: torch.nn.Module, error: Exception, fits: Callable[[Any], bool]
) -> Iterator[None]:
    """Have a layer raise at inputs that do not fit, for a while."""

    def fail(_: Any, inputs: Any) -> None:
        if not fits(inputs[0]):
            raise error

    hook = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def encodings(pipe: Any) -> Iterator[list[int]]:
    """Collect the number of tokens, padding included, each time that the text encoder runs."""
    tokens: list[int] = []
    hook = pipe.text_encoder.layers[0].register_forward_pre_hook(
        lambda layer, inputs: tokens.append(inputs[0].shape[1])
    )
    try:
        yield tokens
    finally:
        hook.remove()


def cures(logged: Iterable[Any]) -> list[tuple[int, str]]:
    """The cures tried against an error of memory, by the log: (images, cure)."""
    return [(e["images"], e["cure"]) for e in logged if e["event"] == "engine.out_of_memory"]
