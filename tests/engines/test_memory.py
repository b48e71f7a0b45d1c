"""Weights that are streamed through the device: which are chosen, and that pixels stay the same.

Where there is a CUDA device, every rule is tried there too.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from structlog.testing import capture_logs
from torch import nn

from bench.random_model import unfilled
from engines import FOX, configured, rendered_together
from promptdrop import weights
from promptdrop.config import Config
from promptdrop.engines import memory
from promptdrop.engines.forward import FastForward
from promptdrop.engines.memory import GIB, MIB, Footprint
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError, EngineStartError, ImageCancelled, ImageTimeout
from promptdrop.nouns import ImageSpec

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def settings(device: str = "cpu", **engine: Any) -> Config:
    """A configuration with one small size, not compiled."""
    return configured(device, engine={"warmup": ["64x96"], "compile": "off", **engine})


@pytest.fixture(scope="module")
def true_size() -> dict[str, Footprint]:
    """The footprint of each of Z-Image-Turbo's components, in bfloat16."""
    components = unfilled().items()
    return {name: memory.footprint(each.to(torch.bfloat16)) for name, each in components}


def test_what_z_image_turbo_takes(true_size: dict[str, Footprint]) -> None:
    """A streamed component keeps two blocks on the device, and the little that is in no block."""
    mib = {name: (each.whole // MIB, each.streamed // MIB) for name, each in true_size.items()}

    assert mib["transformer"] == (11739, 714)
    assert mib["text_encoder"] == (7672, 385)  # without its table of 742
    assert mib["vae"] == (159, 159)


@pytest.mark.parametrize(
    ("gib", "transformer", "size", "batch", "chosen"),
    [
        (80, 1.0, "1024x1024", 1, "none"),
        (24, 1.0, "1024x1024", 1, "none"),
        (24, 1.0, "1024x1024", 4, "text_encoder"),
        (24, 1.0, "2048x2048", 1, "text_encoder"),
        (16, 1.0, "1024x1024", 1, "text_encoder"),
        (16, 1.0, "1024x1024", 4, "model"),
        (12, 1.0, "1024x1024", 1, "model"),
        (24, 0.5, "1024x1024", 1, "none"),
        (16, 0.5, "1024x1024", 1, "text_encoder"),
        (16, 0.5, "512x512", 1, "none"),
        (12, 0.5, "1024x1024", 1, "text_encoder"),
        (8, 0.5, "1024x1024", 1, "model"),
        (2, 1.0, "1024x1024", 1, "model"),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    true_size: dict[str, Footprint],
    gib: int,
    transformer: float,
    size: str,
    batch: int,
    chosen: str,
) -> None:
    """Z-Image-Turbo, its transformer in bf16 (1.0) or fp8 (0.5), gets the fastest mode for the free memory."""
    whole, streamed = true_size["transformer"].whole, true_size["transformer"].streamed
    shrunk = Footprint(int(whole * transformer), int(streamed * transformer))
    working = memory.working_bytes(settings(warmup=["64x64", size], batch=batch))
    need = memory.needs({**true_size, "transformer": shrunk}, working)

    assert memory.plan(gib * GIB, need) == chosen
    assert [*need] == ["none", "text_encoder", "model"]


def pipeline(device: str) -> Any:
    """The library's own pipeline, still on the CPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = ZImagePipeline.from_pretrained(weights.DEMO, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("offload", ["text_encoder", "model"])
def test_the_librarys_pixels_do_not_change(device: str, offload: str) -> None:
    """The library's pipeline draws the same with streamed weights: several images, with guidance."""
    whole, placed = pipeline(device).to(device), pipeline(device)
    memory.place(placed, offload, torch.device(device))

    for prompt in ("a blue circle", "two green squares, and a long text behind them " * 3):
        expected, actual = (
            pipe(
                prompt,
                negative_prompt="grey",
                height=96,
                width=64,
                num_inference_steps=3,
                guidance_scale=2.0,
                num_images_per_prompt=2,
                generator=torch.Generator(device).manual_seed(3),
                output_type="pt",
            ).images
            for pipe in (whole, placed)
        )
        assert torch.equal(expected, actual)


def rendered(engine: ZImageEngine, specs: list[ImageSpec]) -> list[bytes]:
    """The pixels of a batch's images."""
    results = rendered_together(engine, specs)
    return [one[1].tobytes() for one in results if not isinstance(one, EngineError)]


BATCHES = [
    [FOX],
    [FOX, FOX._replace(prompt="a blue star " * 12, seed=8), FOX._replace(seed=9)],
    [FOX._replace(guidance_scale=2.0, negative_prompt="grey", seed=seed) for seed in (1, 2)],
    [FOX],
]


def test_an_engine_that_offloads_renders_the_same(device: str) -> None:
    """It renders the same alone, in batches and with guidance; an abandoned image changes nothing."""
    engine = ZImageEngine(settings(device, batch=3, offload="none"), lambda stage: None)
    expected = [rendered(engine, specs) for specs in BATCHES]

    def stop(*_: Any) -> None:
        raise ImageCancelled

    for offload in ("text_encoder", "model"):
        engine.model.offload_to(offload)
        assert [rendered(engine, specs) for specs in BATCHES] == expected
        hook = engine.model.pipe.transformer.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(ImageCancelled):
            rendered(engine, [FOX])
        hook.remove()
        assert [rendered(engine, specs) for specs in BATCHES] == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_blocks_may_run_in_any_order(device: str, count: int) -> None:
    """Each block runs with its own weights, whatever was being copied; buffers and transposed ones, too."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).eval() for _ in range(count)]
    for block in blocks:
        block[0].weight.data = block[0].weight.data.t()
        block[1].running_mean += torch.randn(5)
        block.requires_grad_(False).to(device)
    x = torch.randn(2, 5, device=device)
    orders = [[*range(count)], [*range(count)], [*reversed(range(count))], [0, 0, count - 1]]
    expected = [torch.stack([blocks[n](x) for n in order]) for order in orders]
    memory.Streamed(blocks, torch.device(device)).leave()
    actual = [torch.stack([blocks[n](x) for n in order]) for order in orders]

    assert all(map(torch.equal, actual, expected))
    assert blocks[0][0].weight.stride() == (1, 5)


class Slow(nn.Linear):
    """A module that raises ImageTimeout the first time that it is asked for its weights."""

    is_over = True

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Raises ImageTimeout: the first time."""
        if self.is_over:
            self.is_over = False
            raise ImageTimeout
        return super().parameters(recurse)


def test_a_timeout_while_weights_leave_breaks_nothing(device: str) -> None:
    """Weights that were not moved to the host then are moved when they are next used."""
    component = nn.Module()
    component.table = nn.Embedding(7, 5)
    component.blocks = nn.ModuleList([nn.Linear(5, 5), Slow(5, 5), nn.Linear(5, 5)])
    for part in (component.table, *component.blocks):
        for weight in part._parameters.values():
            weight.data = weight.data.to(device)
    ids = torch.tensor([3, 1, 3], device=device)

    def run() -> torch.Tensor:
        x: torch.Tensor = component.table(ids)
        for block in component.blocks:
            x = block(x)
        return x

    with torch.no_grad():
        expected = run()
        with pytest.raises(ImageTimeout):
            memory.stream(component, torch.device(device))
        first, second = run(), run()

    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_what_is_streamed_runs_in_our_forward_too() -> None:
    """FastForward, which calls no block as a whole, gets the weights it needs."""
    pipe = pipeline("cpu")
    transformer = pipe.transformer.requires_grad_(False)
    inputs = [torch.randn(16, 1, 8, 12)] * 2, torch.rand(1), [torch.randn(n, 192) for n in (9, 33)]
    forward = FastForward(transformer, 2)
    expected = forward(*inputs)[0]
    memory.stream(transformer, torch.device("cpu"))

    for mine, theirs in zip(FastForward(transformer, 2)(*inputs)[0], expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("offload", ["auto", "none", "text_encoder", "model"])
def test_on_the_cpu_nothing_is_offloaded(offload: str) -> None:
    """On the CPU nothing is offloaded, which the log says, and no memory is reserved."""
    with capture_logs() as logged:
        engine = ZImageEngine(settings(offload=offload, reserve_memory_mib=1), lambda stage: None)
        engine.empty_cache()

    (line,) = [each for each in logged if each["event"] == "engine.offload"]
    assert (line["offload"], line["wanted"]) == ("none", offload)
    assert not engine.model.pipe.transformer.layers[0]._forward_pre_hooks


@on_cuda
@pytest.mark.parametrize("offload", ["none", "text_encoder", "model"])
def test_what_is_chosen_is_what_the_device_gets(offload: str) -> None:
    """Streamed weights are not on the device; `auto` streams none if all fit."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with capture_logs() as logged:
        engine = ZImageEngine(settings("cuda:0", offload=offload), lambda stage: None)
    placed = torch.cuda.memory_allocated() - before
    rendered(engine, [FOX])
    (line,) = [each for each in logged if each["event"] == "engine.offload"]
    each = {name: memory.footprint(getattr(engine.model.pipe, name)) for name in memory.COMPONENTS}
    need = memory.needs(each, 0)

    assert line["fits"]
    assert placed <= need[offload] + MIB
    assert memory.plan(memory.free_bytes(torch.device("cuda:0")), need) == "none"


@on_cuda
def test_memory_is_held_against_neighbours() -> None:
    """The allocator holds at least that much; asking for more than there is gives a warning."""
    device, mib = torch.device("cuda:0"), 512
    torch.cuda.empty_cache()
    memory.hold(device, torch.cuda.memory_reserved(device) // MIB + mib)
    reserved = torch.cuda.memory_reserved(device)
    memory.hold(device, 1)
    with capture_logs() as logged:
        memory.hold(device, 10_000_000)

    assert reserved >= mib * MIB
    assert torch.cuda.memory_reserved(device) >= reserved
    assert [each["event"] for each in logged] == ["engine.memory_not_reserved"]


@on_cuda
def test_a_device_that_is_too_small_is_a_failed_start() -> None:
    """The error names what is needed and what is free."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(EngineStartError, match=r"none needs \d+ MiB, free are 0 MiB"):
            ZImageEngine(settings("cuda:0", offload="none"), lambda stage: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_cuda
def test_the_allocators_limit_counts() -> None:
    """A limit set on the allocator is all that is free."""
    device = torch.device("cuda:0")
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(0.05, device)
    try:
        assert memory.free_bytes(device) <= 0.05 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
