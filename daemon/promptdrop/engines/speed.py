"""Faster ways to evaluate Z-Image's transformer and VAE, each with what it gained.

Milliseconds at 1024x1024, 128 text tokens, bf16, torch 2.11, on H100s of 80 GB, no two calls surely on
the same card; `bench/gpu.jsonl` has whole runs, `engine.compile: off` turns it all off.

  154.9  an evaluation of the library as it comes
   97.4  its blocks compiled by torch, real-valued rotation: matrix products 68.5, attention 16.5
         (cuDNN), what is between them 11.2
   93.7  FastForward with `kernels.py` between the products, 7.1 instead of those 11.2: to 95.0
   90.9  the products before a gate and the gate as one kernel (`kernels.gated_products`), which brings
         0.085 of 1.06 in each block
   61.7  with fp8 products, each a kernel of its own, instead: to 62.8

  91.2  a decode by the library's VAE
  38.7  channels last and compiled
  25.1  with ChannelGroupNorm and WideAttention; nearer to the float32 result than the library's
        (relative distance 0.0091, library 0.0123)
  22.8  with TransposedUpsample: 3.2 for three convolutions that took 5.1, and a relative distance of 0.0024
        of one of them instead of 0.0021

An evaluation is bound by power: the card draws its 700 W and clocks down to 1.4 or 1.5 GHz, so the products
run at the 700 TFLOP/s that a large product sustains there, whatever their shape, and what is saved between
them is saved in part only: all of query's and key's norms and rotations are worth 0.7, all modulations and
the gaps between kernels, by a CUDA graph, 0.5. Tried without gain: one product for query, key and value,
other row counts, cuBLASLt, transposed operands, static shapes, persistent reductions
(`triton.multi_kernel`), cuDNN's benchmark mode, norm and rotation in the kernel of their product, Triton's
for the last product of a block; with fp8, its products' scales applied between them (61.3 instead of 61.7),
and attention in fp8, in Triton (60.5 instead of 61.9, at 1.05 times the distance; its best variant would
have been one more ms faster). Refining the text once an image instead of once an evaluation is within the
noise; it spares two blocks of an evaluation when blocks are offloaded.
"""

import hashlib
import itertools
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import FeedForward
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from promptdrop import log
from promptdrop.engines import kernels
from promptdrop.engines.quantization import Fp8Linear
from promptdrop.engines.rows import Branch, Norm, Rows, Scaled

SEQUENCE_MULTIPLE = 32  # transformer_z_image.py: SEQ_MULTI_OF
SCORES = 2**28  # of the decoder's attention in memory at once: 512 MiB in bf16
ROTARIES = 32  # kept, of as many sizes and text lengths: 2 MiB each at 1024x1024
CAPTIONS = 8  # kept refined: guidance has two for each sequence of a batch


class Positions(NamedTuple):
    """Of images end to end: cosines and sines, float32 [S, width / 2, 2], and how many neighbours
    have how many rows each."""

    freqs: Tensor
    runs: list[tuple[int, int]]


def through(blocks: Iterable[Any], x: Tensor, positions: Positions, adaln: Tensor | None) -> Tensor:
    """ZImageTransformerBlock.forward of one block after the other, x [S, dim].

    What a block adds at its end is added in the pass that begins the next one.
    """
    branch = None
    for block in blocks:
        for hook in block._forward_pre_hooks.values():  # which bring weights that are offloaded
            hook(block, ())
        fp8 = isinstance(block.attention.to_q, Fp8Linear)
        scale, gate, mlp_scale, mlp_gate = modulation(block, adaln)  # each [dim]
        before = norm_of(block.attention_norm1, scale)
        if branch is None:
            h = kernels.normed(x, before, fp8)
        else:
            x, h = kernels.added_normed(x, branch, before, fp8)
        h = attention(block.attention, h, positions)
        branch = branch_of(h, block.attention_norm2, gate)
        x, h = kernels.added_normed(x, branch, norm_of(block.ffn_norm1, mlp_scale), fp8)
        feed_forward = block.feed_forward
        h = feed_forward.w2(hidden(feed_forward, h))
        branch = branch_of(h, block.ffn_norm2, mlp_gate)
    return x if branch is None else kernels.added(x, branch)


