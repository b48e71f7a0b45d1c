"""FastForward computes what the library's transformer does."""

from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import FeedForward

from promptdrop import weights
from promptdrop.engines import memory
from promptdrop.engines.forward import FastForward, join_weights, together
from promptdrop.engines.quantization import quantize


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
    """In bfloat16 each operation rounds as there; rounding once a kernel would be 0.006 off."""
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

    assert smaller < whole / 2  # the original is float32; norms and modulation stay as they are
    assert (fast - exact).norm() / exact.norm() < 0.06
    assert (fast - theirs).norm() / exact.norm() < 0.03
    assert zeros.isfinite().all()


def test_joined_weights_are_the_same_weights() -> None:
    """Pairs that lie in one storage keep their values, also when they are streamed block by block."""
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
