"""Measure the engine on this device, in named parts, against the library and the hardware.

    python -m bench.gpu bf16 fp8 text_vae compiles restarts flow batch offload --model DIR \\
        --results bench/gpu.jsonl

Beside each part, in the same run, stands the floor: what the FLOPs of one evaluation would take at the
rate of a large matrix product in the model's dtype; beside the first three the library's own eager
loop, too. Each part appends one line to the results, with hardware, versions and date. DIR: a
checkpoint, or what `python -m bench.random_model DIR` wrote. Without --model it is the demonstration
model, with which every part runs on a CPU too, to check itself:

    python -m bench.gpu batch --size 64x64 --images 4
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch

from bench.gpu.flow import flow
from bench.gpu.parts import batch, bf16, compiles, fp8, offload, restarts, text_vae
from bench.gpu.setting import STEPS, Bench, device, dtype, forget
from promptdrop import __version__, config, weights
from promptdrop.engines.memory import MIB

PARTS = {
    part.__name__: part for part in (bf16, fp8, text_vae, compiles, restarts, flow, batch, offload)
}


def main() -> None:
    """Run the named parts, print each and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", type=Path, default=weights.DEMO)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="of flow and batch: images together")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to append to")
    arguments = parser.parse_args()
    width, height = config.width_height(arguments.size)
    failed = False
    with tempfile.TemporaryDirectory(prefix="promptdrop-bench-") as home:
        model = arguments.model.absolute()
        bench = Bench(model, width, height, arguments.images, arguments.batch, Path(home))
        for name in arguments.parts:
            begin = time.monotonic()
            try:
                figures = PARTS[name](bench)
            except Exception:  # the other parts have figures of their own
                traceback.print_exc()
                failed = True
            else:
                took = round(time.monotonic() - begin, 1)
                report(name, bench, took, figures, arguments.results)
            torch.compiler.reset()
            forget()
    sys.exit(failed)


def report(
    name: str, bench: Bench, took: float, figures: dict[str, Any], file: Path | None
) -> None:
    """Print a part's line, and append it to the results."""
    line = json.dumps({"part": name, **surroundings(bench), "took_s": took, "figures": figures})
    print(line, flush=True)
    if file:
        with file.open("a") as results:
            results.write(f"{line}\n")


def surroundings(bench: Bench) -> dict[str, Any]:
    """The date, hardware and versions of a run."""
    on_gpu = device().type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "device": name,
            "memory_mib": memory and memory // MIB,
            "cpus": os.cpu_count(),
        },
        "versions": {
            "promptdrop": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "model": bench.model.name,
        "dtype": str(dtype()).removeprefix("torch."),
        "size": f"{bench.width}x{bench.height}",
        "steps": STEPS,
        "images": bench.images,
    }


if __name__ == "__main__":
    main()
