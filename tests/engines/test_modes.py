"""Every way to run the engine on a GPU draws the library's pictures; only there do its kernels run."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engines import configured, rendered_together
from promptdrop.config import Prompt
from promptdrop.engines.engine import FP8_CAPABILITY
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError
from promptdrop.nouns import ImageSpec
from specs import spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = (
    "a large red circle in the middle on a white background",
    "a small blue star in the upper left corner, green background",
    "一个黄色的三角形",
)
SPECS = [
    spec(prompt=prompt, width=192, height=192, steps=9, seed=7 + n)
    for n, prompt in enumerate(PROMPTS)
]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY


def drawn(root: Path, batch: int = 1, **engine: Any) -> npt.NDArray[np.int64]:
    """Three images [3, H, W, 3]; each one's text is encoded while the one before is rendered."""
    settings = {"warmup": ["192x192"], "batch": batch, **engine}
    loaded = ZImageEngine(configured("cuda:0", root=str(root), engine=settings), lambda stage: None)
    loaded.warm_up(lambda: None)
    images = []
    for first in range(0, len(SPECS), batch):
        specs, coming = SPECS[first : first + batch], SPECS[first + batch :]

        def on_step(step: int, steps: int, coming: list[ImageSpec] = coming) -> None:
            if coming and step == 2:
                loaded.prepare(coming[0], Prompt())

        for result in rendered_together(loaded, specs, on_step=on_step):
            assert not isinstance(result, EngineError), result
            images.append(result[1])
    return np.stack(images).astype(np.int64)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.int64]:
    """The images of `compile: off`, which are the library's to the bit (test_rendering.py)."""
    return drawn(tmp_path_factory.mktemp("library"), compile="off")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("offload", ["none", "text_encoder", "model"])
@pytest.mark.parametrize("compile_", ["off", "on"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_every_mode_draws_the_same(
    tmp_path: Path,
    library: npt.NDArray[np.int64],
    offload: str,
    compile_: str,
    batch: int,
    quantization: str,
) -> None:
    """Offloading alone changes no bit; every other mode differs by no more than rounding does."""
    if quantization == "fp8" and not HAS_FP8:
        pytest.skip("the device does not multiply fp8")
    images = drawn(tmp_path, batch, offload=offload, compile=compile_, quantization=quantization)
    difference = np.abs(images - library)

    if (batch, compile_, quantization) == (1, "off", "none"):
        assert difference.max() == 0
    assert difference.mean() < (3 if quantization == "fp8" else 1)  # of 255
