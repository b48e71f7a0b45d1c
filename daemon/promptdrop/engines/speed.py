"""Faster ways to evaluate Z-Image's transformer and VAE, each with what it gained.

Measured on one NVIDIA H200, 1024x1024, 128 text tokens, bf16, torch 2.11, milliseconds an evaluation:

  146.5  the library as it comes
   94.1  FastForward with compiled blocks; its kernels' sum is 87.3: matrix products 62.5,
         attention 14.6 (cuDNN), fused pointwise 9.6
   86.4 to 35.4  the VAE, a decode, channels last and compiled

Tried without gain: static instead of dynamic shapes (96.5), one product for query, key and value and
one for gate and input (95.3), the whole evaluation as a CUDA graph (95.0): the device is busy already.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from promptdrop import log

SEQUENCE_MULTIPLE = 32  # transformer_z_image.py: SEQ_MULTI_OF


# Cosines and sines [1, S, 1, head_dim / 2, 2]; of several images end to end with where each begins
# and the last ends: [images + 1], int64 on the CPU. Their number is no part of the compiled graph.
Positions = Tensor | tuple[Tensor, Tensor]


class RealRotaryAttention:
    """ZSingleStreamAttnProcessor with real-valued rotary embeddings, which inductor can fuse."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Positions | None = None,
    ) -> Tensor:
        """hidden_states [1, S, dim]: one image, or several that do not see each other."""
        freqs, borders = freqs_cis if isinstance(freqs_cis, tuple) else (freqs_cis, None)
        parts = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (split_heads(part, attn.heads) for part in parts)
        query, key = rotate(attn.norm_q(query), freqs), rotate(attn.norm_k(key), freqs)
        if borders is None:
            mixed = attend(query, key, value)  # [1, S, heads, head_dim]
        else:
            mixed = attend_within(query, key, value, borders)
        out: Tensor = attn.to_out[0](mixed.flatten(2))  # [1, S, dim]
        return out


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each, and the result, [1, S, heads, head_dim]."""
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )  # [1, heads, S, head_dim]
    return mixed.transpose(1, 2)


@torch.library.custom_op("promptdrop::attend_within", mutates_args=())
def attend_within(query: Tensor, key: Tensor, value: Tensor, borders: Tensor) -> Tensor:
    """`attend` of each image on its own, however long the others are: no mask and no padding."""
    parts = [slice(begin, end) for begin, end in pairwise(borders.tolist())]
    return torch.cat([attend(query[:, s], key[:, s], value[:, s]) for s in parts], dim=1)


@attend_within.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, dim] to [B, S, heads, head_dim]."""
    return x.view(*x.shape[:2], heads, -1)


