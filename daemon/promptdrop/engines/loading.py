"""Load a checkpoint's files into a model on a device, ready to render."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from promptdrop import weights
from promptdrop.config import Config
from promptdrop.engines import compile_cache, kernels, memory, quantization
from promptdrop.engines.decoder import compile_decoder
from promptdrop.engines.device import capability_of, compiles, find_device, name_of, nvml_index
from promptdrop.engines.engine import OnStage, require_quantization
from promptdrop.engines.forward import FastForward, join_weights
from promptdrop.engines.schedulers import checkpoint_scheduler
from promptdrop.engines.text import Embeddings, EncoderGraphs
from promptdrop.errors import EngineStartError, ModelError
from promptdrop.nouns import EngineInfo


@dataclass(slots=True)
class Model:
    """A pipeline on its device, and what makes it fast."""

    pipe: Any  # ZImagePipeline
    device: torch.device
    scheduler: Any  # the checkpoint's own
    embeddings: Embeddings
    forward: FastForward  # for the transformer, if it compiles or renders several images together
    is_compiled: bool
    has_cache: bool  # some of its code may come from the cache of compiled code
    offload: str  # which of memory.OFFLOADS is in use
    info: EngineInfo

    def offload_to(self, offload: str) -> None:
        """Stream one more component. Raises OSError: the host has too little memory for it."""
        component = memory.OFFLOADS[offload][-1]
        self.embeddings.graphs = None  # captured with the addresses that the weights had
        self.offload = offload
        memory.stream(getattr(self.pipe, component), self.device)


def load(config: Config, on_stage: OnStage) -> Model:
    """Load the configured model.

    Raises ModelError: files are missing or broken. ConfigError: the device cannot do what is
    asked of it. EngineStartError: it cannot be used.
    """
    directory = weights.require(config)
    device = find_device(config.model.device)
    is_compiled = compiles(config, device)
    require_quantization(config, name_of(device), capability_of(device))
    has_cache = is_compiled or (device.type == "cuda" and kernels.IS_FUSED)
    if has_cache:
        compile_cache.use(config.cache / "compiled", config.model.id, name_of(device))
    dtype = getattr(torch, config.model.dtype) if device.type == "cuda" else torch.float32
    on_stage("loading weights")
    pipe = _read(directory, dtype)
    scheduler = checkpoint_scheduler(pipe, directory)
    offload = _place(pipe, config, device, is_compiled, on_stage)
    remember_device_and_dtype(pipe, device)
    embeddings = Embeddings(pipe, padded=not is_compiled)
    if is_compiled and device.type == "cuda" and offload == "none":
        embeddings.graphs = EncoderGraphs(pipe.text_encoder)
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        module.eval().requires_grad_(False)
    forward = FastForward(pipe.transformer, config.engine.batch)
    if is_compiled:
        pipe.transformer.forward = forward
        compile_decoder(pipe.vae.decoder, len(config.engine.warmup))
    info = EngineInfo(
        model=config.model.id,
        revision=config.model.revision or weights.revision_of(directory),
        dtype=str(dtype).removeprefix("torch."),
        quantization=config.engine.quantization,
        compiled=is_compiled,
        device=name_of(device),
        device_index=nvml_index(device),
    )
    return Model(
        pipe=pipe,
        device=device,
        scheduler=scheduler,
        embeddings=embeddings,
        forward=forward,
        is_compiled=is_compiled,
        has_cache=has_cache,
        offload=offload,
        info=info,
    )


def _read(directory: Path, dtype: torch.dtype) -> Any:
    """Read a pipeline into the host's memory. Raises ModelError: its files are broken."""
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
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _place(
    pipe: Any, config: Config, device: torch.device, is_compiled: bool, on_stage: OnStage
) -> str:
    """Quantize the pipeline and move it to the device. Returns which offload was chosen.

    Raises EngineStartError: the device or the host has too little memory.
    """
    why = ""
    try:
        if config.engine.quantization == "fp8":
            on_stage("quantizing to fp8")
            quantization.quantize(pipe.transformer, device)
        on_stage(f"moving to {device}")
        offload, why = memory.choose(config, pipe, device)
        memory.place(pipe, offload, device)
        if is_compiled and device.type == "cuda" and offload != "model":
            join_weights(pipe.transformer)
    except (RuntimeError, OSError) as e:  # torch.OutOfMemoryError is a RuntimeError
        raise EngineStartError(f"{device}: the model cannot be moved there: {e}{why}") from e
    return offload


class PipelineOnDevice(ZImagePipeline):  # type: ignore[misc]  # diffusers has no types
    """A pipeline that has its device in an attribute."""

    _execution_device: torch.device | None = None


class TransformerOfDtype(ZImageTransformer2DModel):  # type: ignore[misc]  # diffusers has no types
    """A transformer that has the dtype of its weights in an attribute."""

    dtype: torch.dtype | None = None


def remember_device_and_dtype(pipe: Any, device: torch.device) -> None:
    """Tell the pipeline what it would look up in its 1,500 modules at every image and every step.

    The two look-ups take 4.8 and 1.3 ms of a slow CPU, in which a GPU waits for its next image.
    """
    dtype = pipe.transformer.dtype
    pipe.__class__, pipe.transformer.__class__ = PipelineOnDevice, TransformerOfDtype
    pipe._execution_device, pipe.transformer.dtype = device, dtype
