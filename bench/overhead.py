"""Measure what the daemon costs: N images from first claim to last job.json, against a bare loop.

Both use the same small model, 256x256, 9 steps, one torch thread, warm. The bare loop is what a
script would be: the library's pipeline, each PNG saved before the next image. They alternate, and
the ratio of each pair is printed. Run on an otherwise idle machine:

    python bench/overhead.py --images 100 --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

BARE_LOOP = """
import sys, time
from pathlib import Path
import torch
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)

def render(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt="a lighthouse on a cliff", width=256, height=256, num_inference_steps=9,
                guidance_scale=0.0, generator=generator).images[0]

render(0)
print("warm", flush=True)
for line in sys.stdin:
    folder = Path(line.strip())
    folder.mkdir()
    begin = time.perf_counter()
    for seed in range(int(sys.argv[2])):
        render(seed).save(folder / f"{seed}.png")
    print(time.perf_counter() - begin, flush=True)
"""


@contextmanager
def bare_loop(model: Path, images: int) -> Iterator[subprocess.Popen[str]]:
    """Start the script; once it is loaded and warm, it waits for folders on stdin."""
    command = [sys.executable, "-c", BARE_LOOP, str(model), str(images)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes) as process:  # type: ignore[call-overload]  # a dict of pipes
        process.stdout.readline()
        yield process
        process.stdin.close()


@contextmanager
def daemon(home: Path, model: Path) -> Iterator[Path]:
    """Start a daemon. Yields its spool once it is loaded and warm."""
    config = home / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(model)},
                "engine": {"warmup": ["256x256"]},
                "defaults": {"width": 256, "height": 256},
            }
        )
    )
    command = [sys.executable, "-m", "promptdrop"]
    subprocess.run([*command, "init", str(home)], check=True, stdout=subprocess.DEVNULL)
    run = [*command, "run", "--config", str(config)]
    with subprocess.Popen(run, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        status = home / "spool" / ".promptdrop" / "status.json"
        while not status.exists() or json.loads(status.read_bytes())["engine"]["state"] != "ready":
            time.sleep(0.1)
        yield home / "spool"
        process.terminate()


def time_daemon(spool: Path, name: str, images: int) -> float:
    """Time one job of so many images, from its claim to its job.json."""
    job = {"prompt": "a lighthouse on a cliff", "count": images, "seed": 0}
    hidden = spool / "inbox" / f".{name}"
    hidden.write_text(json.dumps(job))
    hidden.rename(spool / "inbox" / f"{name}.json")
    summary = spool / "outbox" / name / "job.json"
    while not summary.exists():
        time.sleep(0.05)
    claimed = json.loads(summary.read_bytes())["time"]["claimed"]
    return summary.stat().st_mtime - datetime.fromisoformat(claimed).timestamp()


def main() -> None:
    """Alternate, and print each pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promptdrop-bench-") as folder:
        home, model = Path(folder), Path(folder) / "model"
        subprocess.run(
            [sys.executable, "-m", "promptdrop", "model", "demo", str(model)], check=True
        )
        ratios = []
        with bare_loop(model, arguments.images) as bare, daemon(home, model) as spool:
            for number in range(arguments.rounds):
                print(home / f"bare{number}", file=bare.stdin, flush=True)
                alone = float(bare.stdout.readline() if bare.stdout else "nan")
                ours = time_daemon(spool, f"round{number}", arguments.images)
                ratios.append(ours / alone)
                print(f"bare loop {alone:.2f} s, daemon {ours:.2f} s, ratio {ratios[-1]:.3f}")
        print(f"median ratio of {arguments.rounds} rounds: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
