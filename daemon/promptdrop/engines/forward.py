"""Z-Image's transformer, evaluated faster; with what each change gained.

Milliseconds at 1024x1024, 128 text tokens, bf16, torch 2.11, on H100s of 80 GB (two calls may have been on
two cards); `bench/gpu.jsonl` has whole runs, `engine.compile: off` turns it all off.

  154.9  an evaluation of the library as it comes
   97.4  its blocks compiled by torch, real-valued rotation: matrix products 68.5, attention 16.5
         (cuDNN), what is between them 11.2
   93.7  FastForward with `kernels.py` between the products, 7.1 instead of those 11.2: to 95.0
   90.9  the products before a gate and the gate as one kernel (`kernels.gated_products`), which brings
         0.085 of 1.06 in each block
   61.7  with fp8 products, each a kernel of its own, instead: to 62.8

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

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import FeedForward
from torch import Tensor

from promptdrop.engines import kernels
from promptdrop.engines.quantization import Fp8Linear
from promptdrop.engines.rows import Branch, Norm, Rows, Scaled

SEQUENCE_MULTIPLE = 32  # transformer_z_image.py: SEQ_MULTI_OF
ROTARIES = 32  # kept, of as many sizes and text lengths: 2 MiB each at 1024x1024
CAPTIONS = 8  # kept refined: guidance has two for each sequence of a batch


class Positions(NamedTuple):
    """The positions of images that lie end to end in one sequence of S rows."""

    freqs: Tensor  # cosines and sines, float32 [S, width / 2, 2]
    runs: list[tuple[int, int]]  # (images, rows): neighbours of one length, and how long each is


def through(blocks: Iterable[Any], x: Tensor, positions: Positions, adaln: Tensor | None) -> Tensor:
    """Do what ZImageTransformerBlock.forward does, for one block after the other; x [S, dim].

    The sum at the end of a block is made in the pass that begins the next one.
    """
    branch = None
    for block in blocks:
        for (
            hook
        ) in block._forward_pre_hooks.values():  # these hooks bring weights that are offloaded
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
    """Do what FeedForward does before w2: h [S, dim] to [S, hidden]."""
    w1, w3 = feed_forward.w1, feed_forward.w3
    if isinstance(h, Scaled):
        return kernels.gated(w1(h), w3(h), fp8=True)
    return kernels.gated_products(h, w1.weight, w3.weight)


def modulation(block: Any, adaln: Tensor | None) -> Sequence[Tensor | None]:
    """Scale and gate of the attention, then of the feed-forward, before 1 + and tanh: each [dim]."""
    return block.adaLN_modulation(adaln)[0].chunk(4) if block.modulation else [None] * 4


def norm_of(norm: Any, scale: Tensor | None = None) -> Norm:
    """Return the norm of a module as kernels take it."""
    return Norm(norm.weight, norm.eps, scale)


def branch_of(y: Tensor, norm: Any, gate: Tensor | None) -> Branch:
    """Return the branch that a block adds to its input, as kernels take it."""
    return Branch(y, norm.weight, norm.eps, gate)


def attention(attn: Any, h: Rows, positions: Positions) -> Tensor:
    """Do what ZSingleStreamAttnProcessor does; h [S, dim]."""
    query, key, value = attn.to_q(h), attn.to_k(h), attn.to_v(h)  # each [S, dim]
    query = kernels.normed_rotated(query, norm_of(attn.norm_q), positions.freqs)
    key = kernels.normed_rotated(key, norm_of(attn.norm_k), positions.freqs)
    # Each image attends to itself only, whatever the others' lengths: no mask and no padding. Neighbours
    # of one length are one call, because the queries of one small image do not fill a GPU evenly.
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
    """Attention of query, key and value, each [B, S, heads, width]; returns [B S, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines for one image size and text length, each [S, width / 2, 2]."""

    image: Tensor
    text: Tensor

    @property
    def joint(self) -> Tensor:
        """The tables of image and text, end to end."""
        return torch.cat([self.image, self.text])


@dataclass(frozen=True)
class Caption:
    """Texts that were refined together. It keeps them alive, so that no other object gets their ids."""

    texts: list[Tensor]  # each [tokens, width]
    refined: Tensor  # [sum of L, dim]


class FastForward:
    """ZImageTransformer2DModel.forward without its loops over Python lists.

    At most `most` images lie end to end in one sequence; guidance has two for each image asked for.
    """

    def __init__(self, transformer: Any, most: int = 1) -> None:
        self._transformer = transformer
        self._most = most
        self._rotaries: OrderedDict[tuple[int, int, int], Rotary] = OrderedDict()
        self._captions: OrderedDict[tuple[tuple[int, int], ...], Caption] = OrderedDict()

    def __call__(
        self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], **_: Any
    ) -> tuple[list[Tensor]]:
        """Evaluate a batch of B images.

        x: B tensors [16, 1, h, w] of one size. t: [B], 1 - sigma, the same for all. cap_feats: B
        tensors [tokens, width] of any lengths.
        """
        sequences = -(-len(x) // self._most)
        images = -(-len(x) // sequences)
        velocities: list[Tensor] = []
        for first in range(0, len(x), images):
            part = slice(first, first + images)
            velocities += self.velocities(x[part], t[:1], cap_feats[part])
        return (velocities,)

    def velocities(self, latents: list[Tensor], t: Tensor, texts: list[Tensor]) -> list[Tensor]:
        """Evaluate one sequence of B images.

        latents: B tensors [16, 1, h, w]. t: [1]. texts: B tensors [tokens, width].
        Returns B tensors [16, 1, h, w].
        """
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
        """Return the refined texts [sum of L, dim].

        They are kept: all evaluations of an image share them, as they do not depend on the noise level.
        """
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
        """Return the cosines and sines of a shape, which are kept for all images of the shape."""
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
    """Pad each part [n, dim] to a multiple of 32 rows, and put them end to end: [sum of n32, dim]."""
    return torch.cat(
        [x for p in parts for x in (p, pad_token.expand(-len(p) % SEQUENCE_MULTIPLE, -1))]
    )


def end_to_end(tables: list[Tensor]) -> Positions:
    """Put the tables of images, each [S, width / 2, 2], end to end; a single one is not copied."""
    runs = [(len([*equal]), length) for length, equal in itertools.groupby(tables, len)]
    return Positions(tables[0] if len(tables) == 1 else torch.cat(tables), runs)


def patchify(latents: Tensor) -> Tensor:
    """Cut latents [16, 1, h, w] into patches [N, 64], a patch's values ordered (row, column, channel)."""
    c, _, h, w = latents.shape
    patches = latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0)
    return patches.reshape((h // 2) * (w // 2), 4 * c)


def unpatchify(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Put patches [N, 64] together again: [16, 1, h, w]."""
    latents = patches.view(rows, columns, 2, 2, -1).permute(4, 0, 2, 1, 3)
    return latents.reshape(-1, 1, rows * 2, columns * 2)


def image_ids(rows: int, columns: int, text_length: int) -> Tensor:
    """Positions of an image's patches [N32, 3]: one frame after the text; zeros for the padding."""
    ids = torch.zeros(rows * columns + -(rows * columns) % SEQUENCE_MULTIPLE, 3, dtype=torch.long)
    frame = torch.tensor([text_length + 1])
    grid = torch.meshgrid(frame, torch.arange(rows), torch.arange(columns), indexing="ij")
    ids[: rows * columns] = torch.stack(grid, dim=-1).view(-1, 3)
    return ids


def text_ids(length: int) -> Tensor:
    """Positions of a text's tokens [L, 3]: along the first axis, from 1."""
    ids = torch.zeros(length, 3, dtype=torch.long)
    ids[:, 0] = torch.arange(1, length + 1)
    return ids


@contextmanager
def together(transformer: Any, forward: FastForward) -> Iterator[None]:
    """Have the transformer evaluated by `forward` within the context, afterwards by the library."""
    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward  # the class's own is there again


def join_weights(transformer: Any) -> None:
    """Put each pair of weights that `kernels.gated_products` multiplies by into one storage.

    Raises torch.OutOfMemoryError: there is no room for a copy of one pair.
    """
    for block in transformer.modules():
        if isinstance(block, FeedForward) and not isinstance(block.w1, Fp8Linear):
            both = torch.stack([block.w1.weight.data, block.w3.weight.data])  # [2, hidden, dim]
            block.w1.weight.data, block.w3.weight.data = both
    torch.cuda.empty_cache()  # the freed pieces are too small for anything else


def meet_text_lengths(
    transformer: Any, height: int, width: int, most: int, images: int, on_step: Callable[[], None]
) -> None:
    """Evaluate every shape once, because the libraries choose their kernels per shape.

    The shapes are every padded text length up to `most` tokens, and 2 to `images` images together.
    """
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
