"""A compiled engine draws what an uncompiled one does, compiles nothing later, survives a broken cache."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from engines import FOX, configured, rendered, rendered_together
from promptdrop.engines import compile_cache
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError

CIRCLE = FOX._replace(prompt="a red circle")


@pytest.fixture(autouse=True)
def cache_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that name the cache are put back after a test."""
    for variable in compile_cache.VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def engine_of(root: Path, compile_: str) -> ZImageEngine:
    """An engine that keeps compiled code below `root`."""
    engine = {"compile": compile_, "warmup": ["64x96"], "batch": 3}
    loaded = configured(root=str(root), engine=engine, prompt={"max_tokens": 96})
    return ZImageEngine(loaded, lambda stage: None)


@pytest.mark.timeout(900)
def test_a_compiled_engine_compiles_at_warm_up_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It draws the uncompiled engine's picture; other texts, sizes and guidance compile nothing."""
    plain = engine_of(tmp_path, "off")
    specs = [
        CIRCLE,
        CIRCLE._replace(prompt="a blue star " * 12),
        CIRCLE._replace(width=96, height=80),
        CIRCLE._replace(guidance_scale=2.0, negative_prompt="a green ring " * 8),
    ]
    expected = [rendered(plain, spec)[1] for spec in specs]
    torch.compiler.reset()
    counters.clear()
    engine = engine_of(tmp_path, "on")
    engine.warm_up(lambda: None)
    graphs = counters["stats"]["unique_graphs"]
    renderings, images = zip(*[rendered(engine, spec) for spec in specs], strict=True)

    assert engine.info.compiled
    assert [one.compiled for one in renderings] == [True, True, False, True]
    assert capsys.readouterr().out.count("engine.size_not_warmed") == 1
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    for mine, theirs in zip(images, expected, strict=True):
        assert np.abs(mine.astype(int) - theirs).max() <= 1

    engine.renderer.is_warm = False  # a shape that fits no graph would now be compiled, and counted
    for batch in ([specs[1], specs[0], specs[1]], [specs[0]] * 2, [specs[3]] * 3):
        results = rendered_together(engine, batch)
        for spec, result in zip(batch, results, strict=True):
            assert not isinstance(result, EngineError)
            difference = result[1].astype(int) - expected[specs.index(spec)]
            assert np.abs(difference).max() <= 1
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_broken_cache_is_discarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If warming up fails with what is in the cache, it is tried once more with an empty cache."""
    engine = engine_of(tmp_path, "on")
    cache = Path(os.environ[compile_cache.VARIABLES[0]])
    (cache / "kernel.json").write_text("broken")

    def read(*_: Any) -> None:
        if any(cache.iterdir()) or not must_exist:
            raise ValueError("what comes of broken code")

    must_exist = True
    engine.model.pipe.transformer.register_forward_pre_hook(read)
    # Not compiled, because this test is about the cache alone.
    engine.model.pipe.vae.decoder._compiled_call_impl = None
    engine.warm_up(lambda: None)

    assert "compile.cache_discarded" in capsys.readouterr().out
    assert not any(cache.iterdir())

    must_exist = False
    with pytest.raises(ValueError, match="broken code"):
        engine.warm_up(lambda: None)
