"""The Z-Image engine against diffusers' own pipeline, on a small real checkpoint.

Where there is a CUDA device, every rule is tried there too, in bfloat16.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import ZImagePipeline
from structlog.testing import capture_logs

from promptdrop import config as configuration
from promptdrop import weights
from promptdrop.config import Config, Prompt
from promptdrop.engines import engine, script
from promptdrop.engines.text import Embeddings, templated
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import (
    ConfigError,
    EngineError,
    EngineStartError,
    ImageCancelled,
    ImageTimeout,
    ModelError,
    UsageError,
)
from promptdrop.nouns import ImageSpec, Rendering

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]

DEVICES = ["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"]
FOX = ImageSpec(1, "a red fox in the snow", None, 64, 96, 2, 0.0, 7, "euler", "png", 60.0)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model on disk."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("model") / "demo"
    weights.copy_demo(directory)
    return directory


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the engine and the library run."""
    return str(request.param)


def configured(checkpoint: Path, **model: str) -> Config:
    sizes = {"warmup": ["64x64", "128x64"], "compile": "off"}
    return configuration.parse({"model": {"path": str(checkpoint), **model}, "engine": sizes})


@pytest.fixture(scope="module")
def zimage(checkpoint: Path, device: str) -> ZImageEngine:
    """The engine under test."""
    return ZImageEngine(configured(checkpoint, device=device), lambda stage: None)


@pytest.fixture
def fresh(checkpoint: Path, device: str) -> ZImageEngine:
    """An engine for one test, which may offload it."""
    return ZImageEngine(configured(checkpoint, device=device), lambda stage: None)


@pytest.fixture(scope="module")
def library(checkpoint: Path, device: str) -> Any:
    """diffusers' own pipeline on the same files and device."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = ZImagePipeline.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def rendered(
    zimage: ZImageEngine, spec: ImageSpec, prompt: Prompt | None = None
) -> tuple[Rendering, Pixels]:
    """One image of the engine under test."""
    buffer = bytearray(spec.height * spec.width * 3)
    rendering = engine.render_one(
        zimage, spec, prompt or Prompt(), lambda step, steps: None, memoryview(buffer)
    )
    return rendering, np.frombuffer(buffer, np.uint8).reshape(spec.height, spec.width, 3)


def by_library(library: Any, spec: ImageSpec) -> Pixels:
    """The call of the contract's section 7."""
    assert spec.seed is not None
    image = library(
        spec.prompt,
        negative_prompt=spec.negative_prompt,
        height=spec.height,
        width=spec.width,
        num_inference_steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        generator=torch.Generator(library.device).manual_seed(spec.seed),
    ).images[0]
    return np.asarray(image)


@contextmanager
def poisoned(module: torch.nn.Module, value: float) -> Iterator[None]:
    """Fill a layer's weights for a while."""
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    try:
        yield
    finally:
        module.load_state_dict(kept)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"width": 256, "height": 256, "steps": 9},
        {"width": 320, "height": 192, "steps": 4, "seed": 2**63 - 1},
        {"steps": 1, "prompt": "一只猫坐在窗台上 🐈"},
        {"steps": 3, "guidance_scale": 3.5, "negative_prompt": "blurry, low quality"},
        {"steps": 3, "guidance_scale": 3.5, "width": 128},
        {"guidance_scale": 1.0, "negative_prompt": ""},
        {"negative_prompt": "not used without guidance"},
    ],
)
def test_the_pixels_are_the_librarys(
    zimage: ZImageEngine, library: Any, change: dict[str, Any]
) -> None:
    """Section 7: identical, pixel for pixel, to ZImagePipeline's own call."""
    spec = FOX._replace(**change)
    rendering, pixels = rendered(zimage, spec)

    assert np.array_equal(by_library(library, spec), pixels)
    assert spec.steps == rendering.evaluations == len(rendering.steps_ms)
    assert (rendering.prompt, rendering.truncated) == (spec.prompt, False)


@pytest.mark.parametrize("interruption", [ImageCancelled, ImageTimeout])
def test_an_abandoned_image_leaves_no_trace(
    zimage: ZImageEngine, library: Any, interruption: type[BaseException]
) -> None:
    """What on_step raises ends the image; the next one is what it would have been."""

    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise interruption

    spec = FOX._replace(steps=4)
    with pytest.raises(interruption):
        zimage.render(
            [spec._replace(width=128)], Prompt(), stop, [memoryview(bytearray(128 * 96 * 3))]
        )

    rendering, pixels = rendered(zimage, spec)
    assert np.array_equal(by_library(library, spec), pixels)
    assert rendering.evaluations == 4


