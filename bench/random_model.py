"""Write a checkpoint of Z-Image-Turbo's true architecture with random weights, for lack of the real one.

    python -m bench.random_model DIR           # 20 GB, built on the GPU if there is one

What a render costs depends on shapes and dtypes, not on what the weights say; what it draws is noise.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRANSFORMER = {"axes_lens": [1536, 512, 512]}  # all else is the library's default
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "latent_channels": 16,
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
TEXT_ENCODER = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
PARAMETERS = 6_154_908_736  # of Z-Image-Turbo's transformer


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, and Qwen's template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def unfilled() -> dict[str, Any]:
    """The three networks on the meta device: shapes without memory."""
    with torch.device("meta"):
        return {
            "transformer": ZImageTransformer2DModel(**TRANSFORMER),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": Qwen3Model(Qwen3Config(**TEXT_ENCODER)),
        }


def filled(module: torch.nn.Module, device: str) -> Any:
    """Fill a network, in bfloat16, with weights that keep the signal's size: nothing overflows."""
    module = module.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:  # every one-dimensional weight is a norm's gain
                parameter.fill_(1 if name.endswith("weight") else 0)
    return module


def write(folder: Path) -> None:
    """Write the checkpoint as diffusers does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks = {name: filled(module, device) for name, module in unfilled().items()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = ZImagePipeline(scheduler=scheduler, tokenizer=tokenizer(), **networks)
    pipe.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
