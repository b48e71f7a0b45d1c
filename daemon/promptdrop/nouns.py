"""The nouns of the whole package: the image that is asked for, the request, the engine, the rendering."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SCHEDULERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun")
SUFFIX_OF_FORMAT = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "avif": ".avif"}
FORMATS = tuple(SUFFIX_OF_FORMAT)

JobOutcome = Literal["done", "partial", "failed", "cancelled"]
ImageOutcome = Literal["rendered", "placeholder", "failed", "cancelled"]


class ImageSpec(NamedTuple):
    """One image that a job asks for, every default filled in. A job may have 10,000, so a tuple.

    width, height: pixels, multiples of 16. seed: 0 to 2**63-1, None until the job has an id.
    timeout_seconds: counted from the moment the engine begins the image. A new attribute needs a
    default, because jobs that were recorded before lack it.
    """

    image: int  # counts from 1 within the job
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int | None
    scheduler: str
    format: str
    timeout_seconds: float
    meta: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it

    @property
    def evaluations(self) -> int:
        """How often the transformer runs; heun runs it twice in each step but the last."""
        return 2 * self.steps - 1 if self.scheduler == "heun" else self.steps

    @property
    def kind(self) -> tuple[Any, ...]:
        """The attributes that are the same for all images of one batch."""
        guidance = self.guidance_scale, self.scheduler
        return self.width, self.height, self.steps, *guidance, self.timeout_seconds

    def to_json(self) -> dict[str, Any]:
        """Return a mapping of JSON types; `ImageSpec(**spec.to_json())` is the spec again."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class Request:
    """The images that one job file asks for."""

    images: tuple[ImageSpec, ...]  # never empty, numbered 1, 2, 3 ...
    priority: int = 0


def seed_of(job_id: str, image: int) -> int:
    """Return the seed of an image whose job file gives none: 32 bits of SHA-256(`ID:image`)."""
    return int.from_bytes(hashlib.sha256(f"{job_id}:{image}".encode()).digest()[:4], "big")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The model and device of an engine, as it reports them when it is warm; see the sidecars."""

    model: str
    revision: str | None
    dtype: str  # "bfloat16", "float32"
    quantization: str
    compiled: bool
    device: str  # "NVIDIA H200", "cpu"
    device_index: int | None = None  # NVML's index; None on the CPU
    host: str | None = None  # where it runs


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one render, measured by events on the device.

    `denoise` is that of the whole batch; the others are those of the one image.
    """

    encode: float
    denoise: float
    decode: float
    transfer: float

    @property
    def render(self) -> float:
        """The whole render: encode + denoise + decode + transfer."""
        return self.encode + self.denoise + self.decode + self.transfer


@dataclass(frozen=True, slots=True)
class Rendering:
    """How one image was rendered. Its pixels, uint8 [height, width, 3] in RGB, are not part of it."""

    prompt: str  # as the encoder was given it
    tokens: int | None  # of the templated text
    truncated: bool
    evaluations: int
    latency_ms: Latency
    steps_ms: tuple[float, ...]
    batch: int = 1  # how many images were denoised together
    compiled: bool = (
        False  # whether all of it was compiled; a size that was not warmed up is decoded uncompiled
    )
    utilization_percent: float | None = None  # NVML's, of the device
    memory_allocated_mib: float | None = None  # None where there is no device memory to count
    memory_reserved_mib: float | None = None
    memory_peak_mib: float | None = None
