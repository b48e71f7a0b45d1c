"""Asking a job file for its images, or for the words it is refused with."""

from typing import Any

import pytest

from promptdrop import config
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.nouns import ImageSpec
from promptdrop.request.parse import parse

CONFIG = config.parse({"model": {"id": "x"}})
SUFFIXES = (".txt", ".prompt", ".yaml", ".yml", ".json", ".jsonl", ".csv")


def configured(**sections: Any) -> Config:
    """A configuration with these sections."""
    return config.parse({"model": {"id": "x"}, **sections})


def images(
    text: str | bytes, suffix: str = ".yaml", settings: Config = CONFIG
) -> tuple[ImageSpec, ...]:
    """The images that a file asks for."""
    data = text if isinstance(text, bytes) else text.encode()
    return parse(data, suffix, settings).images


def image(text: str | bytes, suffix: str = ".yaml", settings: Config = CONFIG) -> ImageSpec:
    """The one image that a file asks for."""
    (spec,) = images(text, suffix, settings)
    return spec


def refusal(text: str | bytes, suffix: str = ".yaml", settings: Config = CONFIG) -> list[str]:
    """The problems that a file is refused for."""
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(RequestError) as caught:
        parse(data, suffix, settings)
    return [str(problem) for problem in caught.value.problems]
