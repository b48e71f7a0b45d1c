"""`metrics.listen`: Prometheus text over HTTP."""

import json
import socket
import struct
import time
import urllib.request
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import pytest

from harness import Daemon, MakeDaemon, free_port, until, works
from promptdrop.supervisor.prometheus import CONNECTION_SECONDS, CONNECTIONS

SLACK = 2  # threads or descriptors of the daemon's other work, which come and go
NONSENSE = [
    b"\0\xff\n", b"\r\n", b"GET\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PUT / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.0\r\nAccept: application/openmetrics-text; version=x; escaping=y\r\n\r\n",
    b"GET //[/?name[]=%ff&& HTTP/1.0\r\n\r\n",
]  # fmt: skip


def scrape(port: int) -> str:
    """The metrics as text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def held(daemon: Daemon) -> tuple[int, int]:
    """How many threads and descriptors the daemon has."""
    assert daemon.process
    home = Path(f"/proc/{daemon.process.pid}")
    return len(list(home.glob("task/*"))), len(list(home.glob("fd/*")))


def is_back_to(before: tuple[int, int], now: tuple[int, int]) -> bool:
    """Whether the daemon holds no more than before."""
    return now[0] <= before[0] + SLACK and now[1] <= before[1] + SLACK


def test_metrics_are_served_as_prometheus_text(make_daemon: MakeDaemon) -> None:
    """They are served at `metrics.listen`, also while images are being rendered."""
    port = free_port()
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{port}"}})
    daemon.start().until_ready()
    daemon.drop("a.txt", "one\ntwo\nthree\n" * 20)

    while not daemon.log("job.done"):
        scrape(port)
    until(
        lambda: "promptdrop_images_published 60.0" in scrape(port), "the last image in the metrics"
    )
    last = scrape(port)

    assert "promptdrop_engine_ready 1.0" in last
    for figure in ("render_p50_seconds", "render_p95_seconds", "render_p99_seconds"):
        assert f"# TYPE promptdrop_{figure} gauge" in last
    assert "promptdrop_images_per_second " in last
    assert "promptdrop_window_images 50.0" in last
    assert daemon.stop() == 0


def test_idle_connections_do_not_keep_metrics_from_others(make_daemon: MakeDaemon) -> None:
    """Of two hundred that say a byte now and then, sixteen are held, for five seconds each in all;
    then a scrape is answered, and no thread or descriptor stays behind."""
    port = free_port()
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{port}"}})
    daemon.start().until_ready()
    works(daemon)
    before, most = held(daemon), (0, 0)
    began = time.monotonic()
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)
        ]
        until(lambda: held(daemon)[0] >= before[0] + CONNECTIONS - SLACK, "sixteen threads")
        with pytest.raises((URLError, OSError, HTTPException)):  # it is closed at once
            scrape(port)
        turned_away = time.monotonic() - began

        def answer() -> str:
            nonlocal most
            now = held(daemon)
            most = max(most[0], now[0]), max(most[1], now[1])
            for one in idle:
                with suppress(OSError):
                    one.send(b"G")
            with suppress(URLError, OSError, HTTPException):
                return scrape(port)
            time.sleep(0.2)
            return ""

        answered = until(answer, "a scrape that is answered")
        took = time.monotonic() - began
        until(lambda: is_back_to(before, held(daemon)), "the end of all")

    assert "promptdrop_engine_ready 1.0" in answered
    assert turned_away < CONNECTION_SECONDS
    assert took < CONNECTION_SECONDS + 3
    assert most[0] <= before[0] + CONNECTIONS + SLACK
    assert most[1] <= before[1] + CONNECTIONS + 1 + SLACK  # one more while it is turned away
    assert daemon.stop() == 0


def test_nonsense_is_answered_without_a_word_in_the_log(make_daemon: MakeDaemon) -> None:
    """Whatever is asked, and whoever goes before the answer: the log has JSON lines only, none of it."""
    port = free_port()
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{port}"}})
    daemon.start().until_ready()
    lines = len(daemon.log())
    for request in NONSENSE:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as asked:
            asked.sendall(request)
            asked.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while asked.recv(1 << 16):
                    pass
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
            gone.sendall(request)
    until(lambda: "promptdrop_engine_ready 1.0" in scrape(port), "a scrape")
    assert daemon.stop() == 0

    written = [json.loads(line) for line in daemon.log_file.read_text().splitlines()]
    assert [e["event"] for e in written[lines:]] == ["daemon.stopping", "daemon.stopped"]
