"""Latencies over the last images, and NVML's figures of the device. A figure that is not known is None."""

import os
import statistics
from collections import deque
from typing import Any

from promptdrop.records import Window


class RollingWindow:
    """The last `size` images: (moment published, render ms, device utilization percent)."""

    def __init__(self, size: int) -> None:
        self._images: deque[tuple[float, float, float | None]] = deque(maxlen=size)

    def add(self, moment: float, render_ms: float, utilization: float | None) -> None:
        """Count one more image; `moment` is on the monotonic clock, seconds."""
        self._images.append((moment, render_ms, utilization))

    def summary(self) -> Window:
        """Return exact quantiles, the rate over the window's span and the mean utilization."""
        renders = [render for _, render, _ in self._images]
        utilizations = [u for _, _, u in self._images if u is not None]
        p50, p95, p99 = percentiles(renders)
        span = self._images[-1][0] - self._images[0][0] if len(renders) > 1 else 0.0
        return Window(
            images=len(renders),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            images_per_second=round((len(renders) - 1) / span, 4) if span > 0 else None,
            utilization_percent=round(statistics.fmean(utilizations), 1) if utilizations else None,
        )


class Nvml:
    """Asks the driver for figures of a device, in the engine's process and on its host."""

    def __init__(self, index: int | None) -> None:
        self._handle: Any = None
        if index is None:
            return
        import pynvml

        self._pynvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError:
            pass  # a driver without NVML (a container, MIG): the figures are None

    def utilization_percent(self) -> float | None:
        """Return the percentage of the last sample period in which a kernel ran."""
        if self._handle is None:
            return None
        try:
            return float(self._pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except self._pynvml.NVMLError:
            return None


def gpu_count() -> int:
    """Count the GPUs that a process of ours may use; 0 without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def percentiles(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Return the exact p50, p95 and p99 of these milliseconds; each is None if there are none."""
    if not values:
        return None, None, None
    if len(values) == 1:
        return (round(values[0], 1),) * 3
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return round(cuts[49], 1), round(cuts[94], 1), round(cuts[98], 1)
