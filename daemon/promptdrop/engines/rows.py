"""The arguments of kernels. Rows are tokens: x, y [S, dim]; weight, gate, scale [dim]."""

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
# A row of zeros has no scale of its own: 0 / 0 would be NaN, which spreads to the whole image.
SMALLEST_SCALE = 2.0**-100


class Scaled(NamedTuple):
    """Rows in fp8, each with the scale that makes its largest value 448."""

    values: Tensor  # float8 [S, n]
    scales: Tensor  # float32 [S, 1]


class Norm(NamedTuple):
    """A root mean square norm, whose result is multiplied by 1 + scale."""

    weight: Tensor
    eps: float
    scale: Tensor | None


class Branch(NamedTuple):
    """The sum that a block adds to its input: tanh(gate) times the norm of y."""

    y: Tensor
    weight: Tensor
    eps: float
    gate: Tensor | None


Rows = Tensor | Scaled
