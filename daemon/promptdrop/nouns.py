"""The nouns, frozen: what an image is asked to be, and what came of it."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SCHEDULERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun")
SUFFIX_OF_FORMAT = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "avif": ".avif"}
FORMATS = tuple(SUFFIX_OF_FORMAT)

JobOutcome = Literal["done", "partial", "failed", "cancelled"]
ImageOutcome = Literal["rendered", "placeholder", "failed", "cancelled"]


class ImageSpec(NamedTuple):
    """One image a job asks for, every default filled in; a tuple, since a job may make 10,000.

    width, height: pixels, multiples of 16. seed: 0 to 2**63-1, None until the job has an id.
    timeout_seconds: from the moment the engine begins the image.
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
        """How often the transformer runs: twice in each of heun's steps but the last."""
        return 2 * self.steps - 1 if self.scheduler == "heun" else self.steps

    @property
    def kind(self) -> tuple[Any, ...]:
        """What images that are rendered together have in common."""
        guidance = self.guidance_scale, self.scheduler
        return self.width, self.height, self.steps, *guidance, self.timeout_seconds

    def to_json(self) -> dict[str, Any]:
        """A mapping of JSON types; `ImageSpec(**spec.to_json())` is the spec again."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class Request:
    """What one job file asks for."""

    images: tuple[ImageSpec, ...]  # never empty, numbered 1, 2, 3 ...
    priority: int = 0


def seed_of(job_id: str, image: int) -> int:
    """The seed of an image whose job file names none: first 32 bits of SHA-256(`ID:image`)."""
    return int.from_bytes(hashlib.sha256(f"{job_id}:{image}".encode()).digest()[:4], "big")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is, said once when it is warm; goes into every sidecar."""

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
    """Milliseconds of one render, read from device events once the image is done.

    `denoise` is the batch's, the same for each of its images; the others are the image's own.
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
    """How one image was rendered. The pixels travel beside it: uint8 [height, width, 3], RGB."""

    prompt: str  # what the encoder was given
    tokens: int | None  # of the templated text
    truncated: bool
    evaluations: int
    latency_ms: Latency
    steps_ms: tuple[float, ...]
    batch: int = 1  # how many images were denoised together
    compiled: bool = False  # all of it: a size that was not warmed is decoded as the library does
    utilization_percent: float | None = None  # NVML's, of the device
    memory_allocated_mib: float | None = None  # None where there is no device memory to count
    memory_reserved_mib: float | None = None
    memory_peak_mib: float | None = None
