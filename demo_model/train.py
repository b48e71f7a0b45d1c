"""Train the demonstration model from nothing: VAE, words, then text encoder and transformer.

usage: python -m demo_model.train [--work DIR] [--out CHECKPOINT]
Run it again with the same --work and it goes on: a finished VAE and text encoder are kept, and the
last stage resumes from its last saved step.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import torch.fx.experimental._config
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Tokenizer, Qwen3Model

from . import data, model
from .data import Captioned, CaptionedBatches, PictureBatches, Pictures, Said, SaidBatches
from .evaluate import add_evaluation, as_table, evaluate, load
from .world import render

VAE_RATE = 2e-3  # peak learning rate
VAE_DECAY_SHARE = 0.8  # of the VAE's steps
KL_WEIGHT = 1e-4  # of the mean KL divergence per latent element, in nats
WORDS_RATE = 1e-3  # peak learning rate
FLOW_RATE = 1.2e-3  # peak learning rate
WARMUP_STEPS = 200
DECAY_SHARE = 0.4  # of the flow's time, at the end, brings the learning rate down to zero
EMA_DECAY = 0.999
HIGH_SHARE = 0.35  # of the noise levels lie above HIGH_SIGMA; the rest follow inference's shift
HIGH_SIGMA = 0.75
SAVE_EVERY = 2000  # steps
LOG_EVERY = 100  # steps
MOST_STEPS = 1_000_000  # more than the flow's time allows on any machine

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Plan:
    """How much to train, and where; the defaults made the shipped checkpoint."""

    work: Path
    out: Path
    device: str = "cuda"
    seed: int = 0
    vae_steps: int = 2500
    vae_pixels: int = 160 * 160 * 32  # in a batch
    words_steps: int = 800
    words_prompts: int = 256  # in a batch
    flow_seconds: float = 400.0  # the schedule goes by the clock, to end in time on any machine
    flow_tokens: int = 96000  # in a batch
    workers: int = 14
    eval_prompts: int = 500
    compile: bool = True


class Log:
    """Losses and stage times of a run, kept in the work folder; a resumed run appends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {"vae": [], "words": [], "flow": [], "seconds": {}}
        if path.exists():
            self.entries = json.loads(path.read_text())

    def loss(self, stage: str, step: int, **values: float) -> None:
        row = {"step": step} | {k: float(f"{v:.5g}") for k, v in values.items()}
        self.entries[stage].append(row)
        print(stage, row, flush=True)

    def spent(self, stage: str, seconds: float) -> None:
        self.entries["seconds"][stage] = round(seconds, 1)
        self.write()

    def write(self) -> None:
        replace_text(self.path, json.dumps(self.entries))


def replace_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def batches_from(dataset: Dataset[Batch], steps: range, plan: Plan) -> Iterator[Batch]:
    """The batches of these steps, in order, made by worker processes ahead of need."""
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=list(steps),
        num_workers=plan.workers,
        prefetch_factor=4 if plan.workers else None,
    )
    yield from loader


def draw(pictures: Pictures, device: str) -> Tensor:
    """Pictures on the device: [B, 3, H, W] in -1..1."""
    packed = pictures.packed.to(device, non_blocking=True)  # [B, 17]
    return render(packed, pictures.height, pictures.width)


def set_rate(
    optimizer: torch.optim.Optimizer, peak: float, step: int, done: float, decay_share: float
) -> None:
    """Warm up over the first steps, hold, then fall linearly to zero as `done` goes to 1."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = max(0.0, min(1.0, (1 - done) / decay_share))
    for group in optimizer.param_groups:
        group["lr"] = peak * min(rise, fall)


# Stage 1: the VAE


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
        set_rate(optimizer, VAE_RATE, step, step / plan.vae_steps, VAE_DECAY_SHARE)
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
    return AutoencoderKL.from_pretrained(folder)


# Stage 2: words


def train_words(text_encoder: Qwen3Model, tokenizer: Qwen2Tokenizer, plan: Plan, log: Log) -> None:
    """Teach the text encoder to say what a prompt says, from its last token.

    Flow matching alone finds the meaning of words very late: at most noise levels the picture
    itself tells more than they do."""
    sizes = data.CLASS_COUNTS
    head = nn.Linear(model.TEXT_DIM, sum(sizes)).to(plan.device)
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *head.parameters()], lr=WORDS_RATE, betas=(0.9, 0.98)
    )
    dataset = SaidBatches(CaptionedBatches(tokenizer, plan.seed, 0), plan.words_prompts)
    for step, said in enumerate(batches_from(dataset, range(plan.words_steps), plan)):
        set_rate(optimizer, WORDS_RATE, step, step / plan.words_steps, 0.5)
        loss, right = words_loss(text_encoder, head, said, plan.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.words_steps:
            log.loss("words", step + 1, loss=loss.item(), right=right.item())


def words_loss(
    text_encoder: Qwen3Model, head: nn.Linear, said: Said, device: str
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the attributes, and the share of prompts read wholly right."""
    ids, lengths = said.ids.to(device), said.lengths.to(device)  # [B, L], [B]
    targets = said.targets.to(device)  # [B, attributes]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.encode_text(text_encoder, ids)  # [B, L, TEXT_DIM]
    last = hidden[torch.arange(len(ids), device=device), lengths - 1].float()  # [B, TEXT_DIM]
    last = F.rms_norm(last, last.shape[-1:])  # [B, TEXT_DIM], as the transformer reads it
    logits = head(last).split(data.CLASS_COUNTS, dim=-1)  # each [B, classes]
    losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets.T, strict=True)]
    guesses = torch.stack([x.argmax(-1) for x in logits], dim=1)  # [B, attributes]
    return torch.stack(losses).mean(), (guesses == targets).all(1).float().mean()


