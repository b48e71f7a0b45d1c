"""A daemon in this process for one job of `generate`, on a spool of its own."""

from pathlib import Path

from promptdrop import log
from promptdrop.cli import client, progress
from promptdrop.config import Config
from promptdrop.errors import PromptdropError
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.supervisor import Supervisor


def render(settings: Config, folder: Path, data: bytes, name: str) -> tuple[Spool, client.Ended]:
    """Drain one job on a spool in `folder`; returns the spool and how the job ended.

    Raises PromptdropError: there is no image, for example because the engine cannot load.
    """
    private = _private(settings, folder)
    log.set_up("error", settings.log.format)
    spool = Spool(private)
    spool.folders.init()
    client.drop(spool, data, name)
    with progress.bar() as bar:
        supervisor = Supervisor(private, drain=True, on_change=bar.show if bar else None)
        status = supervisor.run()
    if supervisor.finished:
        end = supervisor.finished[-1]
        return spool, client.Ended(end.outcome, end.folder, end.error, end.id)
    for job in client.jobs_in_hand(spool):  # interrupted: the finished images are delivered
        return spool, client.Ended("interrupted", job.folder, supervisor.ending, job.id)
    reason = supervisor.ending or "interrupted before the first image"
    raise PromptdropError(reason, status or 1)


def _private(settings: Config, folder: Path) -> Config:
    """Return the configuration on a spool in `folder`, for one job: no settling, warm-up or port."""
    return settings.model_copy(
        update={
            "root": folder / "spool",
            "paths": settings.paths.model_copy(update={"outbox": None, "failed": None}),
            "model": settings.model.model_copy(update={"path": settings.model_path}),
            "watch": settings.watch.model_copy(
                update={"settle_seconds": 0.0, "give_up_seconds": 0.0, "ready_suffix": None}
            ),
            "engine": settings.engine.model_copy(update={"warmup": (), "compile": "off"}),
            "metrics": settings.metrics.model_copy(update={"listen": None}),
        }
    )
