"""The engine for Z-Image on torch and diffusers: warms up, and recovers when memory runs out.

Runs in the engine process, or in a script's own.
"""

import contextlib
import gc
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; the daemon never uses the network
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from torch._dynamo.exc import TorchDynamoException

from promptdrop import log
from promptdrop.config import Config, Prompt
from promptdrop.engines import compile_cache, loading, memory
from promptdrop.engines.decoder import tiled
from promptdrop.engines.engine import OnStage, OnStep, warm_up_spec
from promptdrop.engines.forward import meet_text_lengths
from promptdrop.engines.rendering import Renderer, size_of
from promptdrop.engines.text import count_tokens
from promptdrop.errors import EngineError, EngineStartError
from promptdrop.nouns import ImageSpec, Rendering

WARM_UP_PROMPT = "a lighthouse on a rocky coast at sunset, soft light, highly detailed"
CompileErrors = TorchDynamoException, subprocess.CalledProcessError  # the latter: the C compiler


class OutOfMemory(Exception):
    """An attempt needed more device memory than there is; another that needs less may work."""


class ZImageEngine:
    """A ZImagePipeline on one device; one batch at a time, from one thread."""

    def __init__(self, config: Config, on_stage: OnStage) -> None:
        """Load the model. Raises ModelError, ConfigError, EngineStartError: as `loading.load`."""
        self._config = config
        self.model = loading.load(config, on_stage)
        self.renderer = Renderer(self.model)
        self.info = self.model.info

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every size of `engine.warmup` with the default settings, alone and in a full batch.

        It calls on_step at every step. When compiling, it evaluates every text length too. Nothing is compiled afterwards: other
        sizes are decoded as the library does it.

        Raises EngineStartError: such an image cannot be rendered.
        """
        try:
            self._warm_up(on_step)
        except CompileErrors as e:
            raise EngineStartError(f"engine.compile: {self._config.engine.compile}: {e}") from e
        self.renderer.is_warm = True
        self._reserve()

    def _warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every size; if that fails, again without the cache of compiled code."""
        try:
            self._meet_sizes(on_step)
        except (EngineStartError, torch.OutOfMemoryError):
            raise
        except Exception as e:  # code from a broken cache may raise anything
            if not (self.model.has_cache and compile_cache.discard(f"warming up failed: {e!r}")):
                raise
            self._meet_sizes(on_step)

    def _meet_sizes(self, on_step: Callable[[], None]) -> None:
        config, most = self._config, self._config.engine.batch
        try:
            self.model.embeddings.warm_up(config.prompt.max_tokens)
        except torch.OutOfMemoryError as e:
            self.model.embeddings.graphs = None
            self._leave_out("texts are encoded without CUDA graphs", e)
        for size in config.engine.warmup:
            spec = warm_up_spec(config, size, WARM_UP_PROMPT)
            self.renderer.warmed.add(size_of(spec))
            for images in sorted({1, most}):
                buffers = [memoryview(bytearray(spec.height * spec.width * 3))] * images
                results = self.render(
                    [spec] * images, config.prompt, lambda step, steps: on_step(), buffers
                )
                for result in results:
                    if isinstance(result, EngineError):
                        raise EngineStartError(f"engine.warmup: {size}: {result}") from result
            if self.model.is_compiled:
                tokens, transformer = config.prompt.max_tokens, self.model.pipe.transformer
                try:
                    meet_text_lengths(transformer, spec.height, spec.width, tokens, most, on_step)
                except torch.OutOfMemoryError as e:
                    self._leave_out(f"not every text length is met at {size}", e)

    def _leave_out(self, what: str, reason: torch.OutOfMemoryError) -> None:
        """Log a part of the warm-up that is skipped for lack of memory; rendering still works."""
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
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
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
        return [EngineError(f"out of device memory at {size_of(specs[0])}: {reason}")]

    def _rungs(self, images: int) -> Iterator[tuple[str, Any]]:
        """Yield the attempts to make, the cheapest first: the cure's name and a context to render in."""
        yield "", contextlib.nullcontext()
        yield "the cache was emptied", contextlib.nullcontext()
        if images > 1:
            return  # the batch is halved instead
        yield "the image is decoded in tiles", tiled(self.model.pipe.vae)
        later = [*memory.OFFLOADS][[*memory.OFFLOADS].index(self.model.offload) + 1 :]
        for offload in later:
            try:
                self.model.offload_to(offload)
            except OSError as e:
                log.get().warning("engine.not_offloaded", offload=offload, reason=str(e))
                return
            yield (
                f"offloaded as with engine.offload: {offload}, until a restart",
                tiled(self.model.pipe.vae),
            )

    def _attempt(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Render once. Raises OutOfMemory: there was too little; the cache has been emptied."""
        try:
            return self.renderer.render(specs, prompt, on_step, buffers)
        except torch.OutOfMemoryError as e:
            reason = memory.first_sentence(e)
        self._empty_cache()  # here no frame holds the images' tensors any more
        raise OutOfMemory(reason)

    @torch.no_grad()
    def prepare(self, spec: ImageSpec, prompt: Prompt) -> None:
        """Encode the texts of an image that comes next; called by the on_step of those in hand.

        Errors are ignored here: the image's own `render` raises them again. Without compiling this
        gains nothing, because the library's padded encoding waits for the device.
        """
        with contextlib.suppress(EngineError, torch.OutOfMemoryError):
            self.renderer.texts(spec, prompt)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Count the tokens of each prompt, the template included and nothing cut."""
        return [count_tokens(self.model.pipe.tokenizer, text) for text in prompts]

    def empty_cache(self) -> None:
        """Give cached memory back to the device, but for `engine.reserve_memory_mib`.

        All of it is given back for a moment, so that the reserved memory is in few pieces. Another
        process may take it in that moment; that is logged.
        """
        self._empty_cache()
        self._reserve()

    def _reserve(self) -> None:
        memory.hold(self.model.device, self._config.engine.reserve_memory_mib)

    def _empty_cache(self) -> None:
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _log_out_of_memory(specs: Sequence[ImageSpec], reason: str, cure: str) -> None:
    log.get().warning(
        "engine.out_of_memory",
        size=size_of(specs[0]),
        images=len(specs),
        cure=cure,
        reason=reason,
    )
