"""A small ZImagePipeline checkpoint to try things out: real code, weights that know nothing.

Everything is made here: no network, no other file. The parts have the real model's kinds and rules
(latents of 16 channels at an eighth of the size, sides in multiples of 16) and tiny widths.
Importing this imports torch.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model
from transformers.utils import logging as transformers_logging

from promptdrop.errors import UsageError

SEED = 20251127
TEXT_WIDTH = 32
VOCABULARY = 700  # 256 bytes, the rest learnt from CORPUS
CONTRAST = 1.7  # of the decoder's last layer: colourful noise, few pixels clipped

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# Qwen3's template as far as one user message goes (Qwen/Qwen3-4B, tokenizer_config.json).
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
CORPUS = (
    "a photo of a red fox in the snow at sunset, highly detailed, soft light, film grain",
    "user\nassistant\nsystem\n a cat and a dog in front of a house, a castle on a hill by the sea",
    "an oil painting of a lighthouse in a storm, a portrait of an old sailor, a bowl of fruit",
    "a robot reading a book in the rain, neon signs, a street at night, wide angle, 35 mm",
)


def write(directory: Path) -> None:
    """Write the checkpoint in diffusers' layout; the same bytes every time. All of it or nothing.

    Raises UsageError: `directory` exists and is not an empty folder.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory}: exists and is not an empty folder; nothing was written")
    transformers_logging.disable_progress_bar()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        unfinished = Path(scratch) / "model"
        build().save_pretrained(unfinished)
        for file in unfinished.rglob("*.safetensors"):
            file.chmod((unfinished / "model_index.json").stat().st_mode)  # safetensors writes 0600
        unfinished.rename(directory)  # onto an empty folder too, rename(2)


def build() -> Any:
    """The pipeline in float32 on the CPU. The caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = _tokenizer()
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
    return pipe


def _tokenizer() -> Any:
    """Byte-level BPE: all 256 bytes are symbols, so every text has tokens and comes back whole."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
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
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _text_encoder(tokenizer: Any) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3Model(config).eval()


def _transformer() -> Any:
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=TEXT_WIDTH,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[16, 8, 8],  # sums to dim // n_heads
        axes_lens=[8192, 512, 512],
    )
    for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad_token, std=0.02)  # uninitialised memory before diffusers 0.40
    return transformer.eval()


def _vae() -> Any:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(8, 16, 16, 16),  # four blocks: an eighth of the size
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(CONTRAST)
        vae.decoder.conv_out.bias.zero_()
    return vae.eval()
