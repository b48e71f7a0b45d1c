"""Measure how many engines one daemon feeds: images a second of 1 to 8 engines of fixed render time.

    python -m bench.cluster --engines 1 2 4 8 --seconds 0.7 --backend ray

Each engine takes `--seconds` an image of 1024x1024 (3 MB of pixels) and no processor, as a GPU would.
The ideal is engines / seconds. Beside it, the processor time that an image costs the daemon, the
gateway and the hosts' actors. The figures of one run are written to bench/cluster.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import psutil

import clusters
from harness import Daemon

STEPS = 9
WARM_IMAGES = 2  # an engine, not counted


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=0.7, help="of one render")
    parser.add_argument("--images", type=int, default=24, help="an engine")
    parser.add_argument("--backend", choices=["ray", "process"], default="ray")
    parser.add_argument("--format", choices=["png", "jpeg"], default="png")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("cluster.json"))
    given = parser.parse_args()
    rows = [measure(engines, given) for engines in given.engines]
    kinds = list(rows[0]["cpu_ms"])
    print("engines  images/s  ideal  share  " + "  ".join(f"{kind} ms" for kind in kinds))
    for row in rows:
        costs = "  ".join(f"{row['cpu_ms'][kind]:>{len(kind) + 3}.1f}" for kind in kinds)
        print(
            f"{row['engines']:>7}  {row['rate']:>8.3f}  {row['ideal']:>5.2f}  {row['share']:>5.1%}  {costs}"
        )
    results = json.loads(given.results.read_text()) if given.results.exists() else []
    results.append({
        "date": date.today().isoformat(), "cores": os.cpu_count(), "python": platform.python_version(),
        "load": os.getloadavg()[0], "backend": given.backend, "format": given.format,
        "size": given.size, "seconds": given.seconds, "images_per_engine": given.images, "rows": rows,
    })  # fmt: skip
    given.results.write_text(json.dumps(results, indent=1) + "\n")


def measure(engines: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one daemon with so many engines, from the first image after warming up to the last."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-bench-")))
        changes: dict[str, Any] = {
            "model": {"device": "cpu"},
            "engine": {"workers": engines, "backend": given.backend},
            "defaults": {"width": given.size, "height": given.size, "steps": STEPS},
            "output": {"format": given.format},
        }
        if given.backend == "ray":
            cluster = stack.enter_context(clusters.running())
            cluster.add_host(cores=engines)
            changes["ray"] = {"address": cluster.address}
        daemon = Daemon(home, changes)
        stack.callback(daemon.kill)
        daemon.start()
        daemon.until_log("engine.ready", times=engines)
        prompt = f"!slow {given.seconds / STEPS} a cat"
        images = engines * (WARM_IMAGES + given.images)
        daemon.drop("a.yaml", f"prompt: '{prompt}'\ncount: {images}\n")
        first = until_published(daemon, engines * WARM_IMAGES)
        before = cpu_seconds(daemon)
        last = until_published(daemon, images)
        after = cpu_seconds(daemon)
    counted = images - engines * WARM_IMAGES
    rate, ideal = counted / (last - first), engines / given.seconds
    return {
        "engines": engines,
        "rate": rate,
        "ideal": ideal,
        "share": rate / ideal,
        "cpu_ms": {kind: (after[kind] - before.get(kind, 0)) / counted * 1e3 for kind in after},
    }


def until_published(daemon: Daemon, images: int) -> float:
    """Wait for the n-th published image. Returns its moment, by the log's clock."""
    while len(times := published(daemon)) < images:
        time.sleep(0.1)
    return times[images - 1]


def published(daemon: Daemon) -> list[float]:
    """The moment at which each image was published, in seconds."""
    from datetime import datetime

    return [
        datetime.fromisoformat(line["timestamp"]).timestamp()
        for line in daemon.log("image.published")
    ]


def cpu_seconds(daemon: Daemon) -> dict[str, float]:
    """Processor time of the daemon, its gateway, the hosts' actors and their engines, so far."""
    assert daemon.process
    used: dict[str, float] = defaultdict(float)
    for process in psutil.process_iter(["pid", "cmdline", "cpu_times", "ppid"]):
        command = " ".join(process.info["cmdline"] or ())
        times = process.info["cpu_times"]
        if process.info["pid"] == daemon.process.pid:
            used["daemon"] += times.user + times.system
        elif "promptdrop.cluster.gateway" in command:
            used["gateway"] += times.user + times.system
        elif command.startswith("ray::HostActor"):
            used["actors"] += times.user + times.system
        elif "promptdrop.engines.worker" in command:
            used["engines"] += times.user + times.system
        elif "/raylet/raylet" in command or "gcs_server" in command:
            used["ray"] += times.user + times.system
    return used


if __name__ == "__main__":
    main()
