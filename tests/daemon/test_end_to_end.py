"""The main job on a real ZImagePipeline: a dropped file becomes images and sidecars."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness import Daemon

ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# The keys of the contract's example, section 4.
SIDECAR: dict[str, Any] = {
    "schema": "promptdrop.image/1",
    "outcome": "rendered",
    "job": {"id", "name", "file", "image", "images", "attempt"},
    "image": {"file", "format", "width", "height", "bytes", "sha256"},
    "request": {
        "prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance_scale",
        "scheduler", "meta",
    },
    "prompt": {"text", "tokens", "truncated"},
    "model": {"id", "revision", "dtype", "quantization", "compiled"},
    "evaluations": 3,
    "batch": 1,
    "latency_ms": {"queued", "encode", "denoise", "decode", "transfer", "render", "save", "total"},
    "steps_ms": list,
    "window": {
        "images", "p50_ms", "p95_ms", "p99_ms", "images_per_second", "utilization_percent",
    },
    "device": {
        "name", "engine", "host", "utilization_percent", "memory_allocated_mib",
        "memory_reserved_mib", "memory_peak_mib",
    },
    "time": {"claimed", "started", "published"},
    "host": str,
    "version": str,
}  # fmt: skip


@pytest.fixture
def real(make_daemon: Callable[..., Daemon], model: Path) -> Daemon:
    """A daemon on the small real checkpoint."""
    daemon = make_daemon()
    daemon.write_config({"model": {"path": str(model)}})
    settings = {**daemon.settings, "model": {"path": str(model)}}
    daemon.settings = settings
    daemon.write_config()
    return daemon


def library_pixels(model: Path, prompt: str, seed: int, out: Path) -> bytes:
    """The pixels that diffusers renders on a CPU, in a process with the daemon's number of threads."""
    code = f"""
import torch
from diffusers import ZImagePipeline
pipe = ZImagePipeline.from_pretrained({str(model)!r}, dtype=torch.float32, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
pipe(prompt={prompt!r}, height=64, width=96, num_inference_steps=3, guidance_scale=0.0,
     generator=torch.Generator().manual_seed({seed})).images[0].save({str(out)!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, **ONE_THREAD})  # fmt: skip
    with Image.open(out) as picture:
        return picture.tobytes()


@pytest.mark.timeout(300)
def test_a_dropped_file_becomes_the_librarys_own_pixels(real: Daemon, model: Path) -> None:
    """The daemon keeps section 7 of the contract, and its sidecar has every key of section 4.

    On a CPU: a GPU's kernels round differently for texts that are padded and texts that are not.
    """
    real.write_config({"model": {"device": "cpu"}})
    data = json.dumps({"prompt": "a red fox, 雪", "seed": 7, "size": "96x64", "meta": {"a": [1]}})
    real.drop("fox.json", data)
    done = subprocess.run(
        real.command("run", "--drain"),
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    folder = real.outbox / "fox"

    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "fox-0001.json", "fox-0001.png", "job.json", "request.json",
    ]  # fmt: skip
    assert (folder / "request.json").read_text() == data
    with Image.open(folder / "fox-0001.png") as picture:
        pixels, parameters = picture.tobytes(), picture.info["parameters"]
    assert pixels == library_pixels(model, "a red fox, 雪", 7, real.home / "own.png")
    assert parameters.startswith("a red fox, 雪\nSteps: 3, Sampler: Euler, ")
    sidecar = real.sidecars("fox")[0]
    for key, expected in SIDECAR.items():
        if isinstance(expected, set):
            assert set(sidecar[key]) == expected, key
        elif isinstance(expected, type):
            assert isinstance(sidecar[key], expected), key
        else:
            assert sidecar[key] == expected, key
    assert set(sidecar) == set(SIDECAR)
    assert sidecar["request"]["meta"] == {"a": [1]}
    whole = (folder / "fox-0001.png").read_bytes()
    assert sidecar["image"]["sha256"] == hashlib.sha256(whole).hexdigest()
    assert sidecar["image"]["bytes"] == len(whole)
    latency = sidecar["latency_ms"]
    parts = latency["encode"] + latency["denoise"] + latency["decode"] + latency["transfer"]
    assert latency["render"] == pytest.approx(parts, abs=0.3)
    assert latency["total"] >= latency["queued"] + latency["render"]
    assert len(sidecar["steps_ms"]) == 3
    summary = real.job("fox")
    assert (summary["schema"], summary["outcome"]) == ("promptdrop.job/1", "done")
    assert summary["totals"]["rendered"] == 1


@pytest.mark.timeout(300)
def test_the_engine_for_scripts(model: Path) -> None:
    """`promptdrop.Engine(config).generate(...)` is the same engine."""
    code = f"""
import promptdrop
engine = promptdrop.Engine({{"model": {{"path": {str(model)!r}}}}})
one = engine.generate("a cat", size="64x64", steps=2, seed=3)
several = engine.generate("a cat", size="64x64", steps=2, seed=[3, 4])
print(one.image.size, one.seed, one.image.tobytes() == several[0].image.tobytes(), len(several))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout == "(64, 64) 3 True 2\n", done.stderr


@pytest.mark.timeout(300)
def test_generate_without_a_daemon(real: Daemon) -> None:
    """It renders one image on an engine of its own; the file's ending decides the format."""
    target = real.home / "fox.jpg"
    done = real.run("generate", "a fox", "-o", str(target), "--size", "64x64", timeout=120)

    assert done.returncode == 0, done.stderr
    with Image.open(target) as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 64))
    assert str(target) in done.stdout
    assert "render" in done.stdout
    assert real.tree() == []


def test_a_missing_model_is_named_with_its_cure(daemon: Daemon) -> None:
    """The exit status is 78; the id and the command that fetches it are named, without torch."""
    daemon.write_config({"model": {"id": "nobody/nothing"}})
    done = daemon.run("run")

    assert done.returncode == 78
    assert "promptdrop model fetch nobody/nothing" in done.stderr


@pytest.mark.timeout(300)
def test_fp8_on_a_cpu_is_a_wrong_configuration(daemon: Daemon, model: Path) -> None:
    """The exit status is 78, so that systemd does not try again. `doctor` says it, too, without torch."""
    daemon.run("init", str(daemon.home))
    daemon.write_config(
        {
            "model": {"id": "tiny", "path": str(model), "device": "cpu"},
            "engine": {"quantization": "fp8"},
        }
    )
    doctor, done = daemon.run("doctor"), daemon.run("run", timeout=120)

    assert done.returncode == 78
    assert doctor.returncode == 1
    for output in (doctor.stdout, done.stderr):
        assert "engine.quantization: fp8: the CPU does not multiply fp8; expected" in output


def test_an_incomplete_model_names_each_file(daemon: Daemon, model: Path, tmp_path: Path) -> None:
    """A snapshot that lacks files is found out before anything is loaded."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(model), str(copy)], check=True)
    (copy / "vae" / "config.json").unlink()
    daemon.write_config({"model": {"id": "copy", "path": str(copy)}})
    done = daemon.run("run")

    assert done.returncode == 78
    assert "vae/config.json" in done.stderr