def hidden(feed_forward: Any, h: Rows) -> Rows:
    """FeedForward before w2: h [S, dim] to [S, hidden]."""
    w1, w3 = feed_forward.w1, feed_forward.w3
    if isinstance(h, Scaled):
        return kernels.gated(w1(h), w3(h), fp8=True)
    return kernels.gated_products(h, w1.weight, w3.weight)


def modulation(block: Any, adaln: Tensor | None) -> Sequence[Tensor | None]:
    """Scale and gate of the attention, then of the feed-forward, before 1 + and tanh: each [dim]."""
    return block.adaLN_modulation(adaln)[0].chunk(4) if block.modulation else [None] * 4


def norm_of(norm: Any, scale: Tensor | None = None) -> Norm:
    return Norm(norm.weight, norm.eps, scale)


def branch_of(y: Tensor, norm: Any, gate: Tensor | None) -> Branch:
    return Branch(y, norm.weight, norm.eps, gate)


def attention(attn: Any, h: Rows, positions: Positions) -> Tensor:
    """ZSingleStreamAttnProcessor, h [S, dim]."""
    query, key, value = attn.to_q(h), attn.to_k(h), attn.to_v(h)  # each [S, dim]
    query = kernels.normed_rotated(query, norm_of(attn.norm_q), positions.freqs)
    key = kernels.normed_rotated(key, norm_of(attn.norm_k), positions.freqs)
    # Of each image on its own, however long the others are: no mask and no padding. Neighbours of one
    # length are one call: the queries of a small image do not fill a GPU evenly.
    sizes = [images * length for images, length in positions.runs]
    split = zip(*(torch.split(x, sizes) for x in (query, key, value)), strict=True)
    mixed = [
        attend(*(x.view(*run, attn.heads, -1) for x in part))
        for run, part in zip(positions.runs, split, strict=True)
    ]
    mixed_ = mixed[0] if len(mixed) == 1 else torch.cat(mixed)  # [S, dim]
    out: Tensor = attn.to_out[0](kernels.scaled(mixed_) if isinstance(h, Scaled) else mixed_)
    return out


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each [B, S, heads, width], to [B S, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of one image size and text length, each [S, width / 2, 2]."""

    image: Tensor
    text: Tensor

    @property
    def joint(self) -> Tensor:
        """Of both, end to end."""
        return torch.cat([self.image, self.text])


@dataclass(frozen=True)
class Caption:
    """Texts that were refined together; while they are held here, their ids are nobody else's."""

    texts: list[Tensor]  # each [tokens, width]
    refined: Tensor  # [sum of L, dim]


class FastForward:
    """ZImageTransformer2DModel.forward without its walks through lists of Python.

    At most `most` images are one sequence, end to end; guidance has two for each image asked for.
    """

    def __init__(self, transformer: Any, most: int = 1) -> None:
        self._transformer = transformer
        self._most = most
        self._rotaries: OrderedDict[tuple[int, int, int], Rotary] = OrderedDict()
        self._captions: OrderedDict[tuple[tuple[int, int], ...], Caption] = OrderedDict()

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
        image = padded(torch.split(image, rows * columns), model.x_pad_token)  # [B N32, dim]
        positions = end_to_end([rotary.image for rotary in rotaries])
        image = through(model.noise_refiner, image, positions, adaln)

        caption = self._caption(texts, rotaries)  # [sum of L, dim]
        parts = zip(image.chunk(len(latents)), torch.split(caption, lengths), strict=True)
        joint = torch.cat([x for part in parts for x in part])  # [sum of N32 + L, dim]
        positions = end_to_end([rotary.joint for rotary in rotaries])
        joint = through(model.layers, joint, positions, adaln)

        images = torch.split(joint, [len(rotary.image) + len(rotary.text) for rotary in rotaries])
        image = torch.cat([x[: rows * columns] for x in images])  # [B N, dim]
        patches = model.all_final_layer["2-1"](image[None], c=adaln)[0]  # [B N, 64]
        return [unpatchify(x, rows, columns) for x in torch.split(patches, rows * columns)]

    def _caption(self, texts: list[Tensor], rotaries: list[Rotary]) -> Tensor:
        """Refined [sum of L, dim]: no noise level goes in, so all evaluations of an image share it."""
        key = tuple((id(text), text._version) for text in texts)
        if key not in self._captions:
            model = self._transformer
            refined = model.cap_embedder(torch.cat(texts))  # [sum of tokens, dim]
            parts = torch.split(refined, [len(text) for text in texts])
            refined = padded(parts, model.cap_pad_token)
            positions = end_to_end([rotary.text for rotary in rotaries])
            refined = through(model.context_refiner, refined, positions, None)
            self._captions[key] = Caption(texts, refined)
            if len(self._captions) > CAPTIONS:
                self._captions.popitem(last=False)
        return self._captions[key].refined

    def _rotary(self, rows: int, columns: int, length: int) -> Rotary:
        """Made once per shape."""
        key = rows, columns, length
        if key not in self._rotaries:
            embed, device = self._transformer.rope_embedder, self._transformer.device
            image = embed(image_ids(rows, columns, length).to(device))  # [N32, width / 2]
            text = embed(text_ids(length).to(device))  # [L, width / 2]
            self._rotaries[key] = Rotary(torch.view_as_real(image), torch.view_as_real(text))
            if len(self._rotaries) > ROTARIES:
                self._rotaries.popitem(last=False)
        return self._rotaries[key]


def padded(parts: Sequence[Tensor], pad_token: Tensor) -> Tensor:
    """Each [n, dim], to a multiple of 32 rows, and end to end: [sum of n32, dim]."""
    return torch.cat(
        [x for p in parts for x in (p, pad_token.expand(-len(p) % SEQUENCE_MULTIPLE, -1))]
    )


def end_to_end(tables: list[Tensor]) -> Positions:
    """Of several images, each [S, width / 2, 2]; of one as it is."""
    runs = [(len([*equal]), length) for length, equal in itertools.groupby(tables, len)]
    return Positions(tables[0] if len(tables) == 1 else torch.cat(tables), runs)


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


class PipelineOnDevice(ZImagePipeline):  # type: ignore[misc]  # diffusers has no types
    """Knows where it runs."""

    _execution_device: torch.device | None = None


class TransformerOfDtype(ZImageTransformer2DModel):  # type: ignore[misc]  # diffusers has no types
    """Knows what its weights are."""

    dtype: torch.dtype | None = None


def remember_device_and_dtype(pipe: Any, device: torch.device) -> None:
    """Tell the pipeline what it would look up in its 1,500 modules at every image and every step:
    4.8 and 1.3 ms of a slow CPU, in which a GPU waits for its next image."""
    dtype = pipe.transformer.dtype
    pipe.__class__, pipe.transformer.__class__ = PipelineOnDevice, TransformerOfDtype
    pipe._execution_device, pipe.transformer.dtype = device, dtype


def join_weights(transformer: Any) -> None:
    """What `kernels.gated_products` multiplies by goes into one storage each, on the device.

    Raises torch.OutOfMemoryError: there is no room for one pair beside all.
    """
    for block in transformer.modules():
        if isinstance(block, FeedForward) and not isinstance(block.w1, Fp8Linear):
            both = torch.stack([block.w1.weight.data, block.w3.weight.data])  # [2, hidden, dim]
            block.w1.weight.data, block.w3.weight.data = both
    torch.cuda.empty_cache()  # of pieces that fit nothing else


@contextmanager
def together(transformer: Any, forward: FastForward) -> Iterator[None]:
    """Evaluate as FastForward does; afterwards as the library does."""
    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward  # the class's own is there again


def accelerate(pipe: Any, forward: FastForward, sizes: int) -> None:
    """Evaluate the pipeline's transformer as FastForward does; its decoder is compiled at the first
    use of each of so many sizes."""
    limit = torch._dynamo.config.recompile_limit  # graphs of one function
    torch._dynamo.config.recompile_limit = max(limit, 2 * sizes)
    pipe.transformer.forward = forward
    decoder = pipe.vae.decoder
    rewrite(decoder)
    decoder.to(memory_format=torch.channels_last)
    decoder.compile(fullgraph=True, dynamic=False)  # one graph for each warmed size


def rewrite(decoder: nn.Module) -> None:
    """What the compiler then makes faster code of; not compiled, nothing changes."""
    for module in decoder.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelGroupNorm
        elif type(module) is Upsample2D:
            module.__class__ = TransposedUpsample
        elif isinstance(module, Attention) and module.heads == 1:
            module.set_processor(WideAttention())


class ChannelGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that sums each channel first when compiled.

    In channels_last the channels of one group are a few bytes of each line; reading them group by
    group reads every line as often as there are groups.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...]."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        wide, places = x.float(), list(range(2, x.ndim))
        size = self.num_channels // self.num_groups
        sums = torch.stack((wide.sum(places), wide.square().sum(places)))  # [2, B, C]
        count = size * x[0, 0].numel()
        mean, square = sums.view(*sums.shape[:2], -1, size).sum(-1) / count  # each [B, groups]
        variance = (square - mean.square()).clamp(min=0)
        deviation = torch.rsqrt(variance + self.eps)
        factor = self.weight * deviation.repeat_interleave(size, dim=1)  # [B, C]
        offset = self.bias - mean.repeat_interleave(size, dim=1) * factor
        shape = *factor.shape, *[1] * len(places)
        normed: Tensor = wide * factor.view(shape) + offset.view(shape)
        return normed.to(x.dtype)


