"""The first stage of training: the VAE."""

import os
import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from . import model
from .data import PictureBatches
from .plan import LOG_EVERY, Log, Plan, batches_from, draw, rate_at, set_rate

VAE_RATE = 2e-3  # peak learning rate
VAE_DECAY_SHARE = 0.8  # of the VAE's steps
KL_WEIGHT = 1e-4  # of the mean KL divergence per latent element, in nats


def vae_stage(plan: Plan, log: Log) -> AutoencoderKL:
    """The trained VAE: loaded if an earlier run finished it."""
    folder = plan.work / "vae"
    if not folder.exists():
        start = time.perf_counter()
        vae = train_vae(plan, log)
        partial = plan.work / "vae.partial"
        vae.to(memory_format=torch.contiguous_format).save_pretrained(partial)
        os.replace(partial, folder)
        log.spent("vae", time.perf_counter() - start)
    vae = AutoencoderKL.from_pretrained(folder)
    vae.register_to_config(_name_or_path="")  # a checkpoint need not tell where it was made
    return vae


def train_vae(plan: Plan, log: Log) -> AutoencoderKL:
    """Train the VAE by squared and absolute error with a little KL, then measure its latents."""
    torch.backends.cudnn.benchmark = True  # one shape for ever; the flow's batches vary
    vae = model.build_vae().to(plan.device, memory_format=torch.channels_last)
    if plan.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=1e-4
    )
    dataset = PictureBatches(plan.seed, plan.vae_pixels)
    for step, pictures in enumerate(batches_from(dataset, range(plan.vae_steps), plan)):
        set_rate(optimizer, rate_at(step, plan.vae_steps, VAE_RATE, VAE_DECAY_SHARE))
        images = draw(pictures, plan.device)  # [B, 3, H, W]
        images = images.contiguous(memory_format=torch.channels_last)  # [B, 3, H, W]
        error, kl = vae_losses(vae, images, plan.device)
        loss = 4 * error.square().mean() + error.abs().mean() + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.vae_steps:
            psnr = -10 * torch.log10((error / 2).square().mean())
            log.loss("vae", step + 1, loss=loss.item(), psnr=psnr.item(), kl=kl.item())
    with torch.compiler.set_stance("force_eager"):  # not worth compiling once more
        set_latent_scale(vae, dataset, plan)
    torch.backends.cudnn.benchmark = False
    return vae


def vae_losses(vae: AutoencoderKL, images: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Reconstruction error [B, 3, H, W] and mean KL divergence per latent element, in nats."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample  # [B, 3, H, W]
    mean, logvar = posterior.mean.float(), posterior.logvar.float()  # [B, 16, H/8, W/8]
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return decoded.float() - images, kl


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, dataset: PictureBatches, plan: Plan) -> None:
    """Set scaling_factor and shift_factor so that scaled latents have mean 0 and variance 1."""
    latents = [
        vae.encode(draw(dataset[plan.vae_steps + i], plan.device)).latent_dist.mode().flatten()
        for i in range(8)
    ]
    values = torch.cat(latents).double()  # [8 batches of elements]
    shift, scale = values.mean().item(), 1 / values.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
