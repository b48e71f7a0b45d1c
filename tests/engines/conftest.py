"""Fixtures: the engine under test and diffusers' own pipeline, on each device there is.

torch is imported only for tests that use them: those of the worker and the gradient need none.
"""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from promptdrop.engines.zimage import ZImageEngine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a device runs on each one there is."""
    if "device" in metafunc.fixturenames:
        from engines import DEVICES

        metafunc.parametrize("device", DEVICES, scope="session")


def loaded(device: str) -> "ZImageEngine":
    """An engine that warms up two small sizes."""
    from engines import configured
    from promptdrop.engines.zimage import ZImageEngine

    sizes = {"warmup": ["64x64", "128x64"], "compile": "off"}
    return ZImageEngine(configured(device, engine=sizes), lambda stage: None)


@pytest.fixture(scope="session")
def zimage(device: str) -> "ZImageEngine":
    """The engine under test; a test leaves it as it was."""
    return loaded(device)


@pytest.fixture
def fresh(device: str) -> "ZImageEngine":
    """An engine for one test, which may offload it."""
    return loaded(device)


@pytest.fixture(scope="session")
def library(device: str) -> Any:
    """diffusers' own pipeline on the same files and device."""
    import torch
    from diffusers import ZImagePipeline

    from promptdrop import weights

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = ZImagePipeline.from_pretrained(weights.DEMO, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
