"""What an engine is, and where its implementations are. Importing this imports no torch."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from promptdrop import weights
from promptdrop.config import Config, Prompt
from promptdrop.job import EngineInfo, ImageSpec, Rendering

OnStage = Callable[[str], None]  # what loading is doing now
OnStep = Callable[[int, int], None]  # (step, steps): so many evaluations are done, of so many

# By model.id; imported only when asked for.
ENGINES = {"gradient": "promptdrop.engines.gradient:GradientEngine"}
DEFAULT_ENGINE = "promptdrop.engines.zimage:ZImageEngine"


class Engine(Protocol):
    """A model on a device, loaded. One image at a time, from one thread."""

    info: EngineInfo

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every size of `engine.warmup` once; calls on_step at every step.

        Raises EngineStartError: it cannot render.
        """

    def render(
        self, spec: ImageSpec, prompt: Prompt, on_step: OnStep, buffer: memoryview
    ) -> Rendering:
        """Render one image into `buffer`: uint8 [height, width, 3], RGB; spec.seed must be set.

        What on_step raises ends the image and leaves the engine good.

        Raises EngineError: this image failed; the engine is still good.
        """

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt has once templated, uncut."""

    def empty_cache(self) -> None:
        """Give cached memory back to the device."""


def load(config: Config, on_stage: OnStage) -> Engine:
    """Load the configured engine. Called in the engine process, or in a script's own.

    Raises ModelError, EngineStartError.
    """
    on_stage("importing")
    module, _, name = ENGINES.get(config.model.id, DEFAULT_ENGINE).partition(":")
    engine: Engine = getattr(import_module(module), name)(config, on_stage)
    return engine


def needs_weights(config: Config) -> bool:
    """Whether the configured engine reads a model's files: `weights.require` is for these."""
    return config.model.id not in ENGINES


def require(config: Config) -> None:
    """Whether the model can be loaded, as far as its files tell. Raises ModelError."""
    if needs_weights(config):
        weights.require(config)
