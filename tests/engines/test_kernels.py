"""Triton's kernels, run by its interpreter, compute what torch does; rows of zeros stay finite."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from promptdrop.engines import kernels
from promptdrop.engines.quantization import Fp8Linear

COMPARED = """
import os
import torch
import triton
from promptdrop.engines import kernels, triton_kernels
from promptdrop.engines.rows import Branch, Norm, Scaled

torch.set_num_threads(1)
device = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
kernels.IS_FUSED = False
# The interpreter, unlike a GPU, cuts bf16 off where it should round, up to five times in a row; float16
# it rounds, and there what is rounded where is seen.
bf16 = 5e-2 if device == "cpu" else 1e-2
roundings = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: bf16}
generator = torch.Generator().manual_seed(0)
def values(*shape): return torch.randn(*shape, generator=generator).to(device)
def compare(one, other):
    ones, others = ((x,) if isinstance(x, (torch.Tensor, Scaled)) else x for x in (one, other))
    for mine, theirs in zip(ones, others, strict=True):
        if isinstance(mine, Scaled):
            torch.testing.assert_close(mine.scales, theirs.scales, rtol=max(roundings[dtype], 1e-2), atol=0)
            mine, theirs = (x.values.float() * x.scales for x in (mine, theirs))
            # It also halves what is rounded up to a power of two.
            off = (mine - theirs).abs() > 0.13 * theirs.abs() + 1e-3
            assert off.float().mean() < 0.05
        else:
            torch.testing.assert_close(mine, theirs, rtol=roundings[dtype], atol=roundings[dtype])

for dtype in roundings:
    x, y = values(5, 48).to(dtype), values(5, 48).to(dtype)
    x[3] = y[3] = 0
    weight, gate, scale = (values(48).to(dtype) for _ in range(3))
    freqs = values(5, 4, 2)
    for fp8 in (False, True):
        for s in (None, scale):
            for g in (None, gate):
                args = x, Branch(y, weight, 1e-5, g), Norm(weight, 1e-6, s), fp8
                compare(triton_kernels.added_normed(*args), kernels.added_normed(*args))
                compare(triton_kernels.added(*args[:2]), kernels.added(*args[:2]))
            compare(triton_kernels.normed(x, Norm(weight, 1e-6, s), fp8), kernels.normed(x, Norm(weight, 1e-6, s), fp8))
        compare(triton_kernels.gated(x, y, fp8), kernels.gated(x, y, fp8))
    compare(triton_kernels.scaled(x), kernels.scaled(x))
    heads = Norm(weight[:8], 1e-5, None)
    compare(triton_kernels.normed_rotated(x, heads, freqs), kernels.normed_rotated(x, heads, freqs))
    wide = torch.cat([x, y, x], dim=1)  # as views of one product
    compare(triton_kernels.normed_rotated(wide[:, 48:96], heads, freqs), kernels.normed_rotated(y, heads, freqs))

# Only two bytes a number. The interpreter multiplies bf16 wrongly; Triton 3.6's has no loops with the
# numpy of today.
multiplied = [torch.float16, torch.bfloat16]
if device == "cpu":
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    multiplied = [torch.float16] if version >= (3, 7) else []
for dtype in multiplied:
    tokens = values(2100, 72).to(dtype)  # more tiles than a band has, and none of the last ones full
    w1, _, w3 = (values(3, 264, 72) / 8).to(dtype)
    args = tokens, w1, w3
    if device == "cpu" or triton_kernels.is_fast(*args):
        compare(triton_kernels.gated_products(*args), kernels.gated_products(*args))
print("the same")
"""


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("interpret", ["1", pytest.param("", marks=on_cuda)])
def test_triton_computes_what_torch_does(interpret: str) -> None:
    """Every kernel does so with and without each of its parts, in each dtype, on a row of zeros too."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARED],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("the same\n", "")


def test_an_fp8_product_is_nearly_the_product() -> None:
    """A linear layer in fp8 is within fp8's rounding; a row of zeros gives zeros, not NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 64, generator=generator)
    x[1, 2] = 0
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    quantized = Fp8Linear(linear)
    exact, nearly = linear(x), quantized(x)

    assert quantized.weight.dtype == torch.float8_e4m3fn
    assert (nearly - exact).norm() / exact.norm() < 0.05  # two roundings to 3 bits of mantissa
    assert torch.equal(nearly[1, 2], torch.zeros(48))
    assert torch.equal(nearly, quantized(kernels.scaled(x.flatten(0, 1))).view(nearly.shape))
    assert quantized(torch.full((1, 64), float("nan"))).isnan().all()  # NaN is not hidden
