"""Train the demonstration model from nothing: VAE, then text encoder, then transformer.

usage: python -m demo_model.train [--work DIR] [--out CHECKPOINT]
Run it again with the same --work and it goes on: a finished VAE and text encoder are kept, and the
last stage resumes from its last saved step.
"""

import argparse
import copy
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3Model

from . import data, model
from .data import CaptionedChunks, Course, PictureBatches, Pictures, Prompts, Said, SaidBatches
from .evaluate import add_evaluation, as_table, evaluate, load
from .world import is_held_out, render, sample_scene

VAE_RATE = 2e-3  # peak learning rate
VAE_DECAY_SHARE = 0.8  # of the VAE's steps
KL_WEIGHT = 1e-4  # of the mean KL divergence per latent element, in nats
WORDS_RATE = 1e-3  # peak learning rate
WORDS_DECAY_SHARE = 0.5  # of the words' steps
LAST_TOKENS = 4  # of a prompt, all of the chat template, carry what it says
FLOW_RATE = 1e-3  # peak learning rate
WARMUP_STEPS = 200
FIRST_SHARE = 0.4  # of the flow's steps are on the first course alone
LATER_FIRST_SHARE = 0.2  # of the later ones too
DECAY_SHARE = 0.4  # of the flow's steps, at the end, bring the learning rate down to zero
EMA_DECAY = 0.999
HIGH_SHARE = 0.3  # of the noise levels lie above HIGH_SIGMA; the rest follow inference's shift
HIGH_SIGMA = 0.75
SAVE_EVERY = 5000  # steps
LOG_EVERY = 200  # steps

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
    words_steps: int = 900
    words_prompts: int = 256  # in a batch
    flow_steps: int = 17_000
    flow_tokens: int = 24_576  # in a batch
    courses: tuple[Course, ...] = (data.FIRST_COURSE, *data.LATER_COURSES)
    workers: int = 14
    eval_prompts: int = 500
    compile: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen parts compute in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Log:
    """Losses and stage times of a run, kept in the work folder; a resumed run appends.

    `sittings` counts how often the run was started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {
            "sittings": 0, "seconds": {}, "vae": [], "words": [], "flow": [],
        }  # fmt: skip
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


def rate_at(step: int, steps: int, peak: float, decay_share: float) -> float:
    """The learning rate: it rises over the first steps, holds, then falls linearly to zero."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = min(1.0, (1 - step / steps) / decay_share)
    return peak * min(rise, fall)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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


# Stage 2: words


