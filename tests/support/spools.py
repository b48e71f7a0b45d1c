"""A spool without a daemon: tests do to it what one would, with the spool's own functions."""

from pathlib import Path
from typing import Any

from promptdrop import config
from promptdrop.config import Config
from promptdrop.errors import Problem
from promptdrop.nouns import Request
from promptdrop.spool import claim, ending, record
from promptdrop.spool.detail import ClaimedSettings, Settled
from promptdrop.spool.job import ImageState, Job, Unresolved
from promptdrop.spool.spool import Spool
from specs import spec

SETTINGS = ClaimedSettings(config.Prompt(), config.Output(), 3, "fail")


def settings(tmp_path: Path, **keys: Any) -> Config:
    """A configuration with its spool in a temporary folder."""
    limits = {"min_free_disk_mib": 0, **keys.pop("limits", {})}
    model = {"id": "gradient", "device": "cpu"}
    return config.parse({"root": str(tmp_path / "spool"), "model": model, "limits": limits, **keys})


def make_spool(tmp_path: Path, **keys: Any) -> Spool:
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
