"""What the engine is worth on this device, in named parts, against the library and the hardware.

    python -m bench.gpu bf16 fp8 text_vae compiles restarts flow batch offload --model DIR \\
        --results bench/gpu.jsonl

Beside each part, in the same run, stands the floor: what the FLOPs of one evaluation would take at the
rate of a large matrix product in the model's dtype; beside the first three the library's own eager
loop, too. Each part appends one line to the results, with hardware, versions and date. DIR: a
checkpoint, or what `python -m bench.random_model DIR` wrote. Without --model it is the demonstration
model, with which every part runs on a CPU too, to check itself:

    python -m bench.gpu batch --size 64x64 --images 4
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promptdrop import __version__, config, config_file, metrics, weights
from promptdrop.config import Config, Prompt
from promptdrop.engines.engine import batches
from promptdrop.engines.memory import GIB, MIB
from promptdrop.engines.zimage import ZImageEngine, find_device
from promptdrop.errors import EngineError
from promptdrop.nouns import ImageSpec, Rendering

PROMPT = "a lighthouse on a rocky coast at sunset, soft light, highly detailed, painted in oil"
STEPS = 9
TOKENS = 128  # what PROMPT is padded to, or nearly
LENGTHS = 16  # text lengths that are met after warm-up
WARM_UPS = 3  # of the library's loop, not counted
READY = """
import json, sys, time
from promptdrop import config_file, log
from promptdrop.engines import engine
from promptdrop.engines import zimage
settings = config_file.load(__import__("pathlib").Path(sys.argv[1]))
log.set_up("info", "json")
begin = time.monotonic()
loaded = engine.load(settings, lambda stage: None)
read = time.monotonic()
loaded.warm_up(lambda: None)
print(json.dumps({"load_s": read - begin, "warm_up_s": time.monotonic() - read}))
"""  # in a process of its own: what it compiled must come from the disk the next time


@dataclass(frozen=True)
class Bench:
    """What all parts are given. They share a spool, and with it compiled code."""

    model: Path
    width: int
    height: int
    images: int
    batch: int
    home: Path  # for spools and compiled code; empty at first

    def config(self, name: str, **engine: Any) -> Config:
        """A configuration, on the disk too: `home/NAME/config.yaml`."""
        size = f"{self.width}x{self.height}"
        values = {
            "root": str(self.home / "spool"),
            "model": {"path": str(self.model)},
            "engine": {"warmup": [size], "image_timeout_seconds": 600, **engine},
            "defaults": {"width": self.width, "height": self.height, "steps": STEPS},
            "limits": {"min_free_disk_mib": 0},
        }
        file = self.home / name / "config.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(values))
        return config_file.load(file)

    def spec(self, seed: int, prompt: str = PROMPT) -> ImageSpec:
        """An image as the defaults have it."""
        size = self.width, self.height
        return ImageSpec(1, prompt, None, *size, STEPS, 0.0, seed, "euler", "png", 600.0)


# --- what everything is measured against --------------------------------------------------------


def device() -> torch.device:
    """The one that the engine takes."""
    return find_device("auto")


def dtype() -> torch.dtype:
    """The one that the engine computes in."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def seconds(work: Callable[[], Any], times: int) -> list[float]:
    """How long each call takes, the device's work included."""
    taken = []
    for _ in range(times):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - begin)
    return taken


