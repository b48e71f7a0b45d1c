"""Render a batch's prompts to pixels, with the same calls in the same order as ZImagePipeline.

Shapes: latents are float32 [B, 16, H/8, W/8] of a batch of B images, pixels uint8 [H, W, 3]. Line
numbers of diffusers are those of 0.42.1.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from promptdrop import log
from promptdrop.config import Prompt
from promptdrop.engines.device import Clock, Mark, memory_used
from promptdrop.engines.engine import OnStep
from promptdrop.engines.forward import together
from promptdrop.engines.loading import Model
from promptdrop.engines.schedulers import scheduler_for
from promptdrop.engines.text import Embedding
from promptdrop.errors import EngineError
from promptdrop.nouns import ImageSpec, Latency, Rendering

Tensors = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image whose texts the transformer can take."""

    spec: ImageSpec
    buffer: memoryview
    prompt: Embedding
    negative: Embedding | None  # None without guidance
    begin: Mark
    end: Mark

    @property
    def is_truncated(self) -> bool:
        """Whether a text was cut to fit."""
        return any(text.truncated for text in (self.prompt, self.negative) if text)


@dataclass(frozen=True, slots=True)
class Denoising:
    """The figures that all images of a batch share."""

    images: int
    milliseconds: float
    steps_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image's pixels on the device, not yet checked by `_unsound`."""

    pixels: torch.Tensor  # [H, W, 3]
    sound: torch.Tensor  # [3], see `_unsound`
    begin: Mark
    end: Mark


class Renderer:
    """Renders batches on a model, one at a time, from one thread."""

    def __init__(self, model: Model) -> None:
        self._model, self._pipe = model, model.pipe
        self._clock = Clock(model.device)
        self._evaluations: list[Mark] = []  # when each evaluation of the batch in hand began
        self._pipe.transformer.register_forward_pre_hook(
            lambda module, inputs: self._evaluations.append(self._clock.mark())
        )
        self.is_warm = False  # from now on nothing is compiled
        self.warmed: set[str] = set()  # sizes whose decoding is compiled
        self._unwarmed: set[str] = set()  # other sizes that were asked for, and logged

    def render(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Render a batch as `ZImageEngine.render` does. Raises torch.OutOfMemoryError."""
        with self._no_new_graphs():
            return self._render(specs, prompt, on_step, buffers)

    def _no_new_graphs(self) -> Any:
        """Keep torch from compiling once the engine is warm, so that no image waits for a compiler.

        A shape that no graph was compiled for runs uncompiled.
        """
        if self._model.is_compiled and self.is_warm:  # both branches return a context manager
            return torch.compiler.set_stance("eager_on_recompile")
        return contextlib.nullcontext()

    def _render(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Encode, denoise, decode, and copy the pixels into the buffers."""
        clock = self._clock
        self._log_if_not_warmed(size_of(specs[0]))
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
        """Log a size that was not warmed up, once for each size."""
        if self._model.is_compiled and self.is_warm and size not in self.warmed | self._unwarmed:
            self._unwarmed.add(size)
            why = "not in engine.warmup: decoded as the library does, not compiled"
            log.get().info("engine.size_not_warmed", size=size, reason=why)

    def _encode(self, spec: ImageSpec, buffer: memoryview, prompt: Prompt) -> Encoded | EngineError:
        """Encode an image's texts. Returns an EngineError if one is too long and must not be cut."""
        begin = self._clock.mark()
        try:
            texts = self.texts(spec, prompt)
        except EngineError as e:
            return e
        return Encoded(spec, buffer, *texts, begin, self._clock.mark())

    def texts(self, spec: ImageSpec, prompt: Prompt) -> tuple[Embedding, Embedding | None]:
        """Return the embeddings of the prompt and, with guidance, of the negative prompt.

        Raises EngineError: one of the texts is too long and must not be cut.
        """
        embedding, negative = self._model.embeddings.of(spec.prompt, prompt), None
        if spec.guidance_scale > 0:
            negative = self._model.embeddings.of(spec.negative_prompt or "", prompt)
        return embedding, negative

    def _denoise(self, encoded: list[Encoded], on_step: OnStep) -> torch.Tensor:
        """Denoise a batch, each image from noise of its own seed. Returns latents [B, 16, H/8, W/8]."""
        clock, spec = self._clock, encoded[0].spec

        def at_step_end(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
            # On CUDA this step is only queued. Once its evaluation has begun, the step before it is
            # done; waiting for that, and for no more, leaves the device one step to work on.
            if clock.lags:
                clock.wait(self._evaluations[-1])
            if done := index + (0 if clock.lags else 1):
                on_step(done, spec.evaluations)
            return tensors

        generators = [
            torch.Generator(self._model.device).manual_seed(_seed(one.spec)) for one in encoded
        ]
        self._pipe.scheduler = scheduler_for(spec.scheduler, self._model.scheduler, generators)
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
        """Use FastForward for several images together, if they are not compiled anyway.

        An image that is alone and not compiled goes through the library's own forward: its pixels are
        the library's, bit for bit.
        """
        if images > 1 and not self._model.is_compiled:  # both branches return a context manager
            return together(self._pipe.transformer, self._model.forward)
        return contextlib.nullcontext()

    def _decoded(self, latents: torch.Tensor) -> Decoded:
        """Decode one image's latents [1, 16, H/8, W/8] to pixels, on the device."""
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
        """Copy an image's pixels into its buffer. Returns an EngineError if they are not sound."""
        clock, pixels = self._clock, decoded.pixels
        memory_now = memory_used(self._model.device)  # read while the device still has work to do
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
            compiled=self._model.is_compiled
            and size_of(encoded.spec) in self.warmed
            and not self._pipe.vae.use_tiling,
            **memory_now,
        )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode as ZImagePipeline.__call__ does, pipeline_z_image.py:592-595."""
        vae = self._pipe.vae
        latents = latents.to(vae.dtype)
        latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
        image: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return image

    def _pixels(self, image: torch.Tensor) -> torch.Tensor:
        """Do what VaeImageProcessor.postprocess(..., "pil") does, on the device and bit for bit.

        torch and numpy both round halves to even (image_processor.py:143), in float32.
        """
        image = self._pipe.image_processor.postprocess(image, output_type="pt")  # in [0, 1]
        image = image[0].permute(1, 2, 0).float()  # [H, W, 3]
        return (image * 255).round().to(torch.uint8).contiguous()


def size_of(spec: ImageSpec) -> str:
    """Return the size as `engine.warmup` names it, such as `1024x768`."""
    return f"{spec.width}x{spec.height}"


def _seed(spec: ImageSpec) -> int:
    if spec.seed is None:
        raise ValueError(f"image {spec.image}: seed is None; the caller has to draw one")
    return spec.seed


def _unsound(
    latents_finite: bool, decoded_finite: bool, several_colours: bool
) -> EngineError | None:
    """Say why an image must not be published: it would be black or blank. None if it is sound."""
    if not latents_finite:
        return EngineError("the latents are not finite (NaN or infinity) after denoising")
    if not decoded_finite:
        return EngineError("the decoded image is not finite (NaN or infinity)")
    if not several_colours:
        return EngineError("every pixel of the image has the same colour")
    return None
