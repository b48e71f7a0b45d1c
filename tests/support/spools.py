"""Spools called directly, without a daemon: jobs in them, and images for these."""

import hashlib
import json
from pathlib import Path
from typing import Any

from promptdrop import config
from promptdrop.errors import Problem
from promptdrop.metrics import RollingWindow
from promptdrop.nouns import Latency, Rendering, Request
from promptdrop.outbox.publish import Publication
from promptdrop.spool import claim, ending, record, recovery
from promptdrop.spool.detail import ClaimedSettings, Settled
from promptdrop.spool.job import ImageState, Job, Unresolved
from promptdrop.spool.spool import Spool
from scripted import INFO
from specs import spec

SETTINGS = ClaimedSettings(config.Prompt(), config.Output(), 3, "fail")
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


def init_spool(folder: Path, **keys: Any) -> Spool:
    """A spool in folder/spool with all its folders."""
    spool = make_spool(folder, **keys)
    spool.folders.init()
    return spool


def put(spool: Spool, path: str) -> None:
    """Put SUB/FILE into the inbox."""
    file = spool.paths.inbox / path
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("a\n")


def claimed(spool: Spool, path: str) -> Unresolved:
    """Claim SUB/FILE, which lies in the inbox."""
    sub, _, file = path.rpartition("/")
    return claim.claim(spool, sub, file)


def resolved(spool: Spool, claimed: Unresolved, priority: int = 0, images: int = 1) -> Job:
    """Record that a claimed file asks for so many images."""
    specs = tuple(spec(image=n + 1) for n in range(images))
    settled = Settled(0.0, spool.boot)
    return claim.resolve(spool, claimed, Request(specs, priority), settled, SETTINGS)


def claimed_job(spool: Spool, path: str, priority: int = 0, images: int = 1) -> Job:
    """Drop SUB/FILE, claim and resolve it."""
    put(spool, path)
    return resolved(spool, claimed(spool, path), priority, images)


def finish(spool: Spool, job: Job, *errors: str) -> None:
    """End a job: its first images fail with these errors, the others are rendered."""
    claim.take(job)
    for number in range(1, job.images + 1):
        if number <= len(errors):
            record.fail_image(job, number, errors[number - 1])
        else:
            job.states[number] = ImageState("rendered", f"{job.name}-{number:04d}.png")
    ending.finish(spool, job)


def refuse(spool: Spool, path: str, why: str) -> None:
    """Drop SUB/FILE, claim and refuse it."""
    put(spool, path)
    ending.refuse(spool, claimed(spool, path), [Problem(why)])


def recovered(spool: Spool) -> tuple[list[Job], list[Unresolved]]:
    """Recover a spool on which no disk is sick: the jobs to go on with, and the claims to be read again."""
    left, troubled = recovery.recover(spool)
    assert troubled == []
    jobs = [one for one in left if isinstance(one, Job)]
    return jobs, [one for one in left if isinstance(one, Unresolved)]


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
    """Read the sidecar of an image, and check that it describes the image's bytes."""
    loaded: dict[str, Any] = json.loads(image.with_suffix(".json").read_bytes())
    assert loaded["image"]["file"] == image.name
    assert loaded["image"]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    return loaded
