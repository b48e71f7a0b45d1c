"""The parts of a sidecar: what was asked for, what was rendered, how long it took, and where."""

from promptdrop import clock, names
from promptdrop.nouns import EngineInfo, ImageSpec, Rendering
from promptdrop.records import (
    Device,
    LatencyMs,
    SidecarImage,
    SidecarJob,
    SidecarModel,
    SidecarPrompt,
    SidecarRequest,
)
from promptdrop.spool.detail import Settled
from promptdrop.spool.job import Job

# In all of these `rendering` is None for a placeholder, which no engine rendered.


def of_job(job: Job, spec: ImageSpec, attempt: int) -> SidecarJob:
    """The image's place in its job, and the attempt that made it."""
    return SidecarJob(
        id=job.id,
        name=job.name,
        file=names.printable(job.file),
        image=spec.image,
        images=job.images,
        attempt=attempt,
    )


def of_image(spec: ImageSpec, file: str, size: int, sha256: str) -> SidecarImage:
    """The picture file; `size` in bytes."""
    return SidecarImage(
        file=file,
        format=spec.format,
        width=spec.width,
        height=spec.height,
        bytes=size,
        sha256=sha256,
    )


def of_request(spec: ImageSpec) -> SidecarRequest:
    """Everything that was asked for, so that the same image can be asked for again."""
    asked: SidecarRequest = SidecarRequest.model_validate(spec, from_attributes=True)
    return asked


def of_prompt(spec: ImageSpec, rendering: Rendering | None) -> SidecarPrompt:
    """The prompt as the encoder was given it."""
    return SidecarPrompt(
        text=rendering.prompt if rendering else spec.prompt,
        tokens=rendering.tokens if rendering else None,
        truncated=rendering.truncated if rendering else False,
    )


def of_model(engine: EngineInfo, rendering: Rendering | None) -> SidecarModel:
    """The model, as this image was rendered with it."""
    return SidecarModel(
        id=engine.model,
        revision=engine.revision,
        dtype=engine.dtype,
        quantization=engine.quantization,
        compiled=rendering.compiled if rendering else engine.compiled,
    )


def of_device(engine: EngineInfo, engine_name: str | None, rendering: Rendering | None) -> Device:
    """The device and its memory just after the image."""
    return Device(
        name=engine.device,
        engine=engine_name,
        host=engine.host,
        utilization_percent=rendering.utilization_percent if rendering else None,
        memory_allocated_mib=rendering.memory_allocated_mib if rendering else None,
        memory_reserved_mib=rendering.memory_reserved_mib if rendering else None,
        memory_peak_mib=rendering.memory_peak_mib if rendering else None,
    )


def latency(
    settled: Settled, rendering: Rendering | None, started: float, save_ms: float
) -> LatencyMs:
    """The time that each part took. `total` is not known before the image is visible.

    started: the image's first step of work, monotonic seconds.
    """
    parts = rendering.latency_ms if rendering else None
    return LatencyMs(
        queued=rounded(settled.milliseconds_to(started, clock.boot_id())),
        encode=rounded(parts.encode) if parts else None,
        denoise=rounded(parts.denoise) if parts else None,
        decode=rounded(parts.decode) if parts else None,
        transfer=rounded(parts.transfer) if parts else None,
        render=rounded(parts.render) if parts else None,
        save=round(save_ms, 1),
        total=None,
    )


def rounded(milliseconds: float | None) -> float | None:
    """Round to a tenth of a millisecond; None stays None."""
    return None if milliseconds is None else round(milliseconds, 1)