def test_every_step_is_reported(zimage: ZImageEngine) -> None:
    """Once each, in order, warm-up included."""
    steps: list[tuple[int, int]] = []
    buffer = memoryview(bytearray(64 * 96 * 3))
    zimage.render([FOX._replace(steps=3)], Prompt(), lambda *step: steps.append(step), [buffer])
    signs: list[None] = []
    zimage.warm_up(lambda: signs.append(None))

    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(signs) == 2 * 9


def test_the_latency_adds_up(zimage: ZImageEngine) -> None:
    """render is encode + denoise + decode + transfer; the steps lie within denoise."""
    rendering, _ = rendered(zimage, FOX._replace(steps=5))
    latency = rendering.latency_ms

    assert min(latency.encode, latency.denoise, latency.decode, latency.transfer) > 0
    assert 0.5 * latency.denoise < sum(rendering.steps_ms) <= latency.denoise
    assert (rendering.memory_peak_mib is None) == (zimage.info.device == "cpu")


def test_info(zimage: ZImageEngine, device: str) -> None:
    """On the CPU the dtype falls back to float32, and there is no GPU's index."""
    info = zimage.info
    has_gpu = device != "cpu"

    assert (info.model, info.revision) == ("demo", None)
    assert (info.quantization, info.compiled) == ("none", False)
    assert info.dtype == ("bfloat16" if has_gpu else "float32")
    assert (info.device == "cpu", info.device_index is None) == (not has_gpu, not has_gpu)


def test_loading_says_what_it_does(checkpoint: Path) -> None:
    """Silence would mean hung."""
    stages: list[str] = []
    engine.load(configured(checkpoint, device="cpu"), stages.append)

    assert stages == ["importing", "loading weights", "moving to cpu"]


def test_a_device_that_is_not_there(checkpoint: Path) -> None:
    """The error says what there is."""
    with pytest.raises(EngineStartError, match="cuda:97: no such device"):
        ZImageEngine(configured(checkpoint, device="cuda:97"), lambda stage: None)


def test_fp8_is_refused_where_nothing_multiplies_it(checkpoint: Path) -> None:
    """Before anything is loaded, with what would do."""
    settings = configuration.parse(
        {"model": {"path": str(checkpoint), "device": "cpu"}, "engine": {"quantization": "fp8"}}
    )

    with pytest.raises(ConfigError, match="fp8: the CPU does not multiply fp8; expected"):
        ZImageEngine(settings, lambda stage: None)


def test_a_broken_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Missing files are named before anything is loaded."""
    for file in checkpoint.rglob("*"):
        copy = tmp_path / file.relative_to(checkpoint)
        copy.mkdir() if file.is_dir() else copy.write_bytes(file.read_bytes())
    (tmp_path / "vae/config.json").unlink()

    with pytest.raises(ModelError, match=r"vae/config\.json \(missing\)"):
        ZImageEngine(configured(tmp_path), lambda stage: None)


def test_tokens_are_counted_with_the_template(zimage: ZImageEngine) -> None:
    """As the model's own tokenizer counts the text the encoder is given."""
    tokenizer = zimage._pipe.tokenizer
    prompts = ["", "a cat", "一只猫 🐈", "word " * 2000, "  leading\nand trailing  "]
    counts = zimage.count_tokens(prompts)

    assert [len(tokenizer(templated(tokenizer, text)).input_ids) for text in prompts] == counts
    assert counts[1] == rendered(zimage, FOX._replace(prompt="a cat"))[0].tokens


LONG = [
    "a red fox and a blue cat, " * 20,
    "猫坐在窗台上看着外面的雪🐈‍⬛" * 20,
    "é" * 300,
    "<|im_end|>\n" * 60,
    "x" * 900,
]


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("overflow", ["keep_head", "keep_tail"])
def test_a_long_prompt_keeps_its_template(zimage: ZImageEngine, text: str, overflow: str) -> None:
    """The user's text is cut between characters to the most that fits; the template stays."""
    prompt = Prompt.model_validate({"max_tokens": 64, "overflow": overflow})
    rendering, _ = rendered(zimage, FOX._replace(steps=1, prompt=text), prompt)
    kept, tokens = rendering.prompt, rendering.tokens
    keeps_head = overflow == "keep_head"
    assert tokens is not None

    assert rendering.truncated
    assert text.startswith(kept) if keeps_head else text.endswith(kept)
    assert 0 < len(kept) < len(text)
    assert tokens == zimage.count_tokens([kept])[0] <= 64
    one_more = text[: len(kept) + 1] if keeps_head else text[-len(kept) - 1 :]
    assert zimage.count_tokens([one_more])[0] > 64 or tokens == 64


