"""The engine for scripts: no spool, no second process, no timeout."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from promptdrop import config as configuration
from promptdrop import config_file, log
from promptdrop.config import Config
from promptdrop.engines import engine
from promptdrop.errors import EngineError
from promptdrop.nouns import EngineInfo, ImageSpec, Rendering
from promptdrop.request import parse


@dataclass(frozen=True, slots=True)
class Generated:
    """One image and how it was rendered. The same prompt, fields and seed make it again."""

    image: Image.Image
    seed: int
    rendering: Rendering

    def save(self, path: str | Path) -> None:
        """Write the image to a file; the ending of its name chooses the format."""
        self.image.save(path)


class Engine:
    """A warm engine in this process."""

    info: EngineInfo

    def __init__(self, config: Config | str | Path | Mapping[str, Any]) -> None:
        """Load the model of a Config, of a config.yaml, or of its keys as a mapping.

        Raises ConfigError, ModelError, EngineStartError; a wrong mapping: pydantic.ValidationError.
        """
        if isinstance(config, str | Path):
            config = config_file.load(Path(config))
        elif isinstance(config, Mapping):
            config = configuration.parse(dict(config))
        log.set_up_for_scripts()
        self._config = config
        self._engine = engine.load(config, lambda stage: None)
        self.info = self._engine.info

    def generate(self, prompt: str, **fields: Any) -> Generated | list[Generated]:
        """Render what a JSON job of this prompt and these fields would ask for; seeds are drawn at random.

        Returns a list if the fields ask for several images (`count`, a list of seeds).

        Raises RequestError: a field is unknown or out of range. EngineError: an image failed.
        """
        data = json.dumps({"prompt": prompt, **fields}).encode()
        images = [self._seeded(spec) for spec in parse.parse(data, ".json", self._config).images]
        most = self._config.engine.batch
        made = [one for specs in engine.batches(images, most) for one in self._render(specs)]
        return made[0] if len(made) == 1 else made

    def _seeded(self, spec: ImageSpec) -> ImageSpec:
        return spec if spec.seed is not None else spec._replace(seed=secrets.randbits(32))

    def _render(self, specs: list[ImageSpec]) -> list[Generated]:
        pixels = [bytearray(spec.height * spec.width * 3) for spec in specs]
        buffers = [memoryview(one) for one in pixels]
        results = self._engine.render(specs, self._config.prompt, lambda *step: None, buffers)
        return [_generated(*one) for one in zip(specs, pixels, results, strict=True)]


def _generated(spec: ImageSpec, pixels: bytearray, result: Rendering | EngineError) -> Generated:
    if isinstance(result, EngineError):
        raise result
    assert spec.seed is not None
    image = Image.frombytes("RGB", (spec.width, spec.height), pixels)
    return Generated(image, spec.seed, result)
