"""Loading a checkpoint: the engine's info, its reports, and checkpoints that are refused."""

from pathlib import Path

import pytest

from engines import configured
from promptdrop import weights
from promptdrop.engines import engine
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import ConfigError, EngineStartError, ModelError


def test_info(zimage: ZImageEngine, device: str) -> None:
    """On the CPU the dtype falls back to float32, and there is no GPU's index."""
    info = zimage.info
    has_gpu = device != "cpu"

    assert (info.model, info.revision) == ("demo", None)
    assert (info.quantization, info.compiled) == ("none", False)
    assert info.dtype == ("bfloat16" if has_gpu else "float32")
    assert (info.device == "cpu", info.device_index is None) == (not has_gpu, not has_gpu)


def test_loading_says_what_it_does() -> None:
    """Loading reports its stages, since silence would count as hung."""
    stages: list[str] = []
    engine.load(configured("cpu"), stages.append)

    assert stages == ["importing", "loading weights", "moving to cpu"]


def test_a_device_that_is_not_there() -> None:
    """The error lists the devices that there are."""
    with pytest.raises(EngineStartError, match="cuda:97: no such device"):
        ZImageEngine(configured("cuda:97"), lambda stage: None)


def test_fp8_is_refused_where_nothing_multiplies_it() -> None:
    """It is refused before anything is loaded, and the error says what would work."""
    settings = configured("cpu", engine={"quantization": "fp8"})

    with pytest.raises(ConfigError, match="fp8: the CPU does not multiply fp8; expected"):
        ZImageEngine(settings, lambda stage: None)


def test_a_broken_checkpoint(tmp_path: Path) -> None:
    """Missing files are named before anything is loaded."""
    model = tmp_path / "model"
    weights.copy_demo(model)
    (model / "vae/config.json").unlink()

    with pytest.raises(ModelError, match=r"vae/config\.json \(missing\)"):
        ZImageEngine(configured(model=model), lambda stage: None)
