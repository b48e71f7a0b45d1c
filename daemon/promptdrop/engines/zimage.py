"""Z-Image on torch and diffusers: the same calls, in the same order, as ZImagePipeline's own.

Runs in the engine process, or in a script's own. Shapes: latents are float32 [B, 16, H/8, W/8] of
a batch of B images, pixels uint8 [H, W, 3]. Line numbers of diffusers are those of 0.42.1.
"""

import contextlib
import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; the daemon never uses the network
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from diffusers import ZImagePipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch._dynamo.exc import TorchDynamoException
from transformers.utils import logging as transformers_logging

from promptdrop import log, weights
from promptdrop.config import Config, Prompt
from promptdrop.engines import kernels, memory, quantization
from promptdrop.engines.engine import OnStage, OnStep, require_quantization, warm_up_spec
from promptdrop.engines.memory import MIB
from promptdrop.engines.schedulers import checkpoint_scheduler, scheduler_for
from promptdrop.engines.speed import (
    FastForward,
    accelerate,
    discard_cache,
    join_weights,
    meet_text_lengths,
    remember_device_and_dtype,
    together,
    use_cache,
)
from promptdrop.engines.text import Embedding, Embeddings, EncoderGraphs, count_tokens
from promptdrop.errors import ConfigError, EngineError, EngineStartError, ModelError
from promptdrop.nouns import EngineInfo, ImageSpec, Latency, Rendering

WARM_UP_PROMPT = "a lighthouse on a rocky coast at sunset, soft light, highly detailed"
CompileErrors = TorchDynamoException, subprocess.CalledProcessError  # the latter: the C compiler
CAPABILITY = 7, 0  # the least that Triton compiles for
Mark = Any  # a torch.cuda.Event, or seconds
Tensors = dict[str, Any]