def synchronize() -> None:
    """Wait until the device has done what was asked of it."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def matrix_rates() -> tuple[float, float]:
    """FLOP/s of a large matrix product in the model's dtype: the median of 20, and of 500 without a
    pause, in which a GPU comes to the limit of its power."""
    side, many = (8192, 500) if device().type == "cuda" else (1024, 50)
    one, two = torch.randn(2, side, side, device=device(), dtype=dtype()).unbind()
    seconds(lambda: one @ two, 5)
    alone = statistics.median(seconds(lambda: one @ two, 20))

    def back_to_back() -> None:
        for _ in range(many):
            torch.mm(one, two, out=result)

    result = torch.empty_like(one)
    (together,) = seconds(back_to_back, 1)
    return 2 * side**3 / alone, 2 * side**3 * many / together


class Library:
    """diffusers' own pipeline on the same files: its eager loop."""

    def __init__(self, bench: Bench) -> None:
        pipe = ZImagePipeline.from_pretrained(bench.model, dtype=dtype(), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self._bench = pipe.to(device()), bench

    def render(self, seed: int) -> Any:
        """One image, as its documentation has it."""
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
        """Of one evaluation in the middle of an image."""
        text, _ = self.pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        generator = torch.Generator(device()).manual_seed(0)
        shape = 16, 1, self._bench.height // 8, self._bench.width // 8
        latents = torch.randn(shape, generator=generator, device=device()).to(dtype())
        return [latents], torch.tensor([0.5], device=device()), text

    @torch.no_grad()
    def velocity(self, backend: SDPBackend | None = None) -> torch.Tensor:
        """What the transformer makes of `inputs`, with the attention of `backend`."""
        inputs = self.inputs()
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            out: torch.Tensor = self.pipe.transformer(*inputs, return_dict=False)[0][0]
        return out.float()

    def attentions(self) -> dict[str, float]:
        """How far its velocities are apart with each two attention backends that there are here."""
        velocities = {}
        for name in ("MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
            with contextlib.suppress(RuntimeError):  # no such kernel here
                velocities[name] = self.velocity(getattr(SDPBackend, name))
        pairs = itertools.combinations(velocities, 2)
        return {f"{a} {b}": distance(velocities[a], velocities[b]) for a, b in pairs}

    @torch.no_grad()
    def exact_velocity(self) -> torch.Tensor:
        """The same in float32; the transformer stays so."""
        latents, level, texts = self.inputs()
        self.pipe.transformer.float()
        wide = [x.float() for x in latents], level, [text.float() for text in texts]
        out: torch.Tensor = self.pipe.transformer(*wide, return_dict=False)[0][0]
        return out.cpu()

    def p50_s(self) -> float:
        """Of the loop, after its warm-up: seconds an image."""
        for seed in range(WARM_UPS):
            self.render(seed)
        times = seconds(lambda: self.render(1), max(3, min(self._bench.images, 12)))
        return statistics.median(times)


def evaluation_flop(bench: Bench) -> int:
    """Of one evaluation, counted in the library's transformer without computing anything."""
    settings = ZImageTransformer2DModel.load_config(bench.model / "transformer")
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(settings)
        latents = torch.empty(16, 1, bench.height // 8, bench.width // 8)
        text = torch.empty(TOKENS, transformer.config["cap_feat_dim"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer([latents], torch.empty(1), [text])
    return counter.get_total_flops()


@functools.cache
def floor(bench: Bench) -> dict[str, float]:
    """What an image's evaluations would take at the rate of a large matrix product."""
    (alone, many), flop = matrix_rates(), evaluation_flop(bench)
    return {
        "evaluation_tflop": flop / 1e12,
        "matrix_tflop_per_s": alone / 1e12,
        "matrix_back_to_back_tflop_per_s": many / 1e12,
        "floor_s": STEPS * flop / alone,
    }


@dataclass(frozen=True)
class Beside:
    """What the library does, and the floor; the rest is on the CPU."""

    facts: dict[str, float]
    inputs: tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]
    velocity: torch.Tensor  # of the inputs
    exact: torch.Tensor  # the same in float32
    attentions: dict[str, float]  # distances between its velocities with two backends
    image: torch.Tensor  # of seed 0: [H, W, 3], 0 to 255


@functools.cache
def beside(bench: Bench) -> Beside:
    """Measured once a run, alone on the device."""
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


def forget() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, root mean square."""
    return float((one - other).norm() / other.norm())


# --- our engine ---------------------------------------------------------------------------------


def warm(settings: Config) -> ZImageEngine:
    """Loaded and warm, in this process."""
    engine = ZImageEngine(settings, lambda stage: None)
    engine.warm_up(lambda: None)
    return engine


def render(
    engine: ZImageEngine,
    specs: list[ImageSpec],
    most: int = 1,
    ahead: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> list[Rendering]:
    """`most` together, back to back; `ahead`: the next ones' texts are encoded as the daemon does it.

    `on_image` is called in the middle of each.
    """
    renderings: list[Rendering] = []
    waiting = [*batches(specs, most)]
    for batch, following in zip(waiting, [*waiting[1:], []], strict=True):
        coming = iter(following if ahead else [])

        def on_step(step: int, steps: int, coming: Iterator[ImageSpec] = coming) -> None:
            if step == steps // 2:
                on_image()
            if step < steps and (spec := next(coming, None)):
                engine.prepare(spec, Prompt())

        buffers = [memoryview(bytearray(spec.height * spec.width * 3)) for spec in batch]
        for result in engine.render(batch, Prompt(), on_step, buffers):
            if isinstance(result, EngineError):
                raise result
            renderings.append(result)
    return renderings


def quantiles(milliseconds: list[float]) -> dict[str, float | None]:
    """True quantiles of an image's render."""
    p50, p95, p99 = metrics.percentiles(milliseconds)
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def bf16(bench: Bench) -> dict[str, Any]:
    """`compile: on`: one image at a time, its drift, its memory, its distance from the library."""
    return one_at_a_time(bench, compile="on")


def fp8(bench: Bench) -> dict[str, Any]:
    """The same with `quantization: fp8`, and whether zeros stay finite."""
    return one_at_a_time(bench, compile="on", quantization="fp8")


def one_at_a_time(bench: Bench, **settings: str) -> dict[str, Any]:
    """Images back to back, each alone."""
    library = beside(bench)
    begin = time.perf_counter()
    engine = warm(bench.config("one_at_a_time", **settings))
    warm_s = time.perf_counter() - begin
    latents, level, texts = library.inputs
    mine = velocity(engine, latents, level, texts)
    zeros = velocity(engine, [latents[0] * 0], level, [texts[0] * 0])
    pixels = torch.zeros(bench.height, bench.width, 3, dtype=torch.uint8)
    buffer = memoryview(pixels.numpy()).cast("B")
    engine.render([bench.spec(0)], Prompt(), lambda step, steps: None, [buffer])
    clocks: list[int] = []
    renderings = render(
        engine,
        [bench.spec(seed) for seed in range(bench.images)],
        on_image=lambda: clocks.append(megahertz()),
    )
    alone, many = matrix_rates()  # again: the card is hot now
    times = [one.latency_ms.render for one in renderings]
    cycles = [ms * clock for ms, clock in zip(times, clocks, strict=True)]
    p50 = statistics.median(times) / 1e3
    difference = pixels.float() - library.image
    figures = {
        **library.facts,
        "until_warm_s": warm_s,
        **quantiles(times),
        "evaluation_p50_ms": statistics.median(ms for one in renderings for ms in one.steps_ms),
        "denoise_p50_ms": statistics.median(one.latency_ms.denoise for one in renderings),
        "decode_p50_ms": statistics.median(one.latency_ms.decode for one in renderings),
        "transfer_p50_ms": statistics.median(one.latency_ms.transfer for one in renderings),
        "matrix_tflop_per_s_after": alone / 1e12,
        "matrix_back_to_back_tflop_per_s_after": many / 1e12,
        "times_library": library.facts["library_p50_s"] / p50,
        "of_floor": p50 / library.facts["floor_s"],
        "p95_of_p50": metrics.percentiles(times)[1] / (p50 * 1e3),  # type: ignore[operator]  # there are some
        "drift": drift(times),
        "drift_in_clock_cycles": drift(cycles) if all(clocks) else None,
        "clock_mhz_first_and_last_tenth": tenths(clocks),
        "memory_after_10_mib": renderings[min(9, len(times) - 1)].memory_allocated_mib,
        "memory_at_end_mib": renderings[-1].memory_allocated_mib,
        "memory_peak_mib": renderings[-1].memory_peak_mib,
        "distance_of_an_evaluation": distance(mine, library.velocity),
        "distance_of_two_eager_attentions": library.attentions,
        "distance_from_float32": distance(mine, library.exact),
        "library_distance_from_float32": distance(library.velocity, library.exact),
        "distance_of_an_image": float(difference.abs().mean()),  # of 255
        "psnr_of_an_image_db": float(10 * torch.log10(255**2 / difference.square().mean())),
        "zeros_are_finite": bool(zeros.isfinite().all()),
    }
    del engine
    forget()
    return figures


def drift(values: list[float]) -> float:
    """The last tenth's median over the first's."""
    first, last = tenths(values)
    return last / first


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the first tenth and of the last."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:])


def megahertz() -> int:
    """What the device's multiprocessors run at now; 0 on the CPU."""
    return torch.cuda.clock_rate() if device().type == "cuda" else 0


@torch.no_grad()
def velocity(
    engine: ZImageEngine,
    latents: list[torch.Tensor],
    level: torch.Tensor,
    texts: list[torch.Tensor],
) -> torch.Tensor:
    """One evaluation of the engine's transformer."""
    out: torch.Tensor = engine._pipe.transformer(latents, level, texts, return_dict=False)[0][0]
    return out.float().cpu()


def compiles(bench: Bench) -> dict[str, Any]:
    """How long the first warm-up takes, with no cache; and that nothing compiles after it."""
    facts, settings = floor(bench), bench.config("compiles", compile="on")
    shutil.rmtree(settings.cache, ignore_errors=True)
    begin = time.perf_counter()
    engine = ZImageEngine(settings, lambda stage: None)
    loaded = time.perf_counter()
    engine.warm_up(lambda: None)
    warm_up_s = time.perf_counter() - loaded
    graphs = counters["stats"]["unique_graphs"]
    most = settings.prompt.max_tokens
    alone = [on_device(one) for one in render(engine, [bench.spec(0)] * 5)]
    others = []
    for length in range(1, LENGTHS + 1):
        prompt = "x " * max(1, length * most // LENGTHS // 2 - 20)
        others += render(engine, [bench.spec(0, prompt)])
    unwarmed = bench.spec(0)._replace(width=bench.width + 32, height=bench.height + 64)
    return {
        **facts,
        "load_s": loaded - begin,
        "cold_warm_up_s": warm_up_s,
        "graphs": graphs,
        "graphs_after": counters["stats"]["unique_graphs"],
        "text_tokens": [one.tokens for one in others],
        "slowest_of_their_median": max(map(on_device, others))
        / statistics.median(map(on_device, others)),
        "longest_text_of_median_of_one": on_device(others[-1]) / statistics.median(alone),
        "unwarmed_size": f"{unwarmed.width}x{unwarmed.height}",
        "unwarmed_ms": [one.latency_ms.render for one in render(engine, [unwarmed] * 2)],
    }


def restarts(bench: Bench) -> dict[str, Any]:
    """How long until READY, with the cache that the part before has left, and with a broken one."""
    settings = bench.config("restarts", compile="on")
    cached = ready(settings)
    for file in settings.cache.rglob("*"):
        if file.is_file():
            file.unlink()  # this process may have it in its memory
            file.write_bytes(b"broken")
    return {**floor(bench), "cached": cached, "broken": ready(settings)}


def on_device(one: Rendering) -> float:
    """Milliseconds that depend on compiled code."""
    return one.latency_ms.denoise + one.latency_ms.decode


def ready(settings: Config) -> dict[str, Any]:
    """Seconds until an engine in a process of its own has read the weights, and is warm."""
    command = [sys.executable, "-c", READY, str(settings.file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the engine ended with status {done.returncode}: {done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**said, "cache_discarded": "compile.cache_discarded" in done.stderr}


def text_vae(bench: Bench) -> dict[str, Any]:
    """A new prompt, a repeated one, one encoded ahead, and a decode, each beside the library's."""
    facts, prompts = (
        beside(bench).facts,
        [f"{PROMPT}, {n}" for n in range(max(5, bench.images // 5))],
    )
    engine = warm(bench.config("text_vae", compile="on"))
    render(engine, [bench.spec(0, "another prompt")])
    new = render(engine, [bench.spec(0, prompt) for prompt in prompts])
    again = render(engine, [bench.spec(0, prompt) for prompt in prompts])
    others = [bench.spec(0, f"{prompt}, at night") for prompt in prompts]
    ahead = render(engine, others, ahead=True)[1:-1]  # prepared, and preparing another
    p50 = {
        name: statistics.median(one.latency_ms.render for one in renderings)
        for name, renderings in (("repeated", again), ("ahead", ahead))
    }
    return {
        **facts,
        "encode_new_p50_ms": statistics.median(one.latency_ms.encode for one in new),
        "encode_repeated_p50_ms": statistics.median(one.latency_ms.encode for one in again),
        "encode_ahead_p50_ms": statistics.median(one.latency_ms.encode for one in ahead),
        "ahead_costs_ms": p50["ahead"] - p50["repeated"],  # of an image's whole render
        "decode_p50_ms": statistics.median(one.latency_ms.decode for one in again),
    }


@torch.no_grad()
def library_text_vae(pipe: Any, bench: Bench) -> dict[str, float]:
    """Its own encoder and decoder, eager."""
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


def flow(bench: Bench) -> dict[str, Any]:
    """Images a second through spool and outbox, of twice as many as are asked for, against the engine
    back to back before and after."""
    facts = floor(bench)
    settings = bench.config("flow", compile="on", batch=bench.batch)
    engine = warm(settings)  # stays while the daemon has one of its own, and does nothing
    before = back_to_back(engine, bench)
    through = through_the_spool(bench, settings)
    after = back_to_back(engine, bench)
    return {
        **facts,
        **through,
        "batch": bench.batch,
        "back_to_back_images_per_second": [before, after],
        "of_back_to_back": through["images_per_second"] / ((before + after) / 2),
    }


def back_to_back(engine: ZImageEngine, bench: Bench) -> float:
    """Images a second of the engine alone, pixels in memory: of a fifth of the images."""
    images = max(bench.batch, bench.images // 5 // bench.batch * bench.batch)
    begin = time.perf_counter()
    render(engine, [bench.spec(seed) for seed in range(images)], bench.batch)
    return images / (time.perf_counter() - begin)


def through_the_spool(bench: Bench, settings: Config) -> dict[str, Any]:
    """One job, dropped into the inbox of a warm daemon; from its first image's start to its last's publication."""
    assert settings.file is not None
    command, spool = [sys.executable, "-m", "promptdrop"], settings.spool
    subprocess.run([*command, "init", str(bench.home)], check=True, stdout=subprocess.DEVNULL)
    run = [*command, "run", "--config", str(settings.file)]
    with (bench.home / "log").open("w") as log, subprocess.Popen(run, stderr=log) as process:
        try:
            begin = time.monotonic()
            status = spool / ".promptdrop/status.json"
            wait(process, lambda: status.exists() and b'"state": "ready"' in status.read_bytes())
            ready_s = time.monotonic() - begin
            job = {"prompt": PROMPT, "count": 2 * bench.images, "seed": 0}
            hidden = spool / "inbox/.job"
            hidden.write_text(json.dumps(job))
            hidden.rename(spool / "inbox/job.json")
            summary = settings.outbox / "job/job.json"
            wait(process, summary.exists)
        finally:
            process.terminate()
    sidecars = [json.loads(p.read_bytes()) for p in summary.parent.glob("job-*.json")]
    instants = [datetime.fromisoformat(s["time"]["published"]).timestamp() for s in sidecars]
    began = min(datetime.fromisoformat(s["time"]["started"]).timestamp() for s in sidecars)
    last = max(sidecars, key=lambda sidecar: sidecar["time"]["published"])
    return {
        "ready_s": ready_s,  # from the start of the daemon, imports and weights included
        "images_through_the_spool": len(sidecars),
        "images_per_second": len(sidecars) / (max(instants) - began),
        "utilization_percent": last["window"]["utilization_percent"],
        "save_p50_ms": statistics.median(s["latency_ms"]["save"] for s in sidecars),
        "batches": sorted({s["batch"] for s in sidecars}),
    }


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Until it is so. Raises RuntimeError: the daemon has ended."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the daemon ended with status {process.returncode}")
        time.sleep(0.05)


def batch(bench: Bench) -> dict[str, Any]:
    """Images a second of 1, 2, 4 ... images together, in the same engine.

    In turns: a GPU that grows hot slows down, and the last would pay for the first.
    """
    facts = floor(bench)
    engine = warm(bench.config("batch", compile="on", batch=bench.batch))
    sizes = sorted({1, *(2**n for n in range(1, 7) if 2**n < bench.batch), bench.batch})
    taken: dict[int, list[float]] = {size: [] for size in sizes}  # seconds of as many images
    renderings: dict[int, list[Rendering]] = {size: [] for size in sizes}
    specs = [bench.spec(seed) for seed in range(bench.batch)]
    for turn in range(1 + max(2, bench.images // bench.batch)):
        for size in sizes:
            begin = time.perf_counter()
            rendered = render(engine, specs, size)
            if turn:  # the first is a warm-up
                taken[size].append(time.perf_counter() - begin)
                renderings[size] += rendered
    rates = {size: len(renderings[size]) / sum(taken[size]) for size in sizes}
    return {
        **facts,
        "images_per_second": rates,
        "gain": rates[bench.batch] / rates[1],
        "evaluation_p50_ms_an_image": {
            size: statistics.median(ms for one in renderings[size] for ms in one.steps_ms) / size
            for size in sizes
        },
        "decode_p50_ms": {
            size: statistics.median(one.latency_ms.decode for one in renderings[size])
            for size in sizes
        },
        "memory_peak_mib": renderings[bench.batch][-1].memory_peak_mib,
    }


def offload(bench: Bench) -> dict[str, Any]:
    """What `engine.offload: auto` takes of a smaller GPU, and what that costs."""
    plans = [(24, "none"), (16, "none"), (12, "none"), (12, "fp8")]
    if device().type != "cuda":
        plans = [(None, "none")]
    return {**floor(bench), "plans": [offloaded(bench, *each) for each in plans]}


def offloaded(bench: Bench, gib: int | None, quantization: str) -> dict[str, Any]:
    """An engine that may have so much of the device: each image has a prompt of its own."""
    total = torch.cuda.get_device_properties(0).total_memory if gib else 0
    if gib:
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
    begin = time.perf_counter()
    settings = bench.config("offload", compile="on", quantization=quantization)
    try:
        engine = warm(settings)
        ready_s = time.perf_counter() - begin
        specs = [bench.spec(n, f"{PROMPT}, {n}") for n in range(max(2, bench.images // 25))]
        renderings = render(engine, specs)
    finally:
        if gib:
            torch.cuda.set_per_process_memory_fraction(1.0)
    found = {
        "limit_gib": gib,
        "quantization": quantization,
        "taken": engine._offload,
        "ready_s": ready_s,
        **quantiles([one.latency_ms.render for one in renderings]),
        "encode_new_p50_ms": statistics.median(one.latency_ms.encode for one in renderings),
        "evaluation_p50_ms": statistics.median(ms for one in renderings for ms in one.steps_ms),
        "memory_allocated_mib": renderings[-1].memory_allocated_mib,
        "memory_peak_mib": renderings[-1].memory_peak_mib,
        "memory_reserved_mib": renderings[-1].memory_reserved_mib,
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    del engine
    forget()
    return found


PARTS = {
    part.__name__: part for part in (bf16, fp8, text_vae, compiles, restarts, flow, batch, offload)
}


def surroundings(bench: Bench) -> dict[str, Any]:
    """Where and when it was measured, and with what."""
    on_gpu = device().type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "device": name,
            "memory_mib": memory and memory // MIB,
            "cpus": os.cpu_count(),
        },
        "versions": {
            "promptdrop": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "model": bench.model.name,
        "dtype": str(dtype()).removeprefix("torch."),
        "size": f"{bench.width}x{bench.height}",
        "steps": STEPS,
        "images": bench.images,
    }


def main() -> None:
    """Run the named parts, print each and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", type=Path, default=weights.DEMO)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="of flow and batch: images together")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to append to")
    arguments = parser.parse_args()
    width, height = config.width_height(arguments.size)
    failed = False
    with tempfile.TemporaryDirectory(prefix="promptdrop-bench-") as home:
        model = arguments.model.absolute()
        bench = Bench(model, width, height, arguments.images, arguments.batch, Path(home))
        for name in arguments.parts:
            begin = time.monotonic()
            try:
                figures = PARTS[name](bench)
            except Exception:  # the other parts have figures of their own
                traceback.print_exc()
                failed = True
            else:
                took = round(time.monotonic() - begin, 1)
                report(name, bench, took, figures, arguments.results)
            torch.compiler.reset()
            forget()
    sys.exit(failed)


def report(
    name: str, bench: Bench, took: float, figures: dict[str, Any], file: Path | None
) -> None:
    """Print a part's line, and append it to the results."""
    line = json.dumps({"part": name, **surroundings(bench), "took_s": took, "figures": figures})
    print(line, flush=True)
    if file:
        with file.open("a") as results:
            results.write(f"{line}\n")


if __name__ == "__main__":
    main()