class TransposedUpsample(Upsample2D):  # type: ignore[misc]  # diffusers has no types
    """Each pixel doubled and convolved 3x3, as one transposed convolution of 4x4 when compiled.

    Most of the nine weights meet the same pixel as another: four products are left, and the doubled image
    is never written.
    """

    def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
        """hidden_states [B, C, H, W], to [B, C, 2 H, 2 W]."""
        if output_size is not None or not torch.compiler.is_compiling():
            return super().forward(hidden_states, output_size)  # type: ignore[no-any-return]
        weight, bias = self.conv.weight, self.conv.bias  # [out, in, 3, 3], [out]
        flipped = weight.float().flip(2, 3)
        shifts = itertools.product([(0, 1), (1, 0)], repeat=2)
        wide = torch.stack([F.pad(flipped, (*x, *y)) for x, y in shifts]).sum(0)  # [out, in, 4, 4]
        wide = wide.to(weight.dtype).transpose(0, 1)
        return F.conv_transpose2d(hidden_states, wide, bias, stride=2, padding=1)


class WideAttention(AttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """The decoder's one head of 512 channels as two matrix products when compiled.

    The fast attention kernels end at 256 channels.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, C, H, W]."""
        if not torch.compiler.is_compiling():
            return super().__call__(attn, hidden_states)  # type: ignore[no-any-return]  # diffusers
        x = hidden_states.flatten(2)  # [B, C, H W]
        x = attn.group_norm(x).transpose(1, 2)  # [B, H W, C]
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        rows = max(1, SCORES // x.shape[1])  # so many queries at once
        key = key.transpose(1, 2) * x.shape[2] ** -0.5
        mixed = torch.cat([(q @ key).softmax(-1) @ value for q in query.split(rows, dim=1)], dim=1)
        out: Tensor = attn.to_out[0](mixed).transpose(1, 2).reshape(hidden_states.shape)
        return out + hidden_states


def meet_text_lengths(
    transformer: Any, height: int, width: int, most: int, images: int, on_step: Callable[[], None]
) -> None:
    """Evaluate once at every padded text length up to `most` tokens, and 2 to `images` together:
    the libraries choose their kernels per shape."""
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

STALE_SECONDS = 7 * 86400.0
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def use_cache(folder: Path, model: str, device: str) -> None:
    """Keep compiled code in `folder`, by versions, model and device; what nobody has used for a week
    goes."""
    facts = (torch.__version__, diffusers.__version__, model, device)
    mine = folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another engine was faster
            if entry != mine and time.time() - entry.stat().st_mtime > STALE_SECONDS:
                log.get().info("compile.cache_discarded", reason="not used for a week")
                shutil.rmtree(entry, ignore_errors=True)
    mine.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(mine)
    for variable in CACHE_VARIABLES:
        os.environ[variable] = str(mine)


def discard_cache(reason: str) -> bool:
    """Empty the cache in use, because it may be broken; False if it is empty."""
    folder = Path(os.environ[CACHE_VARIABLES[0]])
    if not (folder.is_dir() and any(folder.iterdir())):
        return False
    log.get().warning("compile.cache_discarded", reason=reason)
    shutil.rmtree(folder, ignore_errors=True)  # an engine of another device may do the same
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    torch.compiler.reset()
    return True