def train_words(text_encoder: Qwen3Model, prompts: Prompts, plan: Plan, log: Log) -> None:
    """Teach the text encoder to say what a prompt says, from its last tokens.

    Flow matching alone finds the meaning of words very late: at most noise levels the picture
    itself tells more than they do."""
    head = nn.Linear(model.TEXT_DIM, sum(data.CLASS_COUNTS)).to(plan.device)
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *head.parameters()], lr=WORDS_RATE, betas=(0.9, 0.98)
    )
    dataset = SaidBatches(prompts, plan.seed, plan.words_prompts)
    for step, said in enumerate(batches_from(dataset, range(plan.words_steps), plan)):
        set_rate(optimizer, rate_at(step, plan.words_steps, WORDS_RATE, WORDS_DECAY_SHARE))
        loss, _ = words_loss(text_encoder, head, said, plan.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.words_steps:
            log.loss(
                "words",
                step + 1,
                loss=loss.item(),
                right=read_right(text_encoder, head, plan, dataset),
            )


@torch.no_grad()
def read_right(
    text_encoder: Qwen3Model, head: nn.Linear, plan: Plan, dataset: SaidBatches
) -> float:
    """The share of held-out prompts whose every attribute is read."""
    rng = random.Random("held-out words")
    scenes = [sample_scene(rng, i % 2 == 1, is_held_out) for i in range(256)]
    _, right = words_loss(text_encoder, head, dataset.sample(rng, scenes), plan.device)
    return right.item()


def words_loss(
    text_encoder: Qwen3Model, head: nn.Linear, said: Said, device: str
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the attributes, and the share of prompts read wholly right."""
    ids, lengths = said.ids.to(device), said.lengths.to(device)  # [B, L], [B]
    targets = said.targets.to(device).repeat_interleave(LAST_TOKENS, 0)  # [B * last, attributes]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.encode_text(text_encoder, ids)  # [B, L, TEXT_DIM]
    last = lengths[:, None] - 1 - torch.arange(LAST_TOKENS, device=device)  # [B, last]
    states = hidden[torch.arange(len(ids), device=device)[:, None], last].float().flatten(0, 1)
    states = F.rms_norm(states, states.shape[-1:])  # [B * last, TEXT_DIM], as the transformer reads
    logits = head(states).split(data.CLASS_COUNTS, dim=-1)  # each [B * last, classes]
    losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets.T, strict=True)]
    guesses = torch.stack([x.argmax(-1) for x in logits], dim=1)  # [B * last, attributes]
    return torch.stack(losses).mean(), (guesses == targets).all(1).float().mean()


def words_stage(prompts: Prompts, plan: Plan, log: Log) -> Qwen3Model:
    """The text encoder that knows its words: loaded if an earlier run taught it."""
    text_encoder = model.build_text_encoder(prompts.tokenizer).to(plan.device)
    saved = plan.work / "words.pt"
    if not saved.exists():
        start = time.perf_counter()
        train_words(text_encoder, prompts, plan, log)
        torch.save(text_encoder.state_dict(), plan.work / "words.partial")
        os.replace(plan.work / "words.partial", saved)
        log.spent("words", time.perf_counter() - start)
    text_encoder.load_state_dict(torch.load(saved, map_location=plan.device))
    return text_encoder.eval().requires_grad_(False)


# Stage 3: the transformer


@dataclass(frozen=True)
class Examples:
    """A course's pictures and prompts as the transformer meets them, on the device.

    latents [N, 16, h, w], text [P, L, TEXT_DIM], lengths [P], and picture_of [P]: which picture a
    prompt is for."""

    latents: Tensor
    text: Tensor
    lengths: Tensor
    picture_of: Tensor

    @classmethod
    @torch.no_grad()
    def make(
        cls,
        course: Course,
        prompts: Prompts,
        text_encoder: Qwen3Model,
        vae: AutoencoderKL,
        plan: Plan,
    ) -> "Examples":
        """Draw, encode and read a whole course once: afterwards the device waits for nothing."""
        dataset = CaptionedChunks(prompts, plan.seed, course)
        parts: list[tuple[Tensor, ...]] = []
        for i, chunk in enumerate(batches_from(dataset, range(len(dataset)), plan)):
            images = draw(chunk.pictures, plan.device)  # [CHUNK, 3, H, W]
            latents = torch.cat([encode_pictures(vae, x) for x in torch.split(images, 64)])
            ids = chunk.ids.to(plan.device)  # [CHUNK * PROMPTS, L]
            text = torch.cat([model.encode_text(text_encoder, x) for x in torch.split(ids, 512)])
            of = chunk.picture_of.to(plan.device) + i * data.CHUNK  # [CHUNK * PROMPTS]
            parts.append(
                (latents.to(plan.dtype), text.to(plan.dtype), chunk.lengths.to(plan.device), of)
            )
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents [B, 16, H/8, W/8] of images [B, 3, H, W]."""
    images = images.to(vae.dtype, memory_format=torch.channels_last)
    latents = vae.encode(images).latent_dist.mode().float()  # [B, 16, H/8, W/8]
    scaled: Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled.contiguous()


@dataclass
class Flow:
    """What the last stage trains, and what it needs to go on."""

    transformer: ZImageTransformer2DModel
    average: ZImageTransformer2DModel  # exponential moving average, for the checkpoint
    optimizer: torch.optim.Optimizer
    step: int = 0

    @torch.no_grad()
    def follow(self) -> None:
        """Count a step of the transformer's, and move the average towards it."""
        average, latest = (list[Tensor](m.parameters()) for m in (self.average, self.transformer))
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(average, latest, 1 - decay)
        self.step += 1

    def state(self) -> dict[str, Any]:
        modules = ("transformer", "average", "optimizer")
        return {name: getattr(self, name).state_dict() for name in modules} | {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state.pop("step")
        for name, values in state.items():
            getattr(self, name).load_state_dict(values)


def build_flow(device: str) -> Flow:
    transformer = model.build_transformer().to(device)
    nn.init.zeros_(transformer.all_final_layer["2-1"].linear.weight)
    average = copy.deepcopy(transformer).requires_grad_(False)
    model.quicken(transformer)
    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        lr=torch.zeros((), device=device),  # a tensor, for a CUDA graph reads it anew
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=True,
        capturable=device == "cuda",
    )
    return Flow(transformer, average, optimizer)


def train_flow(
    flow: Flow, lessons: list[Callable[[], Tensor]], save: Callable[[], None], plan: Plan, log: Log
) -> None:
    """Train by flow matching from where `flow` is: the first course, then all in random order."""
    torch.manual_seed(plan.seed + flow.step)
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step in range(flow.step, plan.flow_steps):
        set_rate(flow.optimizer, rate_at(step, plan.flow_steps, FLOW_RATE, DECAY_SHARE))
        rng = random.Random(f"course {plan.seed} {step}")
        first = step < FIRST_SHARE * plan.flow_steps or rng.random() < LATER_FIRST_SHARE
        lesson = lessons[0] if first else rng.choice(lessons[1:])
        losses.append(lesson().clone())
        flow.follow()
        ended = flow.step == plan.flow_steps
        if flow.step % LOG_EVERY == 0 or ended:
            loss = torch.stack(losses).mean().item()
            log.loss("flow", flow.step, loss=loss, seconds=time.perf_counter() - start)
            losses.clear()
        if flow.step % SAVE_EVERY == 0 or ended:
            save()


def build_lesson(
    flow: Flow, course: Course, examples: Examples, plan: Plan
) -> Callable[[], Tensor]:
    """One optimizer step on random examples of a course, as a call that returns its loss."""
    rows, columns = course.height // 16, course.width // 16
    rotary = model.build_rotary(flow.transformer, rows, columns, course.length)
    count = max(1, plan.flow_tokens // course.tokens)

    def lesson() -> Tensor:
        flow.optimizer.zero_grad(set_to_none=True)
        loss = flow_loss(flow.transformer, examples, count, rotary)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(flow.transformer.parameters(), 1.0)
        flow.optimizer.step()
        return loss.detach()

    return captured(lesson) if plan.device == "cuda" else lesson


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph, after three real ones: a small model is all launches without it.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture"""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay(kept: Callable[[], Tensor] = step) -> Tensor:  # the graph reads its tensors
        graph.replay()
        return loss

    return replay


def flow_loss(
    transformer: ZImageTransformer2DModel, examples: Examples, count: int, rotary: model.Rotary
) -> Tensor:
    """Mean squared error of the predicted velocity, data minus noise (Lipman et al., 2023)."""
    device = examples.latents.device
    prompt = torch.randint(len(examples.text), (count,), device=device)  # [B]
    latents = examples.latents[examples.picture_of[prompt]].float()  # [B, 16, h, w]
    sigma = sample_sigmas(count, device)  # [B]
    noise = torch.randn_like(latents)  # [B, 16, h, w]
    level = sigma[:, None, None, None]  # [B, 1, 1, 1]
    noisy = (1 - level) * latents + level * noise  # [B, 16, h, w]
    with torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    ):
        velocity = model.predict_velocity(
            transformer, noisy, 1 - sigma, examples.text[prompt], examples.lengths[prompt], rotary
        )
    return F.mse_loss(velocity.float(), latents - noise)


def sample_sigmas(count: int, device: torch.device) -> Tensor:
    """Noise levels [count], evenly spread: most shifted as the scheduler's, many of them high.

    Words decide a picture only while it is nearly noise, so high levels get a share of their own.
    """
    u = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count  # [count]
    shifted = model.SHIFT * u / (1 + (model.SHIFT - 1) * u)  # [count]
    high = HIGH_SIGMA + (1 - HIGH_SIGMA) * u  # [count]
    return torch.where(torch.rand(count, device=device) < HIGH_SHARE, high, shifted)


def flow_stage(
    prompts: Prompts, text_encoder: Qwen3Model, vae: AutoencoderKL, plan: Plan, log: Log
) -> None:
    """Train the transformer, from the last saved step if there is one, and save the checkpoint."""
    flow = build_flow(plan.device)
    saved = plan.work / "flow.pt"
    if saved.exists():
        flow.restore(torch.load(saved, map_location=plan.device))
    if flow.step == plan.flow_steps:
        return
    set_rate(flow.optimizer, 0.0)  # capturing a lesson runs it, which must not teach
    start = time.perf_counter()
    reader = copy.deepcopy(text_encoder).to(plan.dtype)
    camera = copy.deepcopy(vae).to(plan.device, plan.dtype, memory_format=torch.channels_last)
    lessons = []
    for course in plan.courses:
        examples = Examples.make(course, prompts, reader, camera, plan)
        lessons.append(build_lesson(flow, course, examples, plan))
    log.spent("courses", time.perf_counter() - start)

    def save() -> None:
        torch.save(flow.state(), plan.work / "flow.partial")
        os.replace(plan.work / "flow.partial", saved)
        parts = (copy.deepcopy(x).cpu().eval() for x in (text_encoder, flow.average, vae))
        model.assemble(prompts.tokenizer, *parts).to(torch.bfloat16).save_pretrained(plan.out)
        log.spent("flow", time.perf_counter() - made)

    made = time.perf_counter()
    train_flow(flow, lessons, save, plan, log)


# The whole run


def train(plan: Plan) -> None:
    """All stages and the evaluation; writes the checkpoint, and RESULTS.json beside it."""
    plan.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader's workers are processes already
    log = Log(plan.work / "log.json")
    log.entries["sittings"] += 1
    log.write()
    vae = vae_stage(plan, log)
    prompts = Prompts(model.build_tokenizer())
    text_encoder = words_stage(prompts, plan, log)
    flow_stage(prompts, text_encoder, vae, plan, log)
    results = plan.out.parent / "RESULTS.json"
    results.write_text(json.dumps(run_facts(plan) | log.entries, indent=1) + "\n")
    if not plan.eval_prompts:
        return
    figures = evaluate(load(plan.out, torch.bfloat16, plan.device), plan.eval_prompts)
    add_evaluation(results, figures)
    print(as_table(figures))


def run_facts(plan: Plan) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor()
    return {
        "hardware": f"one {gpu}, {os.cpu_count()} CPU cores",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "plan": {k: v for k, v in vars(plan).items() if isinstance(v, (str, int))},
    }


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=here / "work", help="state to resume from")
    parser.add_argument("--out", type=Path, default=here / "checkpoint")
    for name in ("device", "seed", "vae_steps", "vae_pixels", "words_steps", "words_prompts"):
        add_option(parser, name)
    for name in ("flow_steps", "flow_tokens", "workers", "eval_prompts"):
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