TILE = 512  # px, the largest side of a tile


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image whose texts the transformer can take."""

    spec: ImageSpec
    buffer: memoryview
    prompt: Embedding
    negative: Embedding | None  # without guidance
    begin: Mark
    end: Mark

    @property
    def is_truncated(self) -> bool:
        """Whether a text was cut to fit."""
        return any(text.truncated for text in (self.prompt, self.negative) if text)


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

        Raises ModelError: files are missing or broken. ConfigError: the device cannot do what is
        asked of it. EngineStartError: it cannot be used.
        """
        directory = weights.require(config)
        self._config = config
        self._device = find_device(config.model.device)
        self._clock = Clock(self._device)
        self._compiles = compiles(config, self._device)
        require_quantization(config, _name(self._device), _capability(self._device))
        self._caches = self._compiles or (self._device.type == "cuda" and kernels.IS_FUSED)
        if self._caches:
            use_cache(config.cache / "compiled", config.model.id, _name(self._device))
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
        why = ""
        try:
            if config.engine.quantization == "fp8":
                on_stage("quantizing to fp8")
                quantization.quantize(pipe.transformer, self._device)
            on_stage(f"moving to {self._device}")
            self._offload, why = memory.choose(config, pipe, self._device)
            memory.place(pipe, self._offload, self._device)
            if self._compiles and self._device.type == "cuda" and self._offload != "model":
                join_weights(pipe.transformer)
        except (RuntimeError, OSError) as e:  # torch.OutOfMemoryError is a RuntimeError
            raise EngineStartError(
                f"{self._device}: the model cannot be moved there: {e}{why}"
            ) from e
        pipe.set_progress_bar_config(disable=True)
        remember_device_and_dtype(pipe, self._device)
        self._embeddings = Embeddings(pipe, padded=not self._compiles)
        if self._compiles and self._device.type == "cuda" and self._offload == "none":
            self._embeddings.graphs = EncoderGraphs(pipe.text_encoder)
        for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
            module.eval().requires_grad_(False)
        self._evaluations: list[Mark] = []  # when each one of the image in hand began
        pipe.transformer.register_forward_pre_hook(
            lambda module, inputs: self._evaluations.append(self._clock.mark())
        )
        self._forward = FastForward(pipe.transformer, config.engine.batch)
        if self._compiles:
            accelerate(pipe, self._forward, len(config.engine.warmup))
        self._warmed: set[str] = set()  # sizes whose decoding is compiled
        self._unwarmed: set[str] = set()  # others that were met, and logged
        self._is_warm = False
        self._pipe = pipe
        self.info = EngineInfo(
            model=config.model.id,
            revision=config.model.revision or weights.revision_of(directory),
            dtype=str(dtype).removeprefix("torch."),
            quantization=config.engine.quantization,
            compiled=self._compiles,
            device=_name(self._device),
            device_index=_nvml_index(self._device),
        )

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every size of `engine.warmup` with the default settings, alone and in the largest
        batch; on_step at every step.

        When compiling, every text length is met here too, and what comes later compiles nothing:
        other sizes are decoded as the library does it.

        Raises EngineStartError: such an image cannot be rendered.
        """
        try:
            self._warm_up(on_step)
        except CompileErrors as e:
            raise EngineStartError(f"engine.compile: {self._config.engine.compile}: {e}") from e
        self._is_warm = True
        self._reserve()

    def _warm_up(self, on_step: Callable[[], None]) -> None:
        try:
            self._meet_sizes(on_step)
        except (EngineStartError, torch.OutOfMemoryError):
            raise
        except Exception as e:  # code that is read from a broken cache fails in any way there is
            if not (self._caches and discard_cache(f"warming up failed: {e!r}")):
                raise
            self._meet_sizes(on_step)

    def _meet_sizes(self, on_step: Callable[[], None]) -> None:
        config, most = self._config, self._config.engine.batch
        try:
            self._embeddings.warm_up(config.prompt.max_tokens)
        except torch.OutOfMemoryError as e:
            self._embeddings.graphs = None
            self._leave_out("texts are encoded without CUDA graphs", e)
        for size in config.engine.warmup:
            spec = warm_up_spec(config, size, WARM_UP_PROMPT)
            self._warmed.add(_size(spec))
            for images in sorted({1, most}):
                buffers = [memoryview(bytearray(spec.height * spec.width * 3))] * images
                results = self.render(
                    [spec] * images, config.prompt, lambda step, steps: on_step(), buffers
                )
                for result in results:
                    if isinstance(result, EngineError):
                        raise EngineStartError(f"engine.warmup: {size}: {result}") from result
            if self._compiles:
                tokens, transformer = config.prompt.max_tokens, self._pipe.transformer
                try:
                    meet_text_lengths(transformer, spec.height, spec.width, tokens, most, on_step)
                except torch.OutOfMemoryError as e:
                    self._leave_out(f"not every text length is met at {size}", e)

    def _leave_out(self, what: str, reason: torch.OutOfMemoryError) -> None:
        """Of warming up: images are rendered all the same."""
        log.get().warning("engine.out_of_memory", cure=what, reason=memory.first_sentence(reason))
        self._empty_cache()

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
        batch one after the other; an image alone is decoded in tiles, then the text encoder, then
        the whole model is offloaded, for the rest of this engine's life.

        Returns for each image how it was rendered, or why it alone was not. Anything raised that
        on_step did not raise is unknown: the caller should end the process.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        reason = ""
        try:
            for cure, context in self._rungs(len(specs)):
                if reason:
                    _log_out_of_memory(specs, reason, cure)
                try:
                    with context:
                        return self._attempt(specs, prompt, on_step, buffers)
                except OutOfMemory as e:
                    reason = str(e)
        finally:
            if reason:
                self._reserve()
        if half := len(specs) // 2:
            _log_out_of_memory(specs, reason, "the batch is halved")
            first = self.render(specs[:half], prompt, on_step, buffers[:half])
            return first + self.render(specs[half:], prompt, on_step, buffers[half:])
        return [EngineError(f"out of device memory at {_size(specs[0])}: {reason}")]

    def _rungs(self, images: int) -> Iterator[tuple[str, Any]]:
        """What is tried in turn, the cheapest first: its name, and a context to render in."""
        yield "", contextlib.nullcontext()
        yield "the cache was emptied", contextlib.nullcontext()
        if images > 1:
            return  # its halves take less
        yield "the image is decoded in tiles", tiled(self._pipe.vae)
        later = [*memory.OFFLOADS][[*memory.OFFLOADS].index(self._offload) + 1 :]
        for offload in later:
            try:
                self._offload_to(offload)
            except OSError as e:
                log.get().warning("engine.not_offloaded", offload=offload, reason=str(e))
                return
            yield (
                f"offloaded as with engine.offload: {offload}, until a restart",
                tiled(self._pipe.vae),
            )

    def _offload_to(self, offload: str) -> None:
        """Stream one component more. Raises OSError: the host has too little memory for it."""
        component = memory.OFFLOADS[offload][-1]
        self._embeddings.graphs = None  # they know where the weights were
        self._offload = offload
        memory.stream(getattr(self._pipe, component), self._device)

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
            reason = memory.first_sentence(e)
        self._empty_cache()  # here no frame holds the images' tensors any more
        raise OutOfMemory(reason)

    @torch.no_grad()
    def prepare(self, spec: ImageSpec, prompt: Prompt) -> None:
        """Encode the texts of an image that comes next; called by the on_step of those in hand.

        What is wrong with them, or too little memory beside a batch, its own `render` meets again.
        Not compiling, this gains nothing: the library's padded encoding waits for the device.
        """
        with contextlib.suppress(EngineError, torch.OutOfMemoryError):
            self._texts(spec, prompt)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt has once templated, uncut."""
        return [count_tokens(self._pipe.tokenizer, text) for text in prompts]

    def empty_cache(self) -> None:
        """Give cached memory back to the device, but for `engine.reserve_memory_mib`.

        It all goes back for a moment, so that what is held is in few pieces: who waits for it just
        then has it, which is logged.
        """
        self._empty_cache()
        self._reserve()

    def _reserve(self) -> None:
        memory.hold(self._device, self._config.engine.reserve_memory_mib)

    def _empty_cache(self) -> None:
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
        self._log_if_not_warmed(_size(specs[0]))
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

    def _log_if_not_warmed(self, size: str) -> None:
        """Once for each size."""
        if self._compiles and self._is_warm and size not in self._warmed | self._unwarmed:
            self._unwarmed.add(size)
            why = "not in engine.warmup: decoded as the library does, not compiled"
            log.get().info("engine.size_not_warmed", size=size, reason=why)

    def _encode(self, spec: ImageSpec, buffer: memoryview, prompt: Prompt) -> Encoded | EngineError:
        """Returns an EngineError where a text is too long and must not be cut."""
        begin = self._clock.mark()
        try:
            texts = self._texts(spec, prompt)
        except EngineError as e:
            return e
        return Encoded(spec, buffer, *texts, begin, self._clock.mark())

    def _texts(self, spec: ImageSpec, prompt: Prompt) -> tuple[Embedding, Embedding | None]:
        """The prompt, and what guidance leads away from. Raises EngineError: one is too long and
        must not be cut."""
        embedding, negative = self._embeddings.of(spec.prompt, prompt), None
        if spec.guidance_scale > 0:
            negative = self._embeddings.of(spec.negative_prompt or "", prompt)
        return embedding, negative

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
                prompt_embeds=[one.prompt.embeds for one in encoded],
                negative_prompt_embeds=[one.negative.embeds for one in encoded if one.negative],
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
        memory_now = _memory(self._device)  # of what is queued: here the device still has work
        begin = clock.mark()
        count = pixels.numel()
        torch.frombuffer(encoded.buffer, dtype=torch.uint8, count=count).copy_(pixels.view(-1))
        transferred = clock.mark()
        if unsound := _unsound(*decoded.sound.tolist()):
            return unsound
        clock.wait(transferred)
        return Rendering(
            prompt=encoded.prompt.text,
            tokens=encoded.prompt.tokens,
            truncated=encoded.is_truncated,
            evaluations=len(denoising.steps_ms),
            latency_ms=Latency(
                encode=clock.milliseconds(encoded.begin, encoded.end),
                denoise=denoising.milliseconds,
                decode=clock.milliseconds(decoded.begin, decoded.end),
                transfer=clock.milliseconds(begin, transferred),
            ),
            steps_ms=denoising.steps_ms,
            batch=denoising.images,
            compiled=self._compiles
            and _size(encoded.spec) in self._warmed
            and not self._pipe.vae.use_tiling,
            **memory_now,
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


def compiles(config: Config, device: torch.device) -> bool:
    """`engine.compile`; auto: on a GPU, where Triton and a C compiler are.

    Raises ConfigError: it is on, and they are not.
    """
    wanted, lacking = config.engine.compile, kernels.missing() if device.type == "cuda" else None
    if (capability := _capability(device)) and capability < CAPABILITY:
        lacking = f"{_name(device)} is too old for Triton"
    if wanted == "on" and lacking:
        raise ConfigError(f"engine.compile: on: {lacking}")
    if wanted == "auto" and lacking:
        log.get().warning("engine.not_compiled", reason=lacking)
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and not lacking)


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


def _log_out_of_memory(specs: Sequence[ImageSpec], reason: str, cure: str) -> None:
    log.get().warning(
        "engine.out_of_memory",
        size=_size(specs[0]),
        images=len(specs),
        cure=cure,
        reason=reason,
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


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


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
