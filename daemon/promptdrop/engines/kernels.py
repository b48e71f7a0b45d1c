"""The work of a transformer block between its matrix products, each piece in one pass over memory.

The gate needs no pass: it is computed in the kernel of the products before it. On a GPU with Triton the
kernels are those of `triton_kernels.py`; elsewhere torch computes the same. Rows are tokens.

Each operation rounds as in the library: on a CPU an evaluation in bfloat16 is the library's to the bit, on
an H100 0.0162 from it, where two of its attention kernels are 0.0164 from each other. Rounded once at the
end it was nearer to float32 (0.0179 instead of the library's 0.0195), no faster, and 0.0195 from the
library.

On an H100, 4,224 tokens of Z-Image-Turbo, milliseconds each in bf16 (in fp8):

                                          here             torch.compile
  a branch added, and the norm of both    0.044 (0.047)    0.058 (0.091)
  query and key normed and rotated        0.047            0.138
  the gate                                0.084 (0.077)    0.082 (0.135)
  the gate with the products before it    0.975            1.06, by cuBLAS and the gate
"""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from promptdrop.engines.rows import FP8, LARGEST, SMALLEST_SCALE, Branch, Norm, Rows, Scaled


def normed(x: Tensor, norm: Norm, fp8: bool) -> Rows:
    """Norm x [S, dim]."""
    if x.is_cuda and IS_FUSED:
        return triton_kernels.normed(x, norm, fp8)
    return rows(_norm(x, *norm), fp8)


def added(x: Tensor, branch: Branch) -> Tensor:
    """Add a branch to x."""
    if x.is_cuda and IS_FUSED:
        return triton_kernels.added(x, branch)
    y = _norm(branch.y, branch.weight, branch.eps, None)
    return x + (y if branch.gate is None else branch.gate.tanh() * y)


def added_normed(x: Tensor, branch: Branch, norm: Norm, fp8: bool) -> tuple[Tensor, Rows]:
    """Add a branch to x, and norm the sum. Returns the sum and its norm."""
    if x.is_cuda and IS_FUSED:
        return triton_kernels.added_normed(x, branch, norm, fp8)
    x = added(x, branch)
    return x, normed(x, norm, fp8)


def normed_rotated(x: Tensor, norm: Norm, freqs: Tensor) -> Tensor:
    """Norm each head of x [S, heads * width], and rotate its pairs of channels.

    freqs: cosines and sines, float32 [S, width / 2, 2].
    """
    if x.is_cuda and IS_FUSED:
        return triton_kernels.normed_rotated(x, norm, freqs)
    heads = x.view(len(x), -1, freqs.shape[1], 2)  # [S, heads, width / 2, 2]
    pairs = _norm(heads.flatten(2), *norm).view(heads.shape).float()
    even, odd = pairs.unbind(-1)
    cosine, sine = freqs[:, None].unbind(-1)  # each [S, 1, width / 2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.view(x.shape).to(x.dtype)


def gated(gate: Tensor, up: Tensor, fp8: bool) -> Rows:
    """Compute silu(gate) * up, each [S, hidden]."""
    if gate.is_cuda and IS_FUSED:
        return triton_kernels.gated(gate, up, fp8)
    return rows(F.silu(gate) * up, fp8)


def gated_products(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """Compute silu(x w1') * (x w3'), x [S, dim], each weight [hidden, dim]; fused if that is faster."""
    if x.is_cuda and IS_FUSED and triton_kernels.is_fast(x, w1, w3):
        return triton_kernels.gated_products(x, w1, w3)
    return gated(F.linear(x, w1), F.linear(x, w3), fp8=False)  # type: ignore[return-value]  # not fp8


def scaled(x: Tensor) -> Scaled:
    """Convert x [S, n] to fp8, each row with a scale of its own."""
    if x.is_cuda and IS_FUSED:
        return triton_kernels.scaled(x)
    x = x.float()
    scales = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return Scaled((x / scales).to(FP8), scales)


def rows(x: Tensor, fp8: bool) -> Rows:
    """Convert x [S, n] to what the next matrix product takes."""
    return scaled(x) if fp8 else x


def _norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """Compute what diffusers' RMSNorm does, over the last dimension."""
    square = x.float().square().mean(-1, keepdim=True)
    x = (x * torch.rsqrt(square + eps)).to(x.dtype) * weight
    return x if scale is None else x * (1 + scale)


def missing() -> str | None:
    """Say what Triton needs to build GPU kernels and does not find (triton/runtime/build.py), or None."""
    if not find_spec("triton"):
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "there is no C compiler (gcc or clang, or $CC)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").exists():
        return f"Python's headers are missing in {headers} (Debian: python3-dev)"
    return None


IS_FUSED = missing() is None
if IS_FUSED:
    from promptdrop.engines import triton_kernels
