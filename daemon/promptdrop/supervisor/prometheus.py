"""Prometheus metrics of a running daemon, when `metrics.listen` asks for them."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from promptdrop import log
from promptdrop.errors import ConfigError
from promptdrop.records import Status

CONNECTIONS = 16  # at once; one more is closed when it comes
CONNECTION_SECONDS = 5.0  # of each, from its first moment to its last
_CHECK_SECONDS = 0.25  # between two looks for those that are over
_REST_SECONDS = 0.5  # after a connection that could not be taken, as when descriptors have run out


def start(listen: str, snapshot: Callable[[], Status]) -> None:
    """Serve metrics on `HOST:PORT` from a thread; without HOST, only to this machine.

    Raises ConfigError: it cannot listen there.
    """
    host, _, port = listen.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot))
    try:
        server = _Server(host or "127.0.0.1", int(port), MetricsHandler.factory(registry))
    except (OSError, OverflowError, UnicodeError) as e:
        raise ConfigError(f"metrics.listen: {listen}: {e}") from None
    threading.Thread(
        target=server.serve_forever, args=(_CHECK_SECONDS,), name="metrics", daemon=True
    ).start()


class _Server(ThreadingTCPServer):
    """Answers each connection on a thread of its own, a few at once and none for long.

    Anybody on this machine may connect, and then say nothing, or a byte now and then.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be taken, or turned away

    def __init__(self, host: str, port: int, handler: Any) -> None:
        self.address_family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        self._lock = threading.Lock()
        self._ends: dict[socket.socket, float] = {}  # open connections -> when each is over
        super().__init__((host, port), handler)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. Raises OSError, which the caller passes over."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_REST_SECONDS)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection is answered; otherwise it is closed at once."""
        with self._lock:
            has_room = len(self._ends) < CONNECTIONS
            if has_room:
                self._ends[request] = time.monotonic() + CONNECTION_SECONDS
        return has_room

    def service_actions(self) -> None:
        """Cut the connections that are over, whose threads then read the end and go."""
        now = time.monotonic()
        with self._lock:  # so that none is closed meanwhile, and its number another file's
            for request, end in self._ends.items():
                if now >= end:
                    with suppress(OSError):  # the other side has gone
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that was answered or turned away."""
        with self._lock:
            self._ends.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what has ended a connection before its answer: whoever asked has gone, or asked nonsense."""
        log.get().debug("metrics.unanswered", exc_info=True)


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
