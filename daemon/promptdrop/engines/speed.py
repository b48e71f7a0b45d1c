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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from promptdrop import log

SEQUENCE_MULTIPLE = 32  # transformer_z_image.py: SEQ_MULTI_OF


class RealRotaryAttention:
    """ZSingleStreamAttnProcessor with real-valued rotary embeddings, which inductor can fuse."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, S, dim]; freqs_cis: cosines and sines [1, S, 1, head_dim / 2, 2]."""
        parts = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (split_heads(part, attn.heads) for part in parts)
        query, key = rotate(attn.norm_q(query), freqs_cis), rotate(attn.norm_k(key), freqs_cis)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )  # [B, heads, S, head_dim]
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # [B, S, dim]
        return out


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
    """ZImageTransformer2DModel.forward without its walks through lists of Python."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._rotaries: dict[tuple[int, int, int], Rotary] = {}

    def __call__(
        self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], **_: Any
    ) -> tuple[list[Tensor]]:
        """One by one: no mask for different lengths, and every batch is the compiled batch of 1.

        x: B of [16, 1, h, w]; t [B], 1 - sigma; cap_feats: B of [tokens, width]."""
        one_by_one = zip(x, t[:, None], cap_feats, strict=True)
        return ([self.velocity(latents, level, text) for latents, level, text in one_by_one],)

    def velocity(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Of one image, [16, 1, h, w]: latents likewise, t [1], text [tokens, width]."""
        model = self._transformer
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        tokens, length = len(text), len(text) + -len(text) % SEQUENCE_MULTIPLE
        rotary = self._rotary(rows, columns, length)
        adaln = model.t_embedder(t * model.t_scale).type_as(latents)  # [1, 256]

        image = model.all_x_embedder["2-1"](patchify(latents))  # [N, dim]
        missing = -len(image) % SEQUENCE_MULTIPLE
        image = torch.cat([image, model.x_pad_token.expand(missing, -1)])[None]  # [1, N32, dim]
        for layer in model.noise_refiner:
            image = layer(image, None, rotary.image, adaln)

        caption = model.cap_embedder(text)  # [tokens, dim]
        caption = torch.cat([caption, model.cap_pad_token.expand(length - tokens, -1)])[None]
        for layer in model.context_refiner:
            caption = layer(caption, None, rotary.text)  # [1, L, dim]

        joint = torch.cat([image, caption], dim=1)  # [1, N32 + L, dim]
        for layer in model.layers:
            joint = layer(joint, None, rotary.joint, adaln)
        patches = model.all_final_layer["2-1"](joint[:, : rows * columns], c=adaln)  # [1, N, 64]
        return unpatchify(patches[0], rows, columns)

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


def accelerate(pipe: Any) -> None:
    """Compile the pipeline's transformer and decoder: in place, at their first use."""
    pipe.transformer.forward = FastForward(pipe.transformer)
    for block in blocks(pipe.transformer):
        block.attention.set_processor(RealRotaryAttention())
        block.compile(fullgraph=True, dynamic=True)  # one graph for every size and text length
    pipe.vae.decoder.to(memory_format=torch.channels_last)
    pipe.vae.decoder.compile(fullgraph=True, dynamic=False)  # one for each warmed size


def meet_text_lengths(
    transformer: Any, height: int, width: int, most: int, on_step: Callable[[], None]
) -> None:
    """Evaluate once at every padded text length up to `most` tokens: kernels are chosen per shape."""
    weight = transformer.cap_embedder[1].weight  # [dim, text width]
    latents = weight.new_zeros(16, 1, height // 8, width // 8)
    with torch.no_grad():
        for tokens in range(1, most + 1, SEQUENCE_MULTIPLE):
            text = weight.new_ones(tokens, weight.shape[1])
            transformer([latents], latents.new_ones(1, dtype=torch.float32), [text])
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
