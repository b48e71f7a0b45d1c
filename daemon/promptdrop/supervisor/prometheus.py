"""Prometheus metrics of a running daemon, when `metrics.listen` asks for them."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from promptdrop.errors import ConfigError
from promptdrop.records import Status


def start(listen: str, snapshot: Callable[[], Status]) -> None:
    """Serve metrics on `HOST:PORT` from a thread; without HOST, only to this machine.

    Raises ConfigError: it cannot listen there.
    """
    host, _, port = listen.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot))
    try:
        start_http_server(int(port), host or "127.0.0.1", registry)
    except (OSError, OverflowError) as e:
        raise ConfigError(f"metrics.listen: {listen}: {e}") from None


class _Collector(Collector):
    def __init__(self, snapshot: Callable[[], Status]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        status = self._snapshot()
        window = status.window
        figures = {
            "engine_ready": (
                "1 while the engine is loaded and warm",
                float(status.engine.state == "ready"),
            ),
            "queue_images": ("Images waiting or in the engine", status.queue.images),
            "queue_jobs": ("Jobs that have not ended", status.queue.jobs),
            "images_published": (
                "Images published since the daemon started",
                status.images_published,
            ),
            "window_images": ("Images that the figures of the window are of", window.images),
            "render_p50_seconds": ("Median render time over the window", _seconds(window.p50_ms)),
            "render_p95_seconds": ("95th percentile of it", _seconds(window.p95_ms)),
            "render_p99_seconds": ("99th percentile of it", _seconds(window.p99_ms)),
            "images_per_second": ("Rate over the window", window.images_per_second),
            "gpu_utilization_percent": ("NVML's, mean over the window", window.utilization_percent),
        }
        for name, (text, value) in figures.items():
            if value is not None:
                yield GaugeMetricFamily(f"promptdrop_{name}", text, value=value)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
