"""The device an engine runs on: which one, what it can do, its memory and its clock."""

import time
from typing import Any

import torch

from promptdrop import log
from promptdrop.config import Config
from promptdrop.engines import kernels
from promptdrop.engines.memory import MIB
from promptdrop.errors import ConfigError, EngineStartError

CAPABILITY = 7, 0  # the least that Triton compiles for
Mark = Any  # a torch.cuda.Event, or seconds


def find_device(wanted: str) -> torch.device:
    """Find the device that `model.device` names, and make it the current one.

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


def name_of(device: torch.device) -> str:
    """Return the name of a device, such as `NVIDIA H200` or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return CUDA's compute capability; None on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def nvml_index(device: torch.device) -> int | None:
    """Return the number that NVML gives the device; None if there is none.

    NVML counts all GPUs, torch those of CUDA_VISIBLE_DEVICES: the UUID is the same in both.
    """
    if device.type != "cuda":
        return None
    import pynvml  # needs a driver's library, so only here

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
    except pynvml.NVMLError:
        return None  # a MIG slice, or no NVML here


def compiles(config: Config, device: torch.device) -> bool:
    """Whether to compile, by `engine.compile`. `auto`: on a GPU, if Triton and a C compiler are there.

    Raises ConfigError: `on`, and something that compiling needs is missing.
    """
    wanted, lacking = config.engine.compile, kernels.missing() if device.type == "cuda" else None
    if (capability := capability_of(device)) and capability < CAPABILITY:
        lacking = f"{name_of(device)} is too old for Triton"
    if wanted == "on" and lacking:
        raise ConfigError(f"engine.compile: on: {lacking}")
    if wanted == "auto" and lacking:
        log.get().warning("engine.not_compiled", reason=lacking)
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and not lacking)


def memory_used(device: torch.device) -> dict[str, Any]:
    """Return the memory fields of a Rendering; the peak is since the image began."""
    if device.type != "cuda":
        return {}
    return {
        "memory_allocated_mib": round(torch.cuda.memory_allocated(device) / MIB, 1),
        "memory_reserved_mib": round(torch.cuda.memory_reserved(device) / MIB, 1),
        "memory_peak_mib": round(torch.cuda.max_memory_allocated(device) / MIB, 1),
    }


class Clock:
    """Sets marks on the device's own time line, to be read once the work between them is done."""

    def __init__(self, device: torch.device) -> None:
        self.lags = device.type == "cuda"  # work is queued: a mark lies in the device's future

    def mark(self) -> Mark:
        """Set a mark after all work that is queued so far."""
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
