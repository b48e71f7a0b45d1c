"""diffusers' own pipeline, eager, on the same files: what the engine is measured against."""

import contextlib
import functools
import itertools
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.setting import PROMPT, STEPS, Bench, device, distance, dtype, floor, forget, seconds

WARM_UPS = 3  # images before the library's loop is timed


class Library:
    """diffusers' own pipeline on the same files: its eager loop."""

    def __init__(self, bench: Bench) -> None:
        pipe = ZImagePipeline.from_pretrained(bench.model, dtype=dtype(), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self._bench = pipe.to(device()), bench

    def render(self, seed: int) -> Any:
        """Render one image as diffusers' documentation does."""
        return self.pipe(
            PROMPT,
            height=self._bench.height,
            width=self._bench.width,
            num_inference_steps=STEPS,
            guidance_scale=0.0,
            generator=torch.Generator(device()).manual_seed(seed),
        ).images[0]

    @torch.no_grad()  # or the texts would hold the whole encoder, to differentiate it
    def inputs(self) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """The inputs of one evaluation in the middle of an image: latents, level, texts."""
        text, _ = self.pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        generator = torch.Generator(device()).manual_seed(0)
        shape = 16, 1, self._bench.height // 8, self._bench.width // 8
        latents = torch.randn(shape, generator=generator, device=device()).to(dtype())
        return [latents], torch.tensor([0.5], device=device()), text

    @torch.no_grad()
    def velocity(self, backend: SDPBackend | None = None) -> torch.Tensor:
        """Evaluate the transformer once on `inputs`, with the attention of `backend`."""
        inputs = self.inputs()
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            out: torch.Tensor = self.pipe.transformer(*inputs, return_dict=False)[0][0]
        return out.float()

    def attentions(self) -> dict[str, float]:
        """The distances between the velocities of each two attention backends that there are here."""
        velocities = {}
        for name in ("MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
            with contextlib.suppress(RuntimeError):  # no such kernel here
                velocities[name] = self.velocity(getattr(SDPBackend, name))
        pairs = itertools.combinations(velocities, 2)
        return {f"{a} {b}": distance(velocities[a], velocities[b]) for a, b in pairs}

    @torch.no_grad()
    def exact_velocity(self) -> torch.Tensor:
        """Evaluate once in float32; the transformer stays float32 afterwards."""
        latents, level, texts = self.inputs()
        self.pipe.transformer.float()
        wide = [x.float() for x in latents], level, [text.float() for text in texts]
        out: torch.Tensor = self.pipe.transformer(*wide, return_dict=False)[0][0]
        return out.cpu()

    def p50_s(self) -> float:
        """Time the loop after its warm-up: seconds an image."""
        for seed in range(WARM_UPS):
            self.render(seed)
        times = seconds(lambda: self.render(1), max(3, min(self._bench.images, 12)))
        return statistics.median(times)


@dataclass(frozen=True)
class Beside:
    """The library's figures and pictures, and the floor; tensors but the inputs are on the CPU."""

    facts: dict[str, float]
    inputs: tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]
    velocity: torch.Tensor  # of the inputs
    exact: torch.Tensor  # the same in float32
    attentions: dict[str, float]  # distances between its velocities with two backends
    image: torch.Tensor  # of seed 0: [H, W, 3], 0 to 255


@functools.cache
def beside(bench: Bench) -> Beside:
    """Measure the library, once a run and alone on the device."""
    facts, library = floor(bench), Library(bench)
    facts = {**facts, "library_p50_s": library.p50_s(), **library_text_vae(library.pipe, bench)}
    attentions = library.attentions()
    image = torch.from_numpy(np.array(library.render(0))).float()
    inputs, velocity = library.inputs(), library.velocity().cpu()
    exact = library.exact_velocity()  # the last: its transformer is float32 afterwards
    measured = Beside(facts, inputs, velocity, exact, attentions, image)
    del library
    forget()
    return measured


@torch.no_grad()
def library_text_vae(pipe: Any, bench: Bench) -> dict[str, float]:
    """Time the library's encoder and decoder, eager."""
    latents = torch.randn(1, 16, bench.height // 8, bench.width // 8, device=device()).to(dtype())

    def encode() -> None:
        pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)

    return {
        "library_encode_p50_ms": statistics.median(seconds(encode, 12)[2:]) * 1e3,
        "library_decode_p50_ms": statistics.median(
            seconds(lambda: pipe.vae.decode(latents), 10)[2:]
        )
        * 1e3,
    }
