"""The last stage of training: the transformer, by flow matching on the frozen VAE and text encoder."""

import copy
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

from . import data, model
from .data import CaptionedChunks, Course, Prompts
from .plan import LOG_EVERY, Log, Plan, batches_from, draw, rate_at, set_rate

FLOW_RATE = 1e-3  # peak learning rate
FIRST_SHARE = 0.4  # of the flow's steps are on the first course alone
LATER_FIRST_SHARE = 0.2  # of the later ones too
DECAY_SHARE = 0.4  # of the flow's steps, at the end, bring the learning rate down to zero
EMA_DECAY = 0.999
HIGH_SHARE = 0.3  # of the noise levels lie above HIGH_SIGMA; the rest follow inference's shift
HIGH_SIGMA = 0.75
SAVE_EVERY = 5000  # steps


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
    """The transformer in training, its average and its optimizer: all that a resumed run needs."""

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