def words_stage(text_encoder: Qwen3Model, tokenizer: Qwen2Tokenizer, plan: Plan, log: Log) -> None:
    """Give the text encoder its words: loaded if an earlier run learned them."""
    saved = plan.work / "words.pt"
    if not saved.exists():
        start = time.perf_counter()
        train_words(text_encoder, tokenizer, plan, log)
        torch.save(text_encoder.state_dict(), plan.work / "words.partial")
        os.replace(plan.work / "words.partial", saved)
        log.spent("words", time.perf_counter() - start)
    text_encoder.load_state_dict(torch.load(saved, map_location=plan.device))


# Stage 3: text encoder and transformer


@dataclass
class Flow:
    """What the last stage trains, and what it needs to go on."""

    text_encoder: Qwen3Model
    transformer: ZImageTransformer2DModel
    averages: nn.ModuleList  # exponential moving averages of the two, for the checkpoint
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0  # spent on those steps

    def parameters(self) -> list[nn.Parameter]:
        return [*self.text_encoder.parameters(), *self.transformer.parameters()]

    def state(self) -> dict[str, Any]:
        modules = ("text_encoder", "transformer", "averages", "optimizer")
        return {name: getattr(self, name).state_dict() for name in modules} | {
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state.pop("step"), state.pop("seconds")
        for name, values in state.items():
            getattr(self, name).load_state_dict(values)


def build_flow(text_encoder: Qwen3Model, device: str) -> Flow:
    transformer = model.build_transformer().to(device)
    nn.init.zeros_(transformer.all_final_layer["2-1"].linear.weight)
    averages = nn.ModuleList([copy.deepcopy(text_encoder), copy.deepcopy(transformer)])
    averages.requires_grad_(False)
    model.use_real_rotary(transformer)
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *transformer.parameters()],
        lr=FLOW_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=device == "cuda",
    )
    return Flow(text_encoder, transformer, averages, optimizer)


def train_flow(
    flow: Flow, vae: AutoencoderKL, tokenizer: Qwen2Tokenizer, plan: Plan, log: Log
) -> None:
    """Train by flow matching from where `flow` is until the plan's time is spent."""
    if plan.compile:
        compile_blocks(flow)
    vae = vae.to(plan.device, torch.bfloat16, memory_format=torch.channels_last)
    dataset = CaptionedBatches(tokenizer, plan.seed, plan.flow_tokens)
    torch.manual_seed(plan.seed + flow.step)
    resumed_at = time.perf_counter() - flow.seconds
    losses: list[Tensor] = []
    for batch in batches_from(dataset, range(flow.step, MOST_STEPS), plan):
        losses.append(flow_step(flow, vae, batch, plan))
        flow.step += 1
        flow.seconds = time.perf_counter() - resumed_at
        ended = flow.seconds >= plan.flow_seconds
        if flow.step % LOG_EVERY == 0 or ended:
            loss = torch.stack(losses).mean().item()
            log.loss("flow", flow.step, loss=loss, seconds=flow.seconds)
            losses.clear()
        if flow.step % SAVE_EVERY == 0 or ended:
            log.spent("flow", flow.seconds)
            save_flow(flow, vae, tokenizer, plan)
        if ended:
            return


def compile_blocks(flow: Flow) -> None:
    """Compile the joint layers, once for any batch, length and size.

    The refiners stay eager: compiling their other shapes costs more time than it saves."""
    torch.fx.experimental._config.use_duck_shape = False  # a batch of `dim` images is chance
    for block in flow.transformer.layers:
        block.compile(dynamic=True)


