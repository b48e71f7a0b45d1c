"""The parts of a run that measure the engine itself, image by image."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.gpu.engine import drift, megahertz, on_device, quantiles, render, tenths, velocity, warm
from bench.gpu.library import Beside, beside
from bench.gpu.setting import PROMPT, Bench, device, distance, floor, forget, matrix_rates
from promptdrop import metrics
from promptdrop.config import Config, Prompt
from promptdrop.engines.memory import GIB
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.nouns import Rendering

LENGTHS = 16  # text lengths that are met after warm-up


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
"""  # run in a process of its own: what it compiled must come from the disk the next time


def bf16(bench: Bench) -> dict[str, Any]:
    """Measure `compile: on`: pace, drift, memory, and distance from the library."""
    return one_at_a_time(bench, compile="on")


def fp8(bench: Bench) -> dict[str, Any]:
    """Measure the same with `quantization: fp8`."""
    return one_at_a_time(bench, compile="on", quantization="fp8")


def one_at_a_time(bench: Bench, **settings: str) -> dict[str, Any]:
    """Render images back to back, each alone."""
    library = beside(bench)
    begin = time.perf_counter()
    engine = warm(bench.config("one_at_a_time", **settings))
    warm_s = time.perf_counter() - begin
    fidelity = against_library(engine, library, bench)
    clocks: list[int] = []
    renderings = render(
        engine,
        [bench.spec(seed) for seed in range(bench.images)],
        on_image=lambda: clocks.append(megahertz()),
    )
    alone, many = matrix_rates()  # again: the card is hot now
    figures = {
        **library.facts,
        "until_warm_s": warm_s,
        **pace(renderings, library.facts),
        **steadiness(renderings, clocks),
        "matrix_tflop_per_s_after": alone / 1e12,
        "matrix_back_to_back_tflop_per_s_after": many / 1e12,
        **fidelity,
    }
    del engine
    forget()
    return figures


def pace(renderings: list[Rendering], facts: dict[str, float]) -> dict[str, Any]:
    """Figures of how long an image takes, compared with the library and the floor."""
    times = [one.latency_ms.render for one in renderings]
    p50 = statistics.median(times) / 1e3
    return {
        **quantiles(times),
        "evaluation_p50_ms": statistics.median(ms for one in renderings for ms in one.steps_ms),
        "denoise_p50_ms": statistics.median(one.latency_ms.denoise for one in renderings),
        "decode_p50_ms": statistics.median(one.latency_ms.decode for one in renderings),
        "transfer_p50_ms": statistics.median(one.latency_ms.transfer for one in renderings),
        "times_library": facts["library_p50_s"] / p50,
        "of_floor": p50 / facts["floor_s"],
    }


def steadiness(renderings: list[Rendering], clocks: list[int]) -> dict[str, Any]:
    """Figures of whether later images take longer or more memory; clocks: MHz in the middle of each."""
    times = [one.latency_ms.render for one in renderings]
    cycles = [ms * clock for ms, clock in zip(times, clocks, strict=True)]
    p50 = statistics.median(times)
    return {
        "p95_of_p50": metrics.percentiles(times)[1] / p50,  # type: ignore[operator]  # there are some
        "drift": drift(times),
        "drift_in_clock_cycles": drift(cycles) if all(clocks) else None,
        "clock_mhz_first_and_last_tenth": tenths(clocks),
        "memory_after_10_mib": renderings[min(9, len(times) - 1)].memory_allocated_mib,
        "memory_at_end_mib": renderings[-1].memory_allocated_mib,
        "memory_peak_mib": renderings[-1].memory_peak_mib,
    }


def against_library(engine: ZImageEngine, library: Beside, bench: Bench) -> dict[str, Any]:
    """Figures of how far the engine is from the library, and whether zeros stay finite."""
    latents, level, texts = library.inputs
    mine = velocity(engine, latents, level, texts)
    zeros = velocity(engine, [latents[0] * 0], level, [texts[0] * 0])
    pixels = torch.zeros(bench.height, bench.width, 3, dtype=torch.uint8)
    buffer = memoryview(pixels.numpy()).cast("B")
    engine.render([bench.spec(0)], Prompt(), lambda step, steps: None, [buffer])
    difference = pixels.float() - library.image
    return {
        "distance_of_an_evaluation": distance(mine, library.velocity),
        "distance_of_two_eager_attentions": library.attentions,
        "distance_from_float32": distance(mine, library.exact),
        "library_distance_from_float32": distance(library.velocity, library.exact),
        "distance_of_an_image": float(difference.abs().mean()),  # of 255
        "psnr_of_an_image_db": float(10 * torch.log10(255**2 / difference.square().mean())),
        "zeros_are_finite": bool(zeros.isfinite().all()),
    }


def compiles(bench: Bench) -> dict[str, Any]:
    """Time the first warm-up, without a cache, and show that nothing compiles after it."""
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
    """Time a start with the cache that the part before has left, and with a broken one."""
    settings = bench.config("restarts", compile="on")
    cached = ready(settings)
    for file in settings.cache.rglob("*"):
        if file.is_file():
            file.unlink()  # this process may have it in its memory
            file.write_bytes(b"broken")
    return {**floor(bench), "cached": cached, "broken": ready(settings)}


def ready(settings: Config) -> dict[str, Any]:
    """Time an engine in a process of its own: until its weights are read, and until it is warm."""
    command = [sys.executable, "-c", READY, str(settings.file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the engine ended with status {done.returncode}: {done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**said, "cache_discarded": "compile.cache_discarded" in done.stderr}


def text_vae(bench: Bench) -> dict[str, Any]:
    """Time a new prompt, a repeated one, one encoded ahead, and a decode, each beside the library's."""
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


def batch(bench: Bench) -> dict[str, Any]:
    """Measure images a second of 1, 2, 4 ... images together, in the same engine.

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
    """Show what `engine.offload: auto` chooses on smaller GPUs, and what that costs."""
    plans = [(24, "none"), (16, "none"), (12, "none"), (12, "fp8")]
    if device().type != "cuda":
        plans = [(None, "none")]
    return {**floor(bench), "plans": [offloaded(bench, *each) for each in plans]}


def offloaded(bench: Bench, gib: int | None, quantization: str) -> dict[str, Any]:
    """Measure an engine that may use so much of the device; each image has a prompt of its own."""
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
        "taken": engine.model.offload,
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
