"""The compiled engine: the library's function, no compiling after warm-up, a cache that may break."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline
from diffusers.models.transformers.transformer_z_image import FeedForward
from torch._dynamo.utils import counters

from promptdrop import config as configuration
from promptdrop import weights
from promptdrop.config import Config, Prompt
from promptdrop.engines import memory
from promptdrop.engines.engine import render_one
from promptdrop.engines.quantization import quantize
from promptdrop.engines.speed import (
    CACHE_VARIABLES,
    FastForward,
    discard_cache,
    join_weights,
    rewrite,
    together,
    use_cache,
)
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.nouns import ImageSpec, Rendering

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]

SPEC = ImageSpec(1, "a red circle", None, 64, 96, 2, 0.0, 7, "euler", "png", 60.0)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and the cache variables as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for variable in CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    yield
    torch.set_num_threads(threads)


def configured(root: Path, compile_: str) -> Config:
    return configuration.parse(
        {
            "root": str(root),
            "model": {"path": str(weights.DEMO), "device": "cpu"},
            "engine": {"compile": compile_, "warmup": ["64x96"], "batch": 3},
            "prompt": {"max_tokens": 96},
        }
    )


def rendered(engine: ZImageEngine, spec: ImageSpec) -> tuple[Rendering, Pixels]:
    buffer = bytearray(spec.height * spec.width * 3)
    rendering = render_one(engine, spec, Prompt(), lambda step, steps: None, memoryview(buffer))
    return rendering, np.frombuffer(buffer, np.uint8).reshape(spec.height, spec.width, 3)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_fast_forward_is_the_librarys(most: int) -> None:
    """FastForward computes ZImageTransformer2DModel.forward, of one image or of several end to end."""
    pipe: Any = ZImagePipeline.from_pretrained(
        weights.DEMO, dtype=torch.float32, local_files_only=True
    )
    transformer, generator = pipe.transformer.eval(), torch.Generator().manual_seed(0)
    latents = list(torch.randn(3, 16, 1, 18, 20, generator=generator))
    level = torch.rand(1, generator=generator)
    texts = [torch.randn(tokens, 192, generator=generator) for tokens in (1, 32, 41)]
    with torch.no_grad():
        expected = [
            transformer([x], level, [text], return_dict=False)[0][0]
            for x, text in zip(latents, texts, strict=True)
        ]
        with together(transformer, FastForward(transformer, most)):
            actual = transformer(latents, level.expand(3), texts)[0]
        again = transformer(latents[:1], level, texts[:1], return_dict=False)[0][0]

    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(expected[0], again)


def test_the_fast_forward_rounds_as_the_library_does() -> None:
    """In bfloat16, where each operation rounds: rounded once a kernel, it would be 0.006 off."""
    pipe: Any = ZImagePipeline.from_pretrained(
        weights.DEMO, dtype=torch.bfloat16, local_files_only=True
    )
    transformer, generator = pipe.transformer.eval(), torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 1, 18, 20, generator=generator).bfloat16()]
    level, texts = torch.tensor([0.4]), [torch.randn(41, 192, generator=generator).bfloat16()]
    with torch.no_grad():
        (theirs,) = transformer(latents, level, texts, return_dict=False)[0]
        (mine,) = FastForward(transformer)(latents, level, texts)[0]

    assert mine.dtype == torch.bfloat16
    assert (mine - theirs).float().norm() < 1e-3 * theirs.float().norm()  # here 0


def test_joined_weights_are_the_same_weights() -> None:
    """They lie where one kernel finds both, also when they pass through the device block by block."""
    pytest.importorskip("triton")
    from promptdrop.engines.triton_kernels import joined

    def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        modules = [m for m in pipe.transformer.modules() if isinstance(m, FeedForward)]
        return [(m.w1.weight.data, m.w3.weight.data) for m in modules]

    pipe: Any = ZImagePipeline.from_pretrained(weights.DEMO, local_files_only=True)
    before = [(w1.clone(), w3.clone()) for w1, w3 in pairs()]
    assert not any(joined(*pair) for pair in pairs())
    join_weights(pipe.transformer)

    assert all(joined(*pair) for pair in pairs())
    for ours, theirs in zip(pairs(), before, strict=True):
        assert all(map(torch.equal, ours, theirs))
    memory.stream(pipe.transformer, torch.device("cpu"))
    assert all(joined(*pair) for pair in pairs())


def test_a_compiled_decoder_is_the_librarys() -> None:
    """Its group norms, and its attention in as many parts as memory asks for."""
    decoder = AutoencoderKL(
        block_out_channels=(32, 64),
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).decoder.requires_grad_(False)
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = decoder(latents)
    rewrite(decoder)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)

    assert torch.equal(decoder(latents), expected)  # what is not compiled is untouched
    torch.testing.assert_close(compiled(latents), expected, rtol=1e-4, atol=1e-5)


def test_an_fp8_transformer_in_the_fast_forward() -> None:
    """It is near the library's with the same weights, and zeros give no NaN."""
    pipe: Any = ZImagePipeline.from_pretrained(
        weights.DEMO, dtype=torch.float32, local_files_only=True
    )
    transformer, generator = (
        pipe.transformer.requires_grad_(False),
        torch.Generator().manual_seed(0),
    )
    latents = torch.randn(16, 1, 24, 24, generator=generator)
    level, text = torch.rand(1, generator=generator), torch.randn(41, 192, generator=generator)
    (exact,) = transformer([latents], level, [text], return_dict=False)[0]
    whole = sum(p.nbytes for p in transformer.layers.parameters())
    quantize(transformer, torch.device("cpu"))
    layers = transformer.layers
    smaller = sum(t.nbytes for t in (*layers.parameters(), *layers.buffers()))
    forward = FastForward(transformer)
    (fast,) = forward([latents], level, [text])[0]
    (theirs,) = transformer([latents], level, [text], return_dict=False)[0]
    (zeros,) = forward([latents * 0], level, [text * 0])[0]

    assert smaller < whole / 2  # from float32; norms and modulation stay as they are
    assert (fast - exact).norm() / exact.norm() < 0.06
    assert (fast - theirs).norm() / exact.norm() < 0.03
    assert zeros.isfinite().all()