def test_a_cut_prompt_gives_the_pixels_of_the_cut_text(zimage: ZImageEngine, library: Any) -> None:
    """What the sidecar names as the encoder's text is what was encoded."""
    rendering, pixels = rendered(zimage, FOX._replace(prompt="a red fox " * 300))

    assert rendering.truncated
    assert np.array_equal(by_library(library, FOX._replace(prompt=rendering.prompt)), pixels)


def test_refuse(zimage: ZImageEngine) -> None:
    """With overflow: refuse nothing is cut."""
    prompt = Prompt(max_tokens=64, overflow="refuse")
    with pytest.raises(EngineError, match=r"expected at most 64 \(prompt.max_tokens\)"):
        rendered(zimage, FOX._replace(prompt=LONG[0]), prompt)


def test_not_a_number_is_an_error(zimage: ZImageEngine, library: Any) -> None:
    """The library would publish a black image."""
    pipe, nan = zimage._pipe, float("nan")
    with poisoned(pipe.transformer.layers[0], nan), pytest.raises(EngineError, match="latents"):
        rendered(zimage, FOX)
    with poisoned(pipe.vae.decoder.conv_out, nan), pytest.raises(EngineError, match="decoded"):
        rendered(zimage, FOX)

    assert np.array_equal(by_library(library, FOX), rendered(zimage, FOX)[1])


def test_one_colour_is_an_error(zimage: ZImageEngine) -> None:
    """An image of one colour is a failure, whatever the colour."""
    layer = zimage._pipe.vae.decoder.conv_out
    with poisoned(layer, 0.0), pytest.raises(EngineError, match="same colour"):
        rendered(zimage, FOX)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
    ],
    ids=lambda error: str(error).replace(" ", "-"),
)
def test_an_error_of_the_device_ends_the_engine_process(
    zimage: ZImageEngine, error: RuntimeError
) -> None:
    """After one of these every later call fails too, so that nobody may take it for an EngineError."""
    with failing(zimage._pipe.transformer.layers[0], error), pytest.raises(type(error)) as escaped:
        rendered(zimage, FOX)

    assert escaped.value is error


def test_out_of_device_memory_costs_an_image_and_not_the_engine(
    fresh: ZImageEngine, library: Any
) -> None:
    """The next image is what it would have been, alone and in a batch, from an engine that offloads."""
    with (
        capture_logs() as logged,
        failing(fresh._pipe.transformer.layers[0], OUT_OF_MEMORY),
        pytest.raises(EngineError, match="out of device memory at 64x96: CUDA out of memory"),
    ):
        rendered(fresh, FOX)

    assert cures(logged) == [(1, cure) for cure in (EMPTIED, TILED, ENCODER, MODEL)]
    assert np.array_equal(by_library(library, FOX), rendered(fresh, FOX)[1])


@pytest.mark.parametrize("enough", ["text_encoder", "model"])
def test_out_of_memory_until_it_offloads(fresh: ZImageEngine, library: Any, enough: str) -> None:
    """No more is offloaded than has to be; the images to come find it so."""
    layer = fresh._pipe.vae.decoder.conv_in
    with (
        capture_logs() as logged,
        limited(layer, OUT_OF_MEMORY, lambda _: fresh._offload == enough),
    ):
        pixels = [rendered(fresh, FOX)[1], rendered(fresh, FOX)[1]]

    tried = [EMPTIED, TILED, ENCODER, MODEL]
    assert cures(logged) == [(1, cure) for cure in tried[: 3 if enough == "text_encoder" else 4]]
    assert all(np.array_equal(by_library(library, FOX), each) for each in pixels)


@contextmanager
def failing(layer: torch.nn.Module, error: Exception) -> Iterator[None]:
    """A layer that raises for a while."""
    with limited(layer, error, lambda *_: False):
        yield


