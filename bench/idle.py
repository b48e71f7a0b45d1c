"""Measure what a daemon costs while nothing happens, and how soon it takes a drop, by default settings.

    python bench/idle.py --seconds 60

Prints the parent's CPU share over the idle time, its resident memory at idle and after 200 images of
1024x1024 (gradient engine), and the time from a rename into the inbox to the claim, settle_seconds
being 1.0.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml


def drop(inbox: Path, name: str, text: str) -> float:
    """Rename a file into the inbox. Returns the moment."""
    hidden = inbox.parent / name
    hidden.write_text(text)
    hidden.rename(inbox / name)
    return time.monotonic()


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    while not path.exists():
        time.sleep(0.002)


def pick_up_seconds(spool: Path, name: str) -> float:
    """Time a drop from the rename into the inbox to the claim, which renames it out."""
    began = drop(spool / "inbox", name, "a cat\n")
    while (spool / "inbox" / name).exists():
        time.sleep(0.002)
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="promptdrop-bench-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump({"model": {"id": "gradient"}, "engine": {"warmup": []}}))
        command = [sys.executable, "-m", "promptdrop"]
        subprocess.run([*command, "init", folder], check=True, stdout=subprocess.DEVNULL)
        run = [*command, "run", "--config", str(config)]
        with subprocess.Popen(run, stderr=subprocess.DEVNULL) as process:
            spool, parent = Path(folder) / "spool", psutil.Process(process.pid)
            drop(spool / "inbox", "warm.txt", "a cat\n")
            wait_for(spool / "outbox" / "warm" / "job.json")
            time.sleep(2)
            before = sum(parent.cpu_times()[:2])
            time.sleep(seconds)
            share = (sum(parent.cpu_times()[:2]) - before) / seconds
            print(
                f"idle: {share:.3%} of a core over {seconds:g} s, {_mib(parent):.1f} MiB resident"
            )
            times = [pick_up_seconds(spool, f"pick{n}.txt") for n in range(5)]
            print("pick-up after a rename:", ", ".join(f"{t:.3f} s" for t in times))
            drop(spool / "inbox", "many.yaml", "prompt: a cat\ncount: 200\n")
            wait_for(spool / "outbox" / "many" / "job.json")
            print(f"after 200 images of 1024x1024: {_mib(parent):.1f} MiB resident")
            process.terminate()


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


if __name__ == "__main__":
    main()