@pytest.mark.timeout(900)
def test_a_compiled_engine_compiles_at_warm_up_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uncompiled engine's picture, and other texts, sizes and guidance compile nothing."""
    plain = ZImageEngine(configured(tmp_path, "off"), lambda stage: None)
    specs = [
        SPEC,
        SPEC._replace(prompt="a blue star " * 12),
        SPEC._replace(width=96, height=80),
        SPEC._replace(guidance_scale=2.0, negative_prompt="a green ring " * 8),
    ]
    expected = [rendered(plain, spec)[1] for spec in specs]
    torch.compiler.reset()
    counters.clear()
    engine = ZImageEngine(configured(tmp_path, "on"), lambda stage: None)
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

    engine._is_warm = False  # what no graph fits would be compiled, and counted
    for batch in ([specs[1], specs[0], specs[1]], [specs[0]] * 2, [specs[3]] * 3):
        buffers = [bytearray(64 * 96 * 3) for _ in batch]
        engine.render(batch, Prompt(), lambda step, steps: None, [*map(memoryview, buffers)])
        for spec, buffer in zip(batch, buffers, strict=True):
            difference = np.frombuffer(buffer, np.uint8).astype(int) - expected[
                specs.index(spec)
            ].reshape(-1)
            assert np.abs(difference).max() <= 1
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_broken_cache_is_discarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Warming up fails with what is in the cache: it is tried once more with an empty one, then not."""
    engine = ZImageEngine(configured(tmp_path, "on"), lambda stage: None)
    cache = Path(os.environ[CACHE_VARIABLES[0]])
    (cache / "kernel.json").write_text("broken")

    def read(*_: Any) -> None:
        if any(cache.iterdir()) or not must_exist:
            raise ValueError("what comes of broken code")

    must_exist = True
    engine._pipe.transformer.register_forward_pre_hook(read)
    engine._pipe.vae.decoder._compiled_call_impl = (
        None  # not compiled: this test is of the cache alone
    )
    engine.warm_up(lambda: None)

    assert "compile.cache_discarded" in capsys.readouterr().out
    assert not any(cache.iterdir())

    must_exist = False
    with pytest.raises(ValueError, match="broken code"):
        engine.warm_up(lambda: None)


def test_a_cache_is_of_one_model_and_device(tmp_path: Path) -> None:
    """Code of another model, unused for a week, goes; the daemon alone may read and write its own."""
    use_cache(tmp_path, "one", "cpu")
    first = Path(os.environ[CACHE_VARIABLES[0]])
    (first / "code").touch()
    use_cache(tmp_path, "one", "cpu")

    assert (first / "code").exists()
    assert first.stat().st_mode & 0o077 == 0

    use_cache(tmp_path, "two", "cpu")

    assert len([*tmp_path.iterdir()]) == 2  # an engine of another device may be using it

    os.utime(first, (0, 0))
    use_cache(tmp_path, "two", "cpu")
    second = Path(os.environ[CACHE_VARIABLES[0]])

    assert [*tmp_path.iterdir()] == [second]
    assert not discard_cache("it is empty")
    (second / "code").touch()
    assert discard_cache("it is broken")
    assert not any(second.iterdir())
