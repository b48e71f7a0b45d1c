"""Z-Image on torch and diffusers: the same calls, in the same order, as ZImagePipeline's own.

Runs in the engine process, or in a script's own. Shapes: latents are float32 [B, 16, H/8, W/8] of
a batch of B images, pixels uint8 [H, W, 3]. Line numbers of diffusers are those of 0.42.1.
"""

import contextlib
import gc
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; the daemon never uses the network
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from diffusers import ZImagePipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch._dynamo.exc import TorchDynamoException as CompileError
from transformers.utils import logging as transformers_logging

from promptdrop import log, weights
from promptdrop.config import Config, Prompt
from promptdrop.engine import OnStage, OnStep, warm_up_spec
from promptdrop.engines.schedulers import checkpoint_scheduler, scheduler_for
from promptdrop.engines.speed import (
    FastForward,
    accelerate,
    discard_cache,
    meet_text_lengths,
    together,
    use_cache,
)
from promptdrop.errors import EngineError, EngineStartError, ModelError
from promptdrop.job import EngineInfo, ImageSpec, Latency, Rendering

MIB = 1024 * 1024
EMBEDDINGS_BYTES = 64 * MIB  # about a hundred prompts of Z-Image-Turbo's
WARM_UP_PROMPT = "a lighthouse on a rocky coast at sunset, soft light, highly detailed"
Mark = Any  # a torch.cuda.Event, or seconds
Tensors = dict[str, Any]

TILE = 512  # px, the largest side of a tile
BOUNDARY_TOKENS = 4  # how many tokens the template and a cut text may save where they touch


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image whose texts the transformer can take."""

    spec: ImageSpec
    buffer: memoryview
    text: str  # what the encoder was given
    tokens: int
    truncated: bool
    embeds: list[torch.Tensor]  # one [tokens, width]
    negative_embeds: list[torch.Tensor]  # likewise, or none without guidance
    begin: Mark
    end: Mark


@dataclass(frozen=True, slots=True)
class Denoising:
    """What the images of a batch have in common."""

    images: int
    milliseconds: float
    steps_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image on the device."""

    pixels: torch.Tensor  # [H, W, 3]
    sound: torch.Tensor  # [3], see `_unsound`
    begin: Mark
    end: Mark


class OutOfMemory(Exception):
    """Too little device memory for what was tried; less may do."""


