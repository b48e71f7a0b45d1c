"""Spools called directly, without a daemon: jobs in them, and images for these."""

import hashlib
import json
from pathlib import Path
from typing import Any

from promptdrop import config
from promptdrop.config import Config
from promptdrop.errors import Problem
from promptdrop.metrics import RollingWindow
from promptdrop.nouns import EngineInfo, Latency, Rendering, Request
from promptdrop.outbox.publish import Publication
from promptdrop.spool import claim, ending, record
from promptdrop.spool.detail import ClaimedSettings, Settled
from promptdrop.spool.job import ImageState, Job, Unresolved
from promptdrop.spool.spool import Spool
from specs import spec

SETTINGS = ClaimedSettings(config.Prompt(), config.Output(), 3, "fail")
INFO = EngineInfo("gradient", None, "float32", "none", False, "cpu")
RENDERING = Rendering(
    prompt="a red fox in the snow",
    tokens=6,
    truncated=False,
    evaluations=2,
    latency_ms=Latency(1.0, 20.0, 3.0, 0.5),
    steps_ms=(10.0, 10.0),
)


def make_spool(folder: Path, **keys: Any) -> Spool:
    """A spool in folder/spool, whose folders are not made yet."""
    settings = config.parse({"root": str(folder / "spool"), "model": {"id": "gradient"}, **keys})
    return Spool(settings)


def claimed_job(spool: Spool, path: str, priority: int = 0, images: int = 1) -> Job:
    """Drop SUB/FILE, claim and resolve it."""
    sub, _, file = path.rpartition("/")
    (spool.paths.inbox / sub).mkdir(exist_ok=True, parents=True)
    (spool.paths.inbox / path).write_text("a\n")
    specs = tuple(spec(image=n + 1) for n in range(images))
    claimed = claim.claim(spool, sub, file)
    settled = Settled(0.0, spool.boot)
    return claim.resolve(spool, claimed, Request(specs, priority), settled, SETTINGS)


def publication(job: Job, number: int = 1, **changes: Any) -> Publication:
    """An image of the job that was rendered at its first attempt, not published yet."""
    wanted = job.specs[number - 1]
    made: dict[str, Any] = {
        "job": job,
        "spec": wanted,
        "pixels": bytes([number]) * (wanted.width * wanted.height * 3),
        "rendering": RENDERING,
        "engine": INFO,
        "engine_name": "engine-1",
        "attempt": 1,
        "started": 0.0,
        "window": RollingWindow(10).summary(),
    }
    return Publication(**{**made, **changes})


def files_below(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def sidecar_of(image: Path) -> dict[str, Any]:
    """The sidecar of an image, which is that of these very bytes."""
    loaded: dict[str, Any] = json.loads(image.with_suffix(".json").read_bytes())
    assert loaded["image"]["file"] == image.name
    assert loaded["image"]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    return loaded


def settings(tmp_path: Path, **keys: Any) -> Config:
    """A configuration with its spool in a temporary folder."""
    limits = {"min_free_disk_mib": 0, **keys.pop("limits", {})}
    model = {"id": "gradient", "device": "cpu"}
    return config.parse({"root": str(tmp_path / "spool"), "model": model, "limits": limits, **keys})


def init_spool(tmp_path: Path, **keys: Any) -> Spool:
    """A spool with its folders."""
    spool = Spool(settings(tmp_path, **keys))
    spool.folders.init()
    return spool


def put(spool: Spool, sub: str, file: str) -> None:
    """Put a file into the inbox."""
    (spool.paths.inbox / sub).mkdir(exist_ok=True, parents=True)
    (spool.paths.inbox / sub / file).write_text("a cat\n")


def resolve(spool: Spool, claimed: Unresolved, images: int = 1) -> Job:
    """Record that a claimed file asks for so many images."""
    specs = tuple(spec(image=n + 1) for n in range(images))
    return claim.resolve(spool, claimed, Request(specs), Settled(0.0, spool.boot), SETTINGS)


def job(spool: Spool, sub: str, file: str, images: int = 1) -> Job:
    """Drop a file, claim and resolve it."""
    put(spool, sub, file)
    return resolve(spool, claim.claim(spool, sub, file), images)


def finish(spool: Spool, job: Job, *errors: str) -> None:
    """End a job: its first images fail with these errors, the rest is rendered."""
    claim.take(job)
    for number in range(1, job.images + 1):
        if number <= len(errors):
            record.fail_image(job, number, errors[number - 1])
        else:
            job.states[number] = ImageState("rendered", f"{job.name}-{number:04d}.png")
    ending.finish(spool, job)


def refuse(spool: Spool, sub: str, file: str, why: str) -> None:
    """Drop a file, claim and refuse it."""
    put(spool, sub, file)
    ending.refuse(spool, claim.claim(spool, sub, file), [Problem(why)])
