"""`metrics.listen`: Prometheus text over HTTP."""

import urllib.request

from harness import MakeDaemon, free_port, until


def test_metrics_are_served_as_prometheus_text(make_daemon: MakeDaemon) -> None:
    """They are served at `metrics.listen`, also while images are being rendered."""
    port = free_port()
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{port}"}})
    daemon.start().until_ready()
    daemon.drop("a.txt", "one\ntwo\nthree\n" * 20)

    def body() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.status == 200
            return str(answer.read().decode())

    while not daemon.log("job.done"):
        body()
    until(lambda: "promptdrop_images_published 60.0" in body(), "the last image in the metrics")
    last = body()

    assert "promptdrop_engine_ready 1.0" in last
    for figure in ("render_p50_seconds", "render_p95_seconds", "render_p99_seconds"):
        assert f"# TYPE promptdrop_{figure} gauge" in last
    assert "promptdrop_images_per_second " in last
    assert "promptdrop_window_images 50.0" in last
    assert daemon.stop() == 0
