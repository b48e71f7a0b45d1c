"""Measure a checkpoint on held-out prompts, judged without a neural network.

usage: python -m demo_model.evaluate CHECKPOINT [--dtype bfloat16] [--device cpu] [--count 500]
           [--quantization fp8]
Three minutes on one core of a CPU.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from promptdrop.engines.quantization import quantize

from .captions import describe, fill, sample_filler, sample_nonsense
from .judge import compare, is_right, look
from .model import SEQUENCE_MULTIPLE, templated
from .world import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    is_held_out,
    is_held_out_triple,
    pack,
    place,
    render,
    sample_scene,
)

STEPS = 9
SIZES = ((192, 192), (192, 192), (128, 128), (256, 256), (160, 224), (240, 144))  # px, H by W
SHARES = {  # of the prompts, per cent
    "one object": 40,
    "one object, unseen combination": 20,
    "two objects": 28,
    "one object, long prompt": 6,
    "few words": 6,
}
BARE = "colour and shape alone"
EVERY_ONE = "every one-object prompt"  # all of those but the two objects
TARGETS = {
    "one object": 0.95,
    "one object, unseen combination": 0.85,
    "two objects": 0.80,
    EVERY_ONE: 0.95,
}
TARGET_PSNR = 30.0  # dB
FILLER_TOKENS = (100, 440)  # range of a long prompt's filler


@dataclass(frozen=True)
class Case:
    """A held-out prompt and what its picture must show."""

    kind: str
    text: str
    asked: Scene
    height: int
    width: int
    seed: int


def load(checkpoint: Path, dtype: torch.dtype, device: str = "cpu") -> ZImagePipeline:
    """diffusers' own pipeline on a checkpoint, without its progress bars."""
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    pipe = ZImagePipeline.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def held_out_cases(count: int, seed: int = 2026) -> list[Case]:
    """Prompts for scenes never trained on, in both languages, in fixed shares of every kind."""
    rng = random.Random(f"held out {seed}")
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * count / 100))]
    return [sample_case(kind, rng) for kind in kinds]


def sample_case(kind: str, rng: random.Random) -> Case:
    unseen = kind == "one object, unseen combination"
    scene = sample_scene(
        rng, kind == "two objects", lambda s: is_held_out(s) and is_held_out_triple(s) == unseen
    )
    asked = say_less(scene, rng) if kind == "few words" else forget_sizes(scene, rng)
    text = describe(asked, rng, chinese=rng.random() < 0.4)
    if kind == "one object, long prompt":
        text = lengthen(text, rng)
    height, width = rng.choice(SIZES)
    return Case(kind, text, asked, height, width, rng.randrange(2**31))


def forget_sizes(scene: Scene, rng: random.Random) -> Scene:
    """Leave the sizes unsaid half of the time, and nothing else."""
    if rng.random() < 0.5:
        return scene
    return replace(scene, things=tuple(replace(t, size=None) for t in scene.things))


def say_less(scene: Scene, rng: random.Random) -> Scene:
    """Say colour and shape, and either the background or the position, or neither."""
    bare = replace(scene, things=tuple(replace(t, size=None) for t in scene.things))
    return rng.choice(
        (
            replace(bare, background=None, position=None),
            replace(bare, position=None),
            replace(bare, background=None),
        )
    )


def lengthen(text: str, rng: random.Random) -> str:
    """Put filler before a description, after it or around it (a token is about 5 characters)."""
    fillers: list[str] = []
    characters = 4.5 * rng.randint(*FILLER_TOKENS)
    while sum(len(f) * (1 if f.isascii() else 4.5) for f in fillers) < characters:
        fillers.append(sample_filler(rng))
    return fill(text, fillers, rng)


def bare_cases(seed: int = 2026) -> list[Case]:
    """Every colour and shape in both languages, with nothing else said; training had them all."""
    rng = random.Random(f"bare {seed}")
    scenes = [Scene((Thing(colour, shape),)) for colour in COLOURS for shape in SHAPES]
    return [
        Case(BARE, describe(scene, rng, chinese), scene, 192, 192, rng.randrange(2**31))
        for chinese in (False, True)
        for scene in scenes
    ]


def nonsense_cases(count: int, seed: int = 2026) -> list[Case]:
    """Prompts that describe nothing in this world; only a clean picture is asked for."""
    rng = random.Random(f"nonsense {seed}")
    texts = ["", "a cat", "a photo of a fox in the snow", "一只猫", "hello world"]
    texts += [sample_nonsense(rng) for _ in range(count - len(texts))]
    return [Case("nonsense", text, Scene(()), 192, 192, rng.randrange(2**31)) for text in texts]


def draw(pipe: ZImagePipeline, cases: list[Case]) -> NDArray[np.uint8]:
    """Draw cases of one size as one batch: uint8 [B, H, W, 3]."""
    images = pipe(
        prompt=[case.text for case in cases],
        height=cases[0].height,
        width=cases[0].width,
        num_inference_steps=STEPS,
        guidance_scale=0.0,
        generator=[torch.Generator("cpu").manual_seed(case.seed) for case in cases],
    ).images
    return np.stack([np.asarray(image) for image in images])


