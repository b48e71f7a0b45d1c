"""The engine of scripts, `promptdrop.Engine`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import structlog

from engines import FOX, by_library, configured
from promptdrop.engines import script


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """The log that a script's engine sets up is gone after the test."""
    yield
    structlog.reset_defaults()


def test_scripts_use_the_same_engine(library: Any, device: str) -> None:
    """One image is returned as such, several as a list; drawn seeds are told."""
    spec = FOX._replace(steps=2)
    loaded = script.Engine(configured(device, engine={"compile": "off"}))
    size = {"width": spec.width, "height": spec.height, "steps": spec.steps}
    one = loaded.generate(spec.prompt, seed=spec.seed, **size)
    several = loaded.generate(spec.prompt, count=2, **size)

    assert isinstance(one, script.Generated)
    assert np.array_equal(by_library(library, spec), np.asarray(one.image))
    assert isinstance(several, list)
    again = by_library(library, spec._replace(seed=several[1].seed))
    assert np.array_equal(again, np.asarray(several[1].image))
    assert several[0].seed != several[1].seed