class ZImageEngine:
    """A ZImagePipeline on one device; one batch at a time, from one thread."""

    def __init__(self, config: Config, on_stage: OnStage) -> None:
        """Load the model.

        Raises ModelError: files are missing or broken. EngineStartError: the device cannot be used.
        """
        directory = weights.require(config)
        self._config = config
        self._device = find_device(config.model.device)
        self._clock = Clock(self._device)
        dtype = getattr(torch, config.model.dtype) if self._device.type == "cuda" else torch.float32
        on_stage("loading weights")
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        try:
            pipe = ZImagePipeline.from_pretrained(
                directory, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            raise ModelError(f"{directory}: cannot be loaded: {e}") from e
        if not pipe.tokenizer.chat_template:
            raise ModelError(
                f"{directory}/tokenizer: has no chat template; expected chat_template.jinja,"
                " or chat_template in tokenizer_config.json"
            )
        self._scheduler = checkpoint_scheduler(pipe, directory)
        on_stage(f"moving to {self._device}")
        try:
            pipe.to(self._device)
        except RuntimeError as e:  # torch.OutOfMemoryError is one
            raise EngineStartError(f"{self._device}: the model cannot be moved there: {e}") from e
        pipe.set_progress_bar_config(disable=True)
        self._embeddings = Embeddings(pipe)
        self._compiles = config.engine.compile == "on"
        for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
            module.eval().requires_grad_(False)
        self._evaluations: list[Mark] = []  # when each one of the image in hand began
        pipe.transformer.register_forward_pre_hook(
            lambda module, inputs: self._evaluations.append(self._clock.mark())
        )
        self._forward = FastForward(pipe.transformer, config.engine.batch)
        if self._compiles:
            use_cache(config.cache / "compiled", config.model.id, _name(self._device))
            accelerate(pipe, self._forward)
        self._is_warm = False
        self._pipe = pipe
        self.info = EngineInfo(
            model=config.model.id,
            revision=config.model.revision or weights.revision_of(directory),
            dtype=str(dtype).removeprefix("torch."),
            quantization="none",
            compiled=self._compiles,
            device=_name(self._device),
            device_index=_nvml_index(self._device),
        )

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every size of `engine.warmup` with the default settings, alone and in the largest
        batch; on_step at every step.

        When compiling, every text length is met here too, and what comes later compiles nothing:
        other sizes go through the graphs there are, and their decoding is not compiled.

        Raises EngineStartError: such an image cannot be rendered.
        """
        try:
            self._warm_up(on_step)
        except CompileError as e:
            if not discard_cache(f"compiling failed: {e}"):
                raise EngineStartError(f"engine.compile: on: {e}") from e
            try:
                self._warm_up(on_step)
            except CompileError as e:
                raise EngineStartError(f"engine.compile: on: {e}") from e
        self._is_warm = True

    def _warm_up(self, on_step: Callable[[], None]) -> None:
        config, most = self._config, self._config.engine.batch
        for size in config.engine.warmup:
            spec = warm_up_spec(config, size, WARM_UP_PROMPT)
            for images in sorted({1, most}):
                buffers = [memoryview(bytearray(spec.height * spec.width * 3))] * images
                results = self.render(
                    [spec] * images, config.prompt, lambda step, steps: on_step(), buffers
                )
                for result in results:
                    if isinstance(result, EngineError):
                        raise EngineStartError(f"engine.warmup: {size}: {result}") from result
            if self._compiles:
                tokens = config.prompt.max_tokens
                meet_text_lengths(
                    self._pipe.transformer, spec.height, spec.width, tokens, most, on_step
                )

    @torch.no_grad()
    def render(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Render images of one `ImageSpec.kind` together, each into its buffer of H * W * 3 bytes.

        on_step(step, steps) is called once a step's work is done on the device; what it raises ends
        them all.

        Out of device memory, it empties the cache and tries again, then renders the halves of the
        batch one after the other, then decodes in tiles.

        Returns for each image how it was rendered, or why it alone was not. Anything raised that
        on_step did not raise is unknown: the caller should end the process.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        job = specs, prompt, on_step, buffers
        try:
            return self._attempt(*job)
        except OutOfMemory as e:
            _log_out_of_memory(specs, e, "the cache was emptied")
        try:
            return self._attempt(*job)
        except OutOfMemory as e:
            cure = "the batch is halved" if len(specs) > 1 else "the image is decoded in tiles"
            _log_out_of_memory(specs, e, cure)
        if half := len(specs) // 2:
            first = self.render(specs[:half], prompt, on_step, buffers[:half])
            return first + self.render(specs[half:], prompt, on_step, buffers[half:])
        try:
            with tiled(self._pipe.vae):
                return self._attempt(*job)
        except OutOfMemory as e:
            return [EngineError(f"out of device memory at {_size(specs[0])}: {e}")]

    def _attempt(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Raises OutOfMemory: there is too little; the cache was emptied."""
        try:
            with self._no_new_graphs():
                return self._render(specs, prompt, on_step, buffers)
        except torch.OutOfMemoryError as e:
            reason = str(e).partition(". ")[0]
        self.empty_cache()  # here no frame holds the images' tensors any more
        raise OutOfMemory(reason)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt has once templated, uncut."""
        return [count_tokens(self._pipe.tokenizer, text) for text in prompts]

    def empty_cache(self) -> None:
        """Give cached memory back to the device."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _no_new_graphs(self) -> Any:
        """Once warm, what no graph was compiled for runs as it is: no image waits for a compiler."""
        if self._compiles and self._is_warm:  # a context manager, as is what follows
            return torch.compiler.set_stance("eager_on_recompile")
        return contextlib.nullcontext()

    def _render(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        clock = self._clock
        begun = [self._encode(*one, prompt) for one in zip(specs, buffers, strict=True)]
        encoded = [one for one in begun if isinstance(one, Encoded)]
        if not encoded:
            return [one for one in begun if isinstance(one, EngineError)]

        self._evaluations.clear()
        latents = self._denoise(encoded, on_step)  # [B, 16, H/8, W/8]
        denoised = clock.mark()
        steps = [*self._evaluations, denoised]

        decoded = [self._decoded(one) for one in latents.chunk(len(encoded))]
        if clock.lags:
            clock.wait(denoised)
            on_step(specs[0].evaluations, specs[0].evaluations)
        denoising = Denoising(
            len(encoded),
            clock.milliseconds(encoded[-1].end, denoised),
            tuple(map(clock.milliseconds, steps, steps[1:])),
        )
        on_device = iter(decoded)
        return [
            self._finish(one, denoising, next(on_device)) if isinstance(one, Encoded) else one
            for one in begun
        ]

    def _encode(self, spec: ImageSpec, buffer: memoryview, prompt: Prompt) -> Encoded | EngineError:
        """Returns an EngineError where a text is too long and must not be cut."""
        begin, tokenizer, most = self._clock.mark(), self._pipe.tokenizer, prompt.max_tokens
        negative = (spec.negative_prompt or "") if spec.guidance_scale > 0 else None
        fitting, negative_embeds = negative, []
        try:
            text, tokens = fit(tokenizer, spec.prompt, prompt)
            if negative is not None:
                fitting, _ = fit(tokenizer, negative, prompt)
        except EngineError as e:
            return e
        embeds = self._embeddings.of(text, most)
        if fitting is not None:
            negative_embeds = self._embeddings.of(fitting, most)
        truncated = text != spec.prompt or fitting != negative
        end = self._clock.mark()
        return Encoded(spec, buffer, text, tokens, truncated, embeds, negative_embeds, begin, end)

    def _denoise(self, encoded: list[Encoded], on_step: OnStep) -> torch.Tensor:
        """The images' latents, from noise of their own, [B, 16, H/8, W/8]."""
        clock, spec = self._clock, encoded[0].spec

        def at_step_end(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
            # On CUDA this step is only queued. Once its evaluation has begun, the step before it is
            # done; waiting for that, and for no more, leaves the device one step to work on.
            if clock.lags:
                clock.wait(self._evaluations[-1])
            if done := index + (0 if clock.lags else 1):
                on_step(done, spec.evaluations)
            return tensors

        generators = [torch.Generator(self._device).manual_seed(_seed(one.spec)) for one in encoded]
        self._pipe.scheduler = scheduler_for(spec.scheduler, self._scheduler, generators)
        with self._together(len(encoded)):
            latents: torch.Tensor = self._pipe(
                prompt_embeds=[embeds for one in encoded for embeds in one.embeds],
                negative_prompt_embeds=[
                    embeds for one in encoded for embeds in one.negative_embeds
                ],
                height=spec.height,
                width=spec.width,
                num_inference_steps=spec.steps,
                guidance_scale=spec.guidance_scale,
                generator=generators,
                output_type="latent",
                callback_on_step_end=at_step_end,
                callback_on_step_end_tensor_inputs=[],
                return_dict=False,
            )[0]
        return latents

    def _together(self, images: int) -> Any:
        """An image that is not compiled and alone is the library's, bit for bit."""
        if images > 1 and not self._compiles:  # a context manager, as is what follows
            return together(self._pipe.transformer, self._forward)
        return contextlib.nullcontext()

    def _decoded(self, latents: torch.Tensor) -> Decoded:
        """One image's [1, 16, H/8, W/8] to pixels, on the device."""
        begin = self._clock.mark()
        image = self._decode(latents)  # [1, 3, H, W]
        pixels = self._pixels(image)  # [H, W, 3]
        sound = torch.stack([
            torch.isfinite(latents).all(),
            torch.isfinite(image).all(),
            (pixels != pixels[0, 0]).any(),
        ])  # [3]  # fmt: skip
        return Decoded(pixels, sound, begin, self._clock.mark())

    def _finish(
        self, encoded: Encoded, denoising: Denoising, decoded: Decoded
    ) -> Rendering | EngineError:
        """Bring an image's pixels into its buffer. Returns an EngineError: they are not sound."""
        clock, pixels = self._clock, decoded.pixels
        begin = clock.mark()
        count = pixels.numel()
        torch.frombuffer(encoded.buffer, dtype=torch.uint8, count=count).copy_(pixels.view(-1))
        transferred = clock.mark()
        if unsound := _unsound(*decoded.sound.tolist()):
            return unsound
        clock.wait(transferred)
        return Rendering(
            prompt=encoded.text,
            tokens=encoded.tokens,
            truncated=encoded.truncated,
            evaluations=len(denoising.steps_ms),
            latency_ms=Latency(
                encode=clock.milliseconds(encoded.begin, encoded.end),
                denoise=denoising.milliseconds,
                decode=clock.milliseconds(decoded.begin, decoded.end),
                transfer=clock.milliseconds(begin, transferred),
            ),
            steps_ms=denoising.steps_ms,
            batch=denoising.images,
            **_memory(self._device),
        )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """As in ZImagePipeline.__call__, pipeline_z_image.py:592-595."""
        vae = self._pipe.vae
        latents = latents.to(vae.dtype)
        latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
        image: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return image

    def _pixels(self, image: torch.Tensor) -> torch.Tensor:
        """VaeImageProcessor.postprocess(..., "pil") on the device, bit for bit.

        torch and numpy both round halves to even (image_processor.py:143), in float32.
        """
        image = self._pipe.image_processor.postprocess(image, output_type="pt")  # in [0, 1]
        image = image[0].permute(1, 2, 0).float()  # [H, W, 3]
        return (image * 255).round().to(torch.uint8).contiguous()


class Embeddings:
    """What the text encoder makes of prompts; a repeated one costs nothing.

    At most EMBEDDINGS_BYTES on the device, the least lately used go first.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._kept: OrderedDict[tuple[str, int], list[torch.Tensor]] = OrderedDict()
        self._bytes = 0

    def of(self, text: str, max_tokens: int) -> list[torch.Tensor]:
        """One [tokens, width], as ZImagePipeline.encode_prompt returns it."""
        key = text, max_tokens
        if key not in self._kept:
            self._kept[key], _ = self._pipe.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=max_tokens
            )
            self._bytes += self._kept[key][0].nbytes
        self._kept.move_to_end(key)
        while self._bytes > EMBEDDINGS_BYTES and len(self._kept) > 1:
            _, (oldest,) = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
        return list(self._kept[key])


class Clock:
    """Marks on the device's own time line, read only once the work between them is done."""

    def __init__(self, device: torch.device) -> None:
        self.lags = device.type == "cuda"  # work is queued: a mark lies in the device's future

    def mark(self) -> Mark:
        """A point after all work queued so far."""
        if not self.lags:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record()
        return event

    def wait(self, mark: Mark) -> None:
        """Return once the device has come to `mark`."""
        if self.lags:
            mark.synchronize()

    def milliseconds(self, start: Mark, end: Mark) -> float:
        """Device time between two marks, both of them reached."""
        return float(start.elapsed_time(end)) if self.lags else float(end - start) * 1000


def find_device(wanted: str) -> torch.device:
    """`model.device` as a device that is there, made the current one.

    Raises EngineStartError: it is not there.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not present):
        return torch.device("cpu")
    _, _, number = wanted.partition(":")
    index = int(number or 0)
    if index >= present:
        names = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(present))
        raise EngineStartError(
            f"model.device: {wanted}: no such device;"
            f" torch {torch.__version__} finds {names or 'no CUDA device'}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def templated(tokenizer: Any, text: str) -> str:
    """A prompt as the text encoder sees it (pipeline_z_image.py:218-226)."""
    messages = [{"role": "user", "content": text}]
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    )


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of the templated text."""
    return len(tokenizer(templated(tokenizer, text)).input_ids)


def fit(tokenizer: Any, text: str, prompt: Prompt) -> tuple[str, int]:
    """As much of the user's text as fits once templated, and how many tokens that is, templated.

    A text that fits is returned as it is. Cuts lie between characters of the text and never touch
    the template: the library's own truncation would drop the template's end.

    Raises EngineError: it does not fit and `prompt.overflow` is refuse.
    """
    tokens = count_tokens(tokenizer, text)
    if tokens <= prompt.max_tokens:
        return text, tokens
    expected = f"expected at most {prompt.max_tokens} (prompt.max_tokens)"
    if prompt.overflow == "refuse":
        raise EngineError(f"prompt: {tokens} tokens with the template; {expected}")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans: list[tuple[int, int]] = encoding.offset_mapping  # characters of each token
    template_tokens = tokens - len(spans)
    most = min(len(spans), prompt.max_tokens - template_tokens + BOUNDARY_TOKENS)
    for kept in range(most, 0, -1):
        keep_head = prompt.overflow == "keep_head"
        part = text[: spans[kept - 1][1]] if keep_head else text[spans[-kept][0] :]
        if (tokens := count_tokens(tokenizer, part)) <= prompt.max_tokens:
            return part, tokens
    raise EngineError(f"prompt: the template alone has {template_tokens} tokens; {expected}")


@contextlib.contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Decode in overlapping tiles: a fraction of the memory, and not quite the same pixels."""
    whole = vae.tile_sample_min_size, vae.tile_latent_min_size
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, TILE)
    vae.tile_latent_min_size = vae.tile_sample_min_size // scale
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = whole


def _log_out_of_memory(specs: Sequence[ImageSpec], reason: OutOfMemory, cure: str) -> None:
    log.get().warning(
        "engine.out_of_memory",
        size=_size(specs[0]),
        images=len(specs),
        cure=cure,
        reason=str(reason),
    )


def _size(spec: ImageSpec) -> str:
    return f"{spec.width}x{spec.height}"


def _seed(spec: ImageSpec) -> int:
    if spec.seed is None:
        raise ValueError(f"image {spec.image}: seed is None; the caller has to draw one")
    return spec.seed


def _unsound(
    latents_finite: bool, decoded_finite: bool, several_colours: bool
) -> EngineError | None:
    """Why it would be published as a black or blank image."""
    if not latents_finite:
        return EngineError("the latents are not finite (NaN or infinity) after denoising")
    if not decoded_finite:
        return EngineError("the decoded image is not finite (NaN or infinity)")
    if not several_colours:
        return EngineError("every pixel of the image has the same colour")
    return None


def _memory(device: torch.device) -> dict[str, Any]:
    """The memory fields of a Rendering; the peak is since the image began."""
    if device.type != "cuda":
        return {}
    return {
        "memory_allocated_mib": round(torch.cuda.memory_allocated(device) / MIB, 1),
        "memory_reserved_mib": round(torch.cuda.memory_reserved(device) / MIB, 1),
        "memory_peak_mib": round(torch.cuda.max_memory_allocated(device) / MIB, 1),
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _nvml_index(device: torch.device) -> int | None:
    """NVML counts all GPUs, torch those of CUDA_VISIBLE_DEVICES: the UUID is the same in both."""
    if device.type != "cuda":
        return None
    import pynvml  # needs a driver's library, so only here

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
    except pynvml.NVMLError:
        return None  # a MIG slice, or no NVML here
