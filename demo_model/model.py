"""Z-Image's classes at toy size, and its transformer's forward pass for one-size batches.

Axis order: images [B, 3, H, W], latents [B, 16, H/8, W/8], tokens [B, S, dim].
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.normalization import RMSNorm
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from .captions import filler_words, lexicon

SHIFT = 3.0  # of the noise schedule, as Z-Image-Turbo's
SEQUENCE_MULTIPLE = 32  # the transformer pads its token sequences to multiples of this
TEXT_DIM = 192
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (  # Qwen3's, without its tools and system parts
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE whose tokens never span two words of the captions' lexicon."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lexicon() * 20 + filler_words(), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token=None,
        model_max_length=131072,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """1.2 M parameters.  The pipeline reads the last layer's input, so three of four layers act."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def build_transformer() -> ZImageTransformer2DModel:
    """5.1 M parameters: six joint layers, one refiner each for image and text tokens."""
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=192,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        qk_norm=True,
        cap_feat_dim=TEXT_DIM,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )


def build_vae() -> AutoencoderKL:
    """0.9 M parameters, without the middle attention: every output depends on its surroundings."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 64, 64),
        sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def assemble(
    tokenizer: Qwen2Tokenizer,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
    vae: AutoencoderKL,
) -> ZImagePipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    return ZImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def templated(tokenizer: Qwen2Tokenizer, prompt: str) -> str:
    """The prompt inside the chat template, exactly as ZImagePipeline._encode_prompt puts it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    assert isinstance(text, str)
    return text


def encode_text(text_encoder: Qwen3Model, ids: Tensor) -> Tensor:
    """Hidden states the pipeline conditions on, for right-padded ids [B, L].

    Attention is causal, so padding on the right changes nothing before it, and no mask is needed.
    Returns: [B, L, TEXT_DIM]."""
    states = text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
    hidden: Tensor = states[-2]  # [B, L, TEXT_DIM]
    return hidden


class RealRotaryAttention:
    """ZSingleStreamAttnProcessor with real-valued rotary embeddings, which inductor can compile."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """freqs_cis: cosines and sines [1, S, 1, head_dim / 2, 2]."""
        assert freqs_cis is not None
        assert attention_mask is None
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # [B, S, heads, head_dim]
        key = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1))  # [B, S, heads, head_dim]
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))  # [B, S, heads, head_dim]
        query, key = rotate(attn.norm_q(query), freqs_cis), rotate(attn.norm_k(key), freqs_cis)
        mixed = F.scaled_dot_product_attention(
            query.to(value.dtype).transpose(1, 2),
            key.to(value.dtype).transpose(1, 2),
            value.transpose(1, 2),
        )  # [B, heads, S, head_dim]
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # [B, S, dim]
        return out


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate pairs of channels of x [B, S, heads, head_dim] by angles given as cosine and sine."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # each [B, S, heads, head_dim / 2]
    cosine, sine = freqs.unbind(-1)  # each [1, S, 1, head_dim / 2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2)  # [B, S, heads, head_dim]


def quicken(transformer: ZImageTransformer2DModel) -> None:
    """Make the transformer use fewer kernels, with the same weights and names: torch's own norms, rotary
    embeddings without complex numbers.  Afterwards its attention expects a `Rotary`'s frequencies."""
    for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
        block.attention.set_processor(RealRotaryAttention())
    for module in list(transformer.modules()):
        for name, child in module.named_children():
            if isinstance(child, RMSNorm):
                norm = nn.RMSNorm(child.dim, eps=child.eps, device=child.weight.device)
                norm.weight = child.weight
                setattr(module, name, norm)


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of one image size and text length, each [1, S, 1, head_dim / 2, 2]."""

    image: Tensor
    text: Tensor


def build_rotary(
    transformer: ZImageTransformer2DModel, rows: int, columns: int, length: int
) -> Rotary:
    """For rows x columns image tokens and `length` text tokens, on the transformer's device."""
    embed, device = transformer.rope_embedder, transformer.device
    ids = image_ids(rows, columns, length).to(device), text_ids(length).to(device)
    return Rotary(*(torch.view_as_real(embed(x))[None, :, None] for x in ids))


def predict_velocity(
    transformer: ZImageTransformer2DModel,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_lengths: Tensor,
    rotary: Rotary,
) -> Tensor:
    """ZImageTransformer2DModel.forward for a batch of one image size and one text length.

    That method walks through lists in Python; this one is the same function (tested) as long as
    each text is padded by less than SEQUENCE_MULTIPLE, and a CUDA graph can hold it.  Needs
    `quicken`.  Tokens are float32 between the blocks, under autocast too.
    Args: latents [B, 16, h, w]; t [B], 1 - sigma; text [B, L, TEXT_DIM]; text_lengths [B].
    Returns: clean latents minus noise [B, 16, h, w]."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    adaln = transformer.t_embedder(t * transformer.t_scale)  # [B, dim]

    image = transformer.all_x_embedder["2-1"](patchify(latents)).float()  # [B, N, dim]
    missing = -image.shape[1] % SEQUENCE_MULTIPLE
    pad = transformer.x_pad_token.expand(image.shape[0], missing, -1)  # [B, missing, dim]
    image = torch.cat([image, pad], dim=1)  # [B, N32, dim]
    for layer in transformer.noise_refiner:
        image = layer(image, None, rotary.image, adaln)

    is_pad = torch.arange(text.shape[1], device=text.device) >= text_lengths[:, None]  # [B, L]
    text = transformer.cap_embedder(text).float()  # [B, L, dim]
    text = torch.where(is_pad[..., None], transformer.cap_pad_token, text)  # [B, L, dim]
    for layer in transformer.context_refiner:
        text = layer(text, None, rotary.text)

    joint = torch.cat([image, text], dim=1)  # [B, N32 + L, dim]
    freqs = torch.cat([rotary.image, rotary.text], dim=1)  # [1, N32 + L, 1, head_dim / 2, 2]
    for layer in transformer.layers:
        joint = layer(joint, None, freqs, adaln)
    patches = transformer.all_final_layer["2-1"](joint[:, : rows * columns], c=adaln)  # [B, N, 64]
    return unpatchify(patches, rows, columns)


def patchify(latents: Tensor) -> Tensor:
    """[B, 16, h, w] to [B, N, 64], a patch's channels ordered (row, column, channel)."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpatchify(patches: Tensor, rows: int, columns: int) -> Tensor:
    """[B, N, 64] back to [B, 16, h, w]."""
    b = patches.shape[0]
    latents = patches.view(b, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return latents.reshape(b, -1, rows * 2, columns * 2)


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