def batched(pipe: ZImagePipeline, cases: list[Case], limit: int) -> Iterator[list[Case]]:
    """Cases of one size and one padded text length, at most `limit` together."""
    groups: dict[tuple[int, int, int], list[Case]] = defaultdict(list)
    for case in cases:
        tokens = len(pipe.tokenizer(templated(pipe.tokenizer, case.text)).input_ids)
        groups[case.height, case.width, -(-tokens // SEQUENCE_MULTIPLE)].append(case)
    for group in groups.values():
        yield from (group[i : i + limit] for i in range(0, len(group), limit))


def score(pipe: ZImagePipeline, cases: list[Case], limit: int = 32) -> dict[str, dict[str, float]]:
    """Rates per kind of prompt: each attribute right, the four of `is_right` together, clean.

    `cases` has some of every kind."""
    rows: dict[str, list[dict[str, bool]]] = defaultdict(list)
    for batch in batched(pipe, cases, limit):
        for case, pixels in zip(batch, draw(pipe, batch), strict=True):
            seen = look(pixels)
            if case.kind == "nonsense":
                rows[case.kind].append({"clean": seen.clean})
            else:
                right = {"all": is_right(seen, case.asked)}
                rows[case.kind].append(right | compare(seen, case.asked))
    rows[EVERY_ONE] = [row for kind in SHARES if kind != "two objects" for row in rows[kind]]
    table = {}
    for kind, reports in rows.items():
        rates = {key: sum(r[key] for r in reports) / len(reports) for key in reports[0]}
        table[kind] = {"prompts": len(reports)} | {k: round(v, 4) for k, v in rates.items()}
    return table


def sample_pictures(count: int, side: int, seed: int = 2026) -> Tensor:
    """Held-out pictures [count, 3, side, side] in -1..1."""
    rng = random.Random(f"pictures {seed}")
    scenes = [sample_scene(rng, i % 2 == 1, is_held_out) for i in range(count)]
    return render(torch.tensor([pack(s, place(s, side, side, rng)) for s in scenes]), side, side)


@torch.no_grad()
def round_trip_psnr(pipe: ZImagePipeline, count: int = 64, side: int = 192) -> float:
    """PSNR in dB of held-out pictures encoded and decoded again, over all of their pixels."""
    pictures = sample_pictures(count, side)
    errors = []
    for batch in torch.split(pictures, 8):
        images = batch.to(pipe.vae.device, pipe.vae.dtype)  # [8, 3, H, W]
        latents = pipe.vae.encode(images).latent_dist.mode()  # [8, 16, H/8, W/8]
        decoded = pipe.vae.decode(latents).sample.float().clamp(-1, 1).cpu()  # [8, 3, H, W]
        errors.append(((decoded - batch) / 2).square().mean())
    return float(-10 * torch.log10(torch.stack(errors).mean()))


def seconds_per_image(pipe: ZImagePipeline, repeats: int = 5) -> float:
    """Median wall time of one 192 by 192 picture, after one to warm up."""
    case = Case(
        "", "a large red circle in the center on a white background", Scene(()), 192, 192, 0
    )
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        draw(pipe, [case])
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def evaluate(pipe: ZImagePipeline, count: int = 500) -> dict[str, Any]:
    """Every figure of this file: rates per kind of prompt, PSNR in dB, seconds per image."""
    start = time.perf_counter()
    cases = held_out_cases(count) + bare_cases() + nonsense_cases(max(5, count // 10))
    figures = {
        "prompts": score(pipe, cases),
        "vae_psnr_db": round(round_trip_psnr(pipe), 2),
        "seconds_per_image_192": round(seconds_per_image(pipe), 3),
        "device": "cpu" if pipe.device.type == "cpu" else torch.cuda.get_device_name(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return figures | {"seconds": round(time.perf_counter() - start, 1)}


def add_evaluation(results: Path, figures: dict[str, Any]) -> None:
    """Put the figures into a RESULTS.json, under their device and dtype."""
    facts = json.loads(results.read_text())
    name = f"{figures['device']} {figures['dtype']}"
    facts.setdefault("evaluation", {})[name] = figures
    results.write_text(json.dumps(facts, indent=1) + "\n")


def as_table(figures: dict[str, Any]) -> str:
    """The rates as a Markdown table, targets beside them."""
    columns = ("colour", "shape", "place", "background", "size", "clean")
    lines = [
        "| prompts | count | all right | target | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for kind, rates in figures["prompts"].items():
        target = f"{TARGETS[kind]:.0%}" if kind in TARGETS else ""
        cells = [f"{rates[c]:.1%}" if c in rates else "" for c in ("all", *columns)]
        cells.insert(1, target)
        lines.append(f"| {kind} | {rates['prompts']} | " + " | ".join(cells) + " |")
    psnr, seconds = figures["vae_psnr_db"], figures["seconds_per_image_192"]
    lines += [
        "",
        f"VAE round trip {psnr} dB (target {TARGET_PSNR:.0f}); one 192 by 192 image in {seconds} s"
        f" ({figures['device']}, {figures['dtype']}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", default="none", choices=("none", "fp8"))
    parser.add_argument("--count", type=int, default=500, help="held-out prompts")
    parser.add_argument("--results", type=Path, help="a RESULTS.json to add the figures to")
    args = parser.parse_args()
    pipe = load(args.checkpoint, getattr(torch, args.dtype), args.device)
    if args.quantization == "fp8":  # on a CPU, too: the same roundings, in software
        quantize(pipe.transformer.requires_grad_(False), torch.device(args.device))
    figures = evaluate(pipe, args.count)
    print(as_table(figures))
    if args.results:
        add_evaluation(args.results, figures)


if __name__ == "__main__":
    main()