def flow_step(flow: Flow, vae: AutoencoderKL, batch: Captioned, plan: Plan) -> Tensor:
    """One optimizer step on one batch; returns its loss."""
    done = flow.seconds / plan.flow_seconds
    set_rate(flow.optimizer, FLOW_RATE, flow.step, done, DECAY_SHARE)
    pictures = encode_pictures(vae, draw(batch.pictures, plan.device))  # [pictures, 16, h, w]
    latents = pictures[batch.picture_of.to(plan.device)]  # [B, 16, h, w]
    loss = flow_loss(flow, latents, batch, plan.device)
    flow.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
    flow.optimizer.step()
    decay = min(EMA_DECAY, (1 + flow.step) / (10 + flow.step))
    averages: list[Tensor] = list(flow.averages.parameters())
    torch._foreach_lerp_(averages, list[Tensor](flow.parameters()), 1 - decay)
    return loss.detach()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents [B, 16, H/8, W/8] of images [B, 3, H, W]."""
    images = images.to(vae.dtype, memory_format=torch.channels_last)
    latents = vae.encode(images).latent_dist.mode().float()  # [B, 16, H/8, W/8]
    scaled: Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled.contiguous()


def flow_loss(flow: Flow, latents: Tensor, batch: Captioned, device: str) -> Tensor:
    """Mean squared error of the predicted velocity, data minus noise (Lipman et al., 2023)."""
    sigma = sample_sigmas(latents.shape[0], latents.device)  # [B]
    noise = torch.randn_like(latents)  # [B, 16, h, w]
    level = sigma[:, None, None, None]  # [B, 1, 1, 1]
    noisy = (1 - level) * latents + level * noise  # [B, 16, h, w]
    ids = batch.ids.to(device, non_blocking=True)  # [B, L]
    lengths = batch.lengths.to(device, non_blocking=True)  # [B]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        text = model.encode_text(flow.text_encoder, ids)  # [B, L, TEXT_DIM]
        velocity = model.predict_velocity(flow.transformer, noisy, 1 - sigma, text, lengths)
    return F.mse_loss(velocity.float(), latents - noise)


def sample_sigmas(count: int, device: torch.device) -> Tensor:
    """Noise levels [count], evenly spread: most shifted as the scheduler's, many of them high.

    Words decide a picture only while it is nearly noise, so high levels get a share of their own.
    """
    spread = torch.arange(count, device=device) + torch.rand(count, device=device)  # [count]
    u = spread[torch.randperm(count, device=device)] / count  # [count]
    shifted = model.SHIFT * u / (1 + (model.SHIFT - 1) * u)  # [count]
    high = HIGH_SIGMA + (1 - HIGH_SIGMA) * u  # [count]
    return torch.where(torch.rand(count, device=device) < HIGH_SHARE, high, shifted)


def save_flow(flow: Flow, vae: AutoencoderKL, tokenizer: Qwen2Tokenizer, plan: Plan) -> None:
    """Save the state to go on from, and the averages as a checkpoint."""
    partial = plan.work / "flow.partial"
    torch.save(flow.state(), partial)
    os.replace(partial, plan.work / "flow.pt")
    pipeline(flow, vae, tokenizer).save_pretrained(plan.out)


def pipeline(flow: Flow, vae: AutoencoderKL, tokenizer: Qwen2Tokenizer) -> ZImagePipeline:
    """The averages as a bfloat16 pipeline on the CPU."""
    text_encoder, transformer = copy.deepcopy(flow.averages).cpu()
    vae = copy.deepcopy(vae).to("cpu", memory_format=torch.contiguous_format)
    pipe = model.assemble(tokenizer, text_encoder.eval(), transformer.eval(), vae.eval())
    return pipe.to(torch.bfloat16)


def flow_stage(vae: AutoencoderKL, plan: Plan, log: Log) -> None:
    tokenizer = model.build_tokenizer()
    text_encoder = model.build_text_encoder(tokenizer).to(plan.device)
    words_stage(text_encoder, tokenizer, plan, log)
    flow = build_flow(text_encoder, plan.device)
    saved = plan.work / "flow.pt"
    if saved.exists():
        flow.restore(torch.load(saved, map_location=plan.device))
    if flow.seconds < plan.flow_seconds:
        train_flow(flow, vae, tokenizer, plan, log)


# The whole run


def train(plan: Plan) -> None:
    """All stages and the evaluation; writes the checkpoint, and RESULTS.json beside it."""
    plan.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans each new shape of a batch anew: slow
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader's workers are processes already
    log = Log(plan.work / "log.json")
    vae = vae_stage(plan, log)
    flow_stage(vae, plan, log)
    results = plan.out.parent / "RESULTS.json"
    results.write_text(json.dumps(run_facts(plan) | log.entries, indent=1) + "\n")
    figures = evaluate(load(plan.out, torch.bfloat16, plan.device), plan.eval_prompts)
    add_evaluation(results, figures)
    print(as_table(figures))


def run_facts(plan: Plan) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor()
    return {
        "hardware": f"one {gpu}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "plan": {k: v for k, v in vars(plan).items() if not isinstance(v, Path)},
    }


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=here / "work", help="state to resume from")
    parser.add_argument("--out", type=Path, default=here / "checkpoint")
    for name in ("device", "seed", "vae_steps", "vae_pixels", "words_steps", "words_prompts"):
        add_option(parser, name)
    for name in ("flow_seconds", "flow_tokens", "workers", "eval_prompts"):
        add_option(parser, name)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(Plan(**vars(parser.parse_args())))


def add_option(parser: argparse.ArgumentParser, name: str) -> None:
    """An option whose type and default are the plan's."""
    default = getattr(Plan, name)
    parser.add_argument(
        f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}"
    )


if __name__ == "__main__":
    main()