@contextmanager
def limited(
    layer: torch.nn.Module, error: Exception, fits: Callable[[Any], bool]
) -> Iterator[None]:
    """A layer that raises at inputs that do not fit."""

    def fail(_: Any, inputs: Any) -> None:
        if not fits(inputs[0]):
            raise error

    hook = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def cures(logged: Iterable[Any]) -> list[tuple[int, str]]:
    """What was tried against an error of memory: (images, cure)."""
    return [(e["images"], e["cure"]) for e in logged if e["event"] == "engine.out_of_memory"]


EMPTIED, HALVED, TILED = "the cache was emptied", "the batch is halved", "the image is decoded in tiles"  # fmt: skip
ENCODER, MODEL = (
    f"offloaded as with engine.offload: {offload}, until a restart"
    for offload in ("text_encoder", "model")
)


def test_out_of_memory_for_a_moment(zimage: ZImageEngine, library: Any) -> None:
    """It is tried again, and the image is what it would have been."""
    evaluations = iter(range(100))
    layer = zimage._pipe.transformer.layers[0]
    with capture_logs() as logged, limited(layer, OUT_OF_MEMORY, lambda _: next(evaluations) != 1):
        pixels = rendered(zimage, FOX)[1]

    assert np.array_equal(by_library(library, FOX), pixels)
    assert cures(logged) == [(1, EMPTIED)]


def test_out_of_memory_for_a_batch(zimage: ZImageEngine, library: Any) -> None:
    """It is halved until it fits, and every image is finished."""
    specs = [FOX._replace(seed=seed) for seed in range(3)]
    buffers = [bytearray(64 * 96 * 3) for _ in specs]
    with (
        capture_logs() as logged,
        limited(zimage._pipe.transformer, OUT_OF_MEMORY, lambda latents: len(latents) < 2),
    ):
        results = zimage.render(
            specs, Prompt(), lambda step, steps: None, [memoryview(one) for one in buffers]
        )

    assert [result.batch for result in results if isinstance(result, Rendering)] == [1, 1, 1]
    for spec, buffer in zip(specs, buffers, strict=True):
        assert by_library(library, spec).tobytes() == buffer
    assert cures(logged) == [(3, EMPTIED), (3, HALVED), (2, EMPTIED), (2, HALVED)]


def test_out_of_memory_for_the_decoder(zimage: ZImageEngine, library: Any) -> None:
    """It decodes in tiles, nearly the same picture; the next image is decoded whole again."""
    spec = FOX._replace(width=320, height=288)
    decoder = zimage._pipe.vae.decoder
    with (
        capture_logs() as logged,
        limited(decoder, OUT_OF_MEMORY, lambda latents: max(latents.shape[2:]) <= 32),
    ):
        pixels = rendered(zimage, spec)[1]
    whole = by_library(library, spec)

    assert cures(logged) == [(1, EMPTIED), (1, TILED)]
    assert np.abs(pixels.astype(int) - whole).mean() < 2
    assert np.array_equal(whole, rendered(zimage, spec)[1])


@contextmanager
def encodings(pipe: Any) -> Iterator[list[int]]:
    """The number of tokens, padding included, each time that the text encoder runs."""
    tokens: list[int] = []
    hook = pipe.text_encoder.layers[0].register_forward_pre_hook(
        lambda layer, inputs: tokens.append(inputs[0].shape[1])
    )
    try:
        yield tokens
    finally:
        hook.remove()


def test_the_next_text_is_encoded_between_two_steps(zimage: ZImageEngine, library: Any) -> None:
    """Neither image's pixels change, and the next one encodes nothing itself."""
    coming = FOX._replace(prompt="an owl", guidance_scale=2.0, negative_prompt="a hen", seed=8)
    buffer = bytearray(FOX.height * FOX.width * 3)

    def prepare(step: int, steps: int) -> None:
        if step == 1:
            zimage.prepare(coming, Prompt())

    with encodings(zimage._pipe) as before:
        engine.render_one(zimage, FOX, Prompt(), prepare, memoryview(buffer))
    with encodings(zimage._pipe) as after:
        pixels = rendered(zimage, coming)[1]

    assert before[-2:] == [512, 512]  # the library's own padding
    assert after == []
    assert by_library(library, FOX).tobytes() == buffer
    assert np.array_equal(by_library(library, coming), pixels)