def rotate(x: Tensor, freqs: Tensor | None) -> Tensor:
    """Rotate pairs of channels of x [B, S, heads, head_dim], in float32 as the library does."""
    assert freqs is not None
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # each [B, S, heads, head_dim / 2]
    cosine, sine = freqs.unbind(-1)  # each [1, S, 1, head_dim / 2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).type_as(x)  # [B, S, heads, head_dim]


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of one image size and text length, each [1, S, 1, head_dim / 2, 2]."""

    image: Tensor
    text: Tensor
    joint: Tensor


class FastForward:
    """ZImageTransformer2DModel.forward without its walks through lists of Python.

    At most `most` images are one sequence, end to end; guidance has two for each image asked for.
    """

    def __init__(self, transformer: Any, most: int = 1) -> None:
        self._transformer = transformer
        self._most = most
        self._rotaries: dict[tuple[int, int, int], Rotary] = {}

    def __call__(
        self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], **_: Any
    ) -> tuple[list[Tensor]]:
        """x: B of [16, 1, h, w], of one size; t [B], 1 - sigma, of one level; cap_feats: B of
        [tokens, width], of any lengths."""
        sequences = -(-len(x) // self._most)
        images = -(-len(x) // sequences)
        velocities: list[Tensor] = []
        for first in range(0, len(x), images):
            part = slice(first, first + images)
            velocities += self.velocities(x[part], t[:1], cap_feats[part])
        return (velocities,)

    def velocities(self, latents: list[Tensor], t: Tensor, texts: list[Tensor]) -> list[Tensor]:
        """Of one sequence: B of [16, 1, h, w], latents likewise; t [1]; texts: B of [tokens, width]."""
        model = self._transformer
        rows, columns = latents[0].shape[-2] // 2, latents[0].shape[-1] // 2
        lengths = [len(text) + -len(text) % SEQUENCE_MULTIPLE for text in texts]  # each L
        rotaries = [self._rotary(rows, columns, length) for length in lengths]
        adaln = model.t_embedder(t * model.t_scale).type_as(latents[0])  # [1, 256]

        image = model.all_x_embedder["2-1"](torch.cat([patchify(x) for x in latents]))  # [B N, dim]
        image = padded(torch.split(image, rows * columns), model.x_pad_token)  # [1, B N32, dim]
        positions = end_to_end([rotary.image for rotary in rotaries])
        for layer in model.noise_refiner:
            image = layer(image, None, positions, adaln)

        caption = model.cap_embedder(torch.cat(texts))  # [sum of tokens, dim]
        caption = padded(caption.split([len(text) for text in texts]), model.cap_pad_token)
        positions = end_to_end([rotary.text for rotary in rotaries])
        for layer in model.context_refiner:
            caption = layer(caption, None, positions)  # [1, sum of L, dim]

        parts = zip(image.chunk(len(latents), dim=1), caption.split(lengths, dim=1), strict=True)
        joint = torch.cat([x for part in parts for x in part], dim=1)  # [1, sum of N32 + L, dim]
        positions = end_to_end([rotary.joint for rotary in rotaries])
        for layer in model.layers:
            joint = layer(joint, None, positions, adaln)

        images = torch.split(joint, [rotary.joint.shape[1] for rotary in rotaries], dim=1)
        image = torch.cat([x[:, : rows * columns] for x in images], dim=1)  # [1, B N, dim]
        patches = model.all_final_layer["2-1"](image, c=adaln)[0]  # [B N, 64]
        return [unpatchify(x, rows, columns) for x in torch.split(patches, rows * columns)]

    def _rotary(self, rows: int, columns: int, length: int) -> Rotary:
        """Made once per shape."""
        key = rows, columns, length
        if key not in self._rotaries:
            embed, device = self._transformer.rope_embedder, self._transformer.device
            image = embed(image_ids(rows, columns, length).to(device))  # [N32, head_dim / 2]
            text = embed(text_ids(length).to(device))  # [L, head_dim / 2]
            parts = image, text, torch.cat([image, text])
            self._rotaries[key] = Rotary(*(torch.view_as_real(x)[None, :, None] for x in parts))
        return self._rotaries[key]


def padded(parts: Sequence[Tensor], pad_token: Tensor) -> Tensor:
    """Each [n, dim], to a multiple of 32 rows, and end to end: [1, sum of n32, dim]."""
    rows = [x for p in parts for x in (p, pad_token.expand(-len(p) % SEQUENCE_MULTIPLE, -1))]
    return torch.cat(rows)[None]


def end_to_end(tables: list[Tensor]) -> Positions:
    """Of several images, each [1, S, 1, head_dim / 2, 2]; of one as it is."""
    if len(tables) == 1:
        return tables[0]
    borders = accumulate((table.shape[1] for table in tables), initial=0)
    return torch.cat(tables, dim=1), torch.tensor([*borders])


def blocks(transformer: Any) -> list[Any]:
    return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]


def patchify(latents: Tensor) -> Tensor:
    """[16, 1, h, w] to [N, 64], a patch's channels ordered (row, column, channel)."""
    c, _, h, w = latents.shape
    patches = latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0)
    return patches.reshape((h // 2) * (w // 2), 4 * c)


def unpatchify(patches: Tensor, rows: int, columns: int) -> Tensor:
    """[N, 64] back to [16, 1, h, w]."""
    latents = patches.view(rows, columns, 2, 2, -1).permute(4, 0, 2, 1, 3)
    return latents.reshape(-1, 1, rows * 2, columns * 2)


def image_ids(rows: int, columns: int, text_length: int) -> Tensor:
    """Positions [N32, 3]: one frame after the text, then zeros for the padding."""
    ids = torch.zeros(rows * columns + -(rows * columns) % SEQUENCE_MULTIPLE, 3, dtype=torch.long)
    frame = torch.tensor([text_length + 1])
    grid = torch.meshgrid(frame, torch.arange(rows), torch.arange(columns), indexing="ij")
    ids[: rows * columns] = torch.stack(grid, dim=-1).view(-1, 3)
    return ids


def text_ids(length: int) -> Tensor:
    """Positions [L, 3] along the first axis, from 1."""
    ids = torch.zeros(length, 3, dtype=torch.long)
    ids[:, 0] = torch.arange(1, length + 1)
    return ids


@contextmanager
def together(transformer: Any, forward: FastForward) -> Iterator[None]:
    """Evaluate several images as one sequence, not compiled; afterwards as the library does."""
    attentions = [block.attention for block in blocks(transformer)]
    processors = [attention.processor for attention in attentions]
    transformer.forward = forward
    for attention in attentions:
        attention.processor = RealRotaryAttention()
    try:
        yield
    finally:
        del transformer.forward  # the class's own is there again
        for attention, processor in zip(attentions, processors, strict=True):
            attention.processor = processor


def accelerate(pipe: Any, forward: FastForward) -> None:
    """Compile the pipeline's transformer and decoder: in place, at their first use."""
    pipe.transformer.forward = forward
    for block in blocks(pipe.transformer):
        block.attention.set_processor(RealRotaryAttention())
        # One graph for one image and one for several, for every size and text length.
        block.compile(fullgraph=True, dynamic=True)
    pipe.vae.decoder.to(memory_format=torch.channels_last)
    pipe.vae.decoder.compile(fullgraph=True, dynamic=False)  # one for each warmed size


def meet_text_lengths(
    transformer: Any, height: int, width: int, most: int, images: int, on_step: Callable[[], None]
) -> None:
    """Evaluate once at every padded text length up to `most` tokens, and 2 to `images` together:
    kernels are chosen per shape."""
    weight = transformer.cap_embedder[1].weight  # [dim, text width]
    latents = weight.new_zeros(16, 1, height // 8, width // 8)
    lengths = range(1, most + 1, SEQUENCE_MULTIPLE)
    several = [[most, *[1] * (n - 1)] for n in range(2, images + 1)]
    with torch.no_grad():
        for batch in [*([tokens] for tokens in lengths), *several]:
            levels = latents.new_ones(len(batch), dtype=torch.float32)
            texts = [weight.new_ones(tokens, weight.shape[1]) for tokens in batch]
            transformer([latents] * len(batch), levels, texts)
            on_step()


# The cache of compiled code. Inductor unpickles what it finds there: only the daemon may write it.

CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def use_cache(folder: Path, model: str, device: str) -> None:
    """Keep compiled code in `folder`, by versions, model and device; what others left there goes."""
    facts = (torch.__version__, diffusers.__version__, model, device)
    mine = folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry != mine:
            log.get().info("compile.cache_discarded", reason="of other versions, model or device")
            shutil.rmtree(entry, ignore_errors=True)
    mine.mkdir(mode=0o700, parents=True, exist_ok=True)
    for variable in CACHE_VARIABLES:
        os.environ[variable] = str(mine)


def discard_cache(reason: str) -> bool:
    """Empty the cache in use, because it may be broken; False if it is empty."""
    folder = Path(os.environ[CACHE_VARIABLES[0]])
    if not any(folder.iterdir()):
        return False
    log.get().warning("compile.cache_discarded", reason=reason)
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    torch.compiler.reset()
    return True
