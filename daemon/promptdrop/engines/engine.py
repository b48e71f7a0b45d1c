"""The protocol of engines, and the table of those there are. Importing this imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import groupby, islice
from typing import Protocol

from promptdrop import weights
from promptdrop.config import Config, Prompt, width_height
from promptdrop.errors import ConfigError, EngineError
from promptdrop.nouns import EngineInfo, ImageSpec, Rendering

OnStage = Callable[[str], None]  # what loading is doing now
OnStep = Callable[[int, int], None]  # (step, steps): so many evaluations are done, of so many

# By model.id; imported only when asked for.
ENGINES = {"gradient": "promptdrop.engines.gradient:GradientEngine"}
DEFAULT_ENGINE = "promptdrop.engines.zimage:ZImageEngine"

FP8_CAPABILITY = 8, 9  # of CUDA devices: Ada's and Hopper's matrix units multiply fp8


class Engine(Protocol):
    """A model that is loaded on a device. It renders one batch at a time, called from one thread."""

    info: EngineInfo

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every size of `engine.warmup` once; calls on_step at every step.

        Raises EngineStartError: it cannot render.
        """

    def render(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Render images of one `ImageSpec.kind` together, each with its own seed, which must be set.

        The pixels go into the buffers: uint8 [height, width, 3], RGB. An exception that on_step raises
        ends all of them and leaves the engine good.

        Returns for each image how it was rendered, or why it alone was not.
        Raises EngineError: they all failed; the engine is still good.
        """

    def prepare(self, spec: ImageSpec, prompt: Prompt) -> None:
        """Encode the texts of an image that comes next; called by the on_step of those in hand.

        Errors are ignored here: the image's own `render` raises them again.
        """

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Count the tokens of each prompt, the template included and nothing cut."""

    def empty_cache(self) -> None:
        """Give cached memory back to the device."""


def render_one(
    engine: Engine, spec: ImageSpec, prompt: Prompt, on_step: OnStep, buffer: memoryview
) -> Rendering:
    """Render an image alone, as `Engine.render` does. Raises EngineError: it failed."""
    (result,) = engine.render([spec], prompt, on_step, [buffer])
    if isinstance(result, EngineError):
        raise result
    return result


def batches(specs: Iterable[ImageSpec], most: int) -> Iterator[list[ImageSpec]]:
    """Group specs, in order, into batches of one kind and of at most `most`."""
    for _, alike in groupby(specs, key=lambda spec: spec.kind):
        while batch := [*islice(alike, most)]:
            yield batch


def warm_up_spec(config: Config, size: str, prompt: str) -> ImageSpec:
    """Make the spec of an image with the default settings, which is rendered and thrown away."""
    width, height = width_height(size)
    return ImageSpec(
        image=1,
        prompt=prompt,
        negative_prompt=None,
        width=width,
        height=height,
        steps=config.defaults.steps,
        guidance_scale=config.defaults.guidance_scale,
        seed=0,
        scheduler=config.defaults.scheduler,
        format="png",
        timeout_seconds=config.engine.load_timeout_seconds,
    )


def load(config: Config, on_stage: OnStage) -> Engine:
    """Load the configured engine. Called in the engine process, or in a script's own.

    Raises ConfigError, ModelError, EngineStartError.
    """
    on_stage("importing")
    module, _, name = ENGINES.get(config.model.id, DEFAULT_ENGINE).partition(":")
    engine: Engine = getattr(import_module(module), name)(config, on_stage)
    return engine


def needs_weights(config: Config) -> bool:
    """Whether the configured engine reads a model's files."""
    return config.model.id not in ENGINES


def require(config: Config) -> None:
    """Check the model's files, if the engine reads any. Raises ModelError: some are missing or broken."""
    if needs_weights(config):
        weights.require(config)


def require_quantization(config: Config, device: str, capability: tuple[int, int] | None) -> None:
    """Check that a device can do what `engine.quantization` asks; capability: CUDA's, None on the CPU.

    Raises ConfigError: it has no matrix units for fp8.
    """
    named = device if capability else "the CPU"
    if config.engine.quantization == "fp8" and (capability or (0, 0)) < FP8_CAPABILITY:
        raise ConfigError(
            f"engine.quantization: fp8: {named} does not multiply fp8; expected an NVIDIA GPU of"
            " compute capability 8.9 or later (Ada, Hopper), or engine.quantization: none"
        )
