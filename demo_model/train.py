"""Train the demonstration model from nothing: VAE, then text encoder, then transformer.

usage: python -m demo_model.train [--work DIR] [--out CHECKPOINT]
Run it again with the same --work and it goes on: a finished VAE and text encoder are kept, and the
last stage resumes from its last saved step.
"""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from . import model
from .data import Prompts
from .evaluate import add_evaluation, as_table, evaluate, load
from .flow import flow_stage
from .plan import Log, Plan
from .vae import vae_stage
from .words import words_stage


def train(plan: Plan) -> None:
    """All stages and the evaluation; writes the checkpoint, and RESULTS.json beside it."""
    plan.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader's workers are processes already
    log = Log(plan.work / "log.json")
    log.entries["sittings"] += 1
    log.write()
    vae = vae_stage(plan, log)
    prompts = Prompts(model.build_tokenizer())
    text_encoder = words_stage(prompts, plan, log)
    flow_stage(prompts, text_encoder, vae, plan, log)
    results = plan.out.parent / "RESULTS.json"
    results.write_text(json.dumps(run_facts(plan) | log.entries, indent=1) + "\n")
    if not plan.eval_prompts:
        return
    figures = evaluate(load(plan.out, torch.bfloat16, plan.device), plan.eval_prompts)
    add_evaluation(results, figures)
    print(as_table(figures))


def run_facts(plan: Plan) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor()
    return {
        "hardware": f"one {gpu}, {os.cpu_count()} CPU cores",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "plan": {k: v for k, v in vars(plan).items() if isinstance(v, (str, int))},
    }


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=here / "work", help="state to resume from")
    parser.add_argument("--out", type=Path, default=here / "checkpoint")
    for name in ("device", "seed", "vae_steps", "vae_pixels", "words_steps", "words_prompts"):
        add_option(parser, name)
    for name in ("flow_steps", "flow_tokens", "workers", "eval_prompts"):
        add_option(parser, name)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(Plan(**vars(parser.parse_args())))


def add_option(parser: argparse.ArgumentParser, name: str) -> None:
    """An option whose type and default are the plan's."""
    default = getattr(Plan, name)
    parser.add_argument(
        f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}"
    )


if __name__ == "__main__":
    main()
