"""`promptdrop generate`: through the daemon that runs, else through a private one on a spool of its own."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from promptdrop import fs, log, names
from promptdrop.cli import client, terminal
from promptdrop.config import Config
from promptdrop.errors import PromptdropError, RequestError, UsageError
from promptdrop.request import parse
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.supervisor import Supervisor

FORMAT_OF_SUFFIX = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
}


def run(
    settings: Config,
    prompts: list[str],
    fields: dict[str, Any],
    output: Path | None,
    several: bool,
    own_engine: bool,
) -> int:
    """Render prompts, put the images at `output`, print each path and latency.

    Raises UsageError: a field is wrong, or output cannot be used; nothing is rendered.
    """
    data, name = _job(settings, prompts, fields, output), client.name_of_prompt(prompts[0])
    try:
        count = len(parse.parse(data, ".json", settings).images)
    except RequestError as e:
        raise UsageError("; ".join(problem.message for problem in e.problems)) from None
    targets = _Targets(output, several or count > 1)
    spool = Spool(settings)
    if not own_engine and spool.lock.daemon_pid() is not None:
        dropped = client.drop(spool, data, name)
        with terminal.progress_bar() as bar:
            (ended,) = client.wait(spool, [dropped], terminal.Follower(bar))
        return _collect(spool, ended, targets)
    with tempfile.TemporaryDirectory(prefix="promptdrop-") as folder:
        spool, ended = _render_privately(settings, Path(folder), data, name)
        return _collect(spool, ended, targets)


def _job(
    settings: Config, prompts: list[str], fields: dict[str, Any], output: Path | None
) -> bytes:
    """A JSON job file; the ending of a file to write decides the format."""
    job: dict[str, Any] = {"prompts": prompts, **fields}
    suffix = output.suffix.lower() if output else ""
    if suffix in FORMAT_OF_SUFFIX and not (output and output.is_dir()):
        if fields.get("format", FORMAT_OF_SUFFIX[suffix]) != FORMAT_OF_SUFFIX[suffix]:
            raise UsageError(f"--format {fields['format']} does not fit {output}")
        job["format"] = FORMAT_OF_SUFFIX[suffix]
    return json.dumps(job).encode()


class _Targets:
    """Where images go: the one file that was asked for, or new names in a folder."""

    def __init__(self, output: Path | None, several: bool) -> None:
        is_folder = output is None or output.is_dir() or (several and not output.suffix)
        suffix = output.suffix.lower() if output and not is_folder else ""
        if several and not is_folder:
            raise UsageError(f"--output {output}: expected a folder for several images")
        if suffix and suffix not in FORMAT_OF_SUFFIX:
            raise UsageError(f"--output {output}: expected one of {' '.join(FORMAT_OF_SUFFIX)}")
        self._file = None if is_folder else output
        self._folder = output or Path()
        parent = self._file.parent if self._file else self._folder
        parent.mkdir(parents=True, exist_ok=True)

    def put(self, source: Path) -> Path:
        """Copy an image to its place, in one step."""
        if self._file:
            target = self._file if self._file.suffix else self._file.with_suffix(source.suffix)
            with fs.temporary(target.parent, 0o644) as (handle, temporary):
                handle.write(source.read_bytes())
                handle.flush()
                os.replace(temporary, target)
            return target
        n = 1
        while (target := self._folder / names.numbered(source.stem, source.suffix, n)).exists():
            n += 1
        shutil.copyfile(source, target)
        return target


def _render_privately(
    settings: Config, folder: Path, data: bytes, name: str
) -> tuple[Spool, client.Ended]:
    """A daemon of our own that drains one job; the same path as every night's work."""
    private = settings.model_copy(
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
    log.set_up("error", settings.log.format)
    spool = Spool(private)
    spool.folders.init()
    client.drop(spool, data, name)
    with terminal.progress_bar() as bar:
        supervisor = Supervisor(private, drain=True, on_change=bar.show if bar else None)
        status = supervisor.run()
    if supervisor.finished:
        end = supervisor.finished[-1]
        return spool, client.Ended(end.outcome, end.folder, end.error)
    # Interrupted: what is finished is still theirs. Beside the one job's folder lies status.json.
    for entry in fs.entries(spool.paths.outbox):
        if entry.is_dir():
            return spool, client.Ended("interrupted", entry.name, supervisor.ending)
    reason = supervisor.ending or "interrupted before the first image"
    raise PromptdropError(reason, status or 1)


def _collect(spool: Spool, ended: client.Ended, targets: _Targets) -> int:
    for picture, sidecar in client.pictures(spool, ended.folder) if ended.folder else ():
        render, total = sidecar["latency_ms"]["render"], sidecar["latency_ms"]["total"]
        target = targets.put(picture)
        terminal.say(
            f"{target}\trender {render} ms\ttotal {total} ms\tseed {sidecar['request']['seed']}"
        )
    if ended.outcome != "done":
        reason = f": {ended.error}" if ended.error else ""
        print(f"promptdrop: {ended.outcome}{reason}", file=sys.stderr)
    return 0 if ended.outcome == "done" else 1
