"""Fixtures: the engine under test and diffusers' own pipeline, on each device there is."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline

from engines import DEVICES, configured
from promptdrop import weights
from promptdrop.config import Config
from promptdrop.engines.zimage import ZImageEngine


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The small model is quickest on one thread, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the engine and the library run."""
    return str(request.param)


def small(device: str) -> Config:
    """An engine that warms up two small sizes."""
    return configured(device, engine={"warmup": ["64x64", "128x64"], "compile": "off"})


@pytest.fixture(scope="session")
def zimage(device: str) -> ZImageEngine:
    """The engine under test; a test leaves it as it was."""
    return ZImageEngine(small(device), lambda stage: None)


@pytest.fixture
def fresh(device: str) -> ZImageEngine:
    """An engine for one test, which may offload it."""
    return ZImageEngine(small(device), lambda stage: None)


@pytest.fixture(scope="session")
def library(device: str) -> Any:
    """diffusers' own pipeline on the same files and device."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = ZImagePipeline.from_pretrained(weights.DEMO, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
