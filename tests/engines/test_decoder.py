"""The decoder that is compiled computes what the library's does."""

import torch
from diffusers import AutoencoderKL

from promptdrop.engines.decoder import rewrite


def test_a_compiled_decoder_is_the_librarys() -> None:
    """Its group norms and its attention, in several parts too, compute what the library's do."""
    decoder = AutoencoderKL(
        block_out_channels=(32, 64),
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).decoder.requires_grad_(False)
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = decoder(latents)
    rewrite(decoder)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)

    assert torch.equal(decoder(latents), expected)  # uncompiled, it is the library's
    torch.testing.assert_close(compiled(latents), expected, rtol=1e-4, atol=1e-5)