def test_what_is_wrong_with_the_next_image_is_its_own(zimage: ZImageEngine, library: Any) -> None:
    """Too long, or too little memory for now: preparing it raises nothing, its own render tells."""
    refuse = Prompt(max_tokens=64, overflow="refuse")
    long, owl = FOX._replace(prompt="word " * 100), FOX._replace(prompt="a white owl")
    zimage.prepare(long, refuse)
    with failing(zimage._pipe.text_encoder.layers[0], OUT_OF_MEMORY):
        zimage.prepare(owl, Prompt())

    assert np.array_equal(by_library(library, owl), rendered(zimage, owl)[1])
    with pytest.raises(EngineError, match="at most 64"):
        rendered(zimage, long, refuse)


def test_an_error_of_the_device_in_the_next_text_ends_the_engine_process(
    zimage: ZImageEngine,
) -> None:
    """It is nobody's EngineError: every later call fails too."""
    layer, error = zimage._pipe.text_encoder.layers[0], RuntimeError("CUDA error: device-side")
    with failing(layer, error), pytest.raises(RuntimeError) as escaped:
        zimage.prepare(FOX._replace(prompt="a grey owl"), Prompt())

    assert escaped.value is error


@pytest.mark.parametrize("text", ["", "a", "一只猫坐在窗台上 🐈", "a blue star " * 40, "x " * 252])
def test_a_text_without_padding_is_encoded_as_with_it(library: Any, text: str) -> None:
    """What a compiled engine computes is the library's up to rounding: attention is causal, so that no
    token sees the padding behind it. Values reach 4, where float32 has steps of 4.8e-7; the sums of a
    masked and of an unmasked attention differ by some of these, 1.2e-6 where this was measured."""
    with torch.no_grad():
        (expected,), _ = library.encode_prompt(text, do_classifier_free_guidance=False)
        with encodings(library) as tokens:
            actual = Embeddings(library, padded=False).of(text, Prompt()).embeds
    tolerance = 1e-5 if library.device.type == "cpu" else 0.1  # bfloat16 has steps of 0.03 at 4

    assert tokens == [len(expected)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_a_repeated_prompt_is_neither_cut_nor_encoded_again(library: Any) -> None:
    """Unless it would be cut elsewhere."""
    embeddings, text = Embeddings(library, padded=False), "a blue star " * 40
    with torch.no_grad(), encodings(library) as tokens:
        first = embeddings.of(text, Prompt(max_tokens=64))
        again = embeddings.of(text, Prompt(max_tokens=64))
        tail = embeddings.of(text, Prompt(max_tokens=64, overflow="keep_tail"))

    assert first is again
    assert first.truncated
    assert first.text != tail.text
    assert tokens == [first.tokens, tail.tokens]


def test_warm_up_failing_is_a_failed_start(zimage: ZImageEngine) -> None:
    """An engine that cannot render is not ready."""
    layer = zimage._pipe.vae.decoder.conv_out
    with poisoned(layer, 0.0), pytest.raises(EngineStartError, match="64x64"):
        zimage.warm_up(lambda: None)


def test_the_demonstration_model_never_overwrites(checkpoint: Path, tmp_path: Path) -> None:
    """An empty folder is filled, the same bytes every time; anything else is left alone."""
    again = tmp_path / "again"
    again.mkdir()
    weights.copy_demo(again)

    files = [file.relative_to(again) for file in again.rglob("*") if file.is_file()]
    assert all((again / file).read_bytes() == (checkpoint / file).read_bytes() for file in files)
    assert [child.name for child in tmp_path.iterdir()] == ["again"]
    with pytest.raises(UsageError, match="not an empty folder"):
        weights.copy_demo(again)


def test_scripts_use_the_same_engine(checkpoint: Path, library: Any, device: str) -> None:
    """One image is returned as such, several as a list; drawn seeds are told."""
    spec = FOX._replace(steps=2)
    loaded = script.Engine(configured(checkpoint, device=device))
    size = {"width": spec.width, "height": spec.height, "steps": spec.steps}
    one = loaded.generate(spec.prompt, seed=spec.seed, **size)
    several = loaded.generate(spec.prompt, count=2, **size)

    assert isinstance(one, script.Generated)
    assert np.array_equal(by_library(library, spec), np.asarray(one.image))
    assert isinstance(several, list)
    again = by_library(library, spec._replace(seed=several[1].seed))
    assert np.array_equal(again, np.asarray(several[1].image))
    assert several[0].seed != several[1].seed
