"""Images a second through spool and outbox, against the engine back to back."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from bench.gpu.engine import render, warm
from bench.gpu.setting import PROMPT, Bench, floor
from promptdrop.config import Config
from promptdrop.engines.zimage import ZImageEngine


def flow(bench: Bench) -> dict[str, Any]:
    """Measure images a second through spool and outbox, and by the engine alone before and after.

    Twice as many images as are asked for go through the spool.
    """
    facts = floor(bench)
    settings = bench.config("flow", compile="on", batch=bench.batch)
    engine = warm(settings)  # stays while the daemon has one of its own, and does nothing
    before = back_to_back(engine, bench)
    through = through_the_spool(bench, settings)
    after = back_to_back(engine, bench)
    return {
        **facts,
        **through,
        "batch": bench.batch,
        "back_to_back_images_per_second": [before, after],
        "of_back_to_back": through["images_per_second"] / ((before + after) / 2),
    }


def back_to_back(engine: ZImageEngine, bench: Bench) -> float:
    """Measure images a second of the engine alone, pixels in memory, with a fifth of the images."""
    images = max(bench.batch, bench.images // 5 // bench.batch * bench.batch)
    begin = time.perf_counter()
    render(engine, [bench.spec(seed) for seed in range(images)], bench.batch)
    return images / (time.perf_counter() - begin)


def through_the_spool(bench: Bench, settings: Config) -> dict[str, Any]:
    """Drop one job into the inbox of a warm daemon, and time it.

    The time runs from the start of its first image to the publication of its last.
    """
    assert settings.file is not None
    command, spool = [sys.executable, "-m", "promptdrop"], settings.spool
    subprocess.run([*command, "init", str(bench.home)], check=True, stdout=subprocess.DEVNULL)
    run = [*command, "run", "--config", str(settings.file)]
    with (bench.home / "log").open("w") as log, subprocess.Popen(run, stderr=log) as process:
        try:
            begin = time.monotonic()
            status = spool / ".promptdrop/status.json"
            wait(process, lambda: status.exists() and b'"state": "ready"' in status.read_bytes())
            ready_s = time.monotonic() - begin
            job = {"prompt": PROMPT, "count": 2 * bench.images, "seed": 0}
            hidden = spool / "inbox/.job"
            hidden.write_text(json.dumps(job))
            hidden.rename(spool / "inbox/job.json")
            summary = settings.outbox / "job/job.json"
            wait(process, summary.exists)
        finally:
            process.terminate()
    sidecars = [json.loads(p.read_bytes()) for p in summary.parent.glob("job-*.json")]
    instants = [datetime.fromisoformat(s["time"]["published"]).timestamp() for s in sidecars]
    began = min(datetime.fromisoformat(s["time"]["started"]).timestamp() for s in sidecars)
    last = max(sidecars, key=lambda sidecar: sidecar["time"]["published"])
    return {
        "ready_s": ready_s,  # from the start of the daemon, imports and weights included
        "images_through_the_spool": len(sidecars),
        "images_per_second": len(sidecars) / (max(instants) - began),
        "utilization_percent": last["window"]["utilization_percent"],
        "save_p50_ms": statistics.median(s["latency_ms"]["save"] for s in sidecars),
        "batches": sorted({s["batch"] for s in sidecars}),
    }


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Wait until a condition holds. Raises RuntimeError: the daemon has ended."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the daemon ended with status {process.returncode}")
        time.sleep(0.05)
