"""Make one image visible in the outbox: whole, durable, once.

    hidden temporary -> ID/NNNN.publishing -> image renamed -> sidecar -> ID/NNNN.published

The record in the job's folder stands before the image has its name, so after a crash at any point
`recover` completes the same image instead of rendering it again, even if a reader has taken it.
"""

import hashlib
import json
import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptdrop import clock, fs, names, picture
from promptdrop.nouns import SUFFIX_OF_FORMAT, EngineInfo, ImageSpec, Rendering
from promptdrop.outbox import sidecar
from promptdrop.records import (
    HOST,
    VERSION,
    Sidecar,
    SidecarTime,
    Window,
    to_bytes,
)
from promptdrop.request.infotext import SAMPLERS, format_infotext
from promptdrop.spool.job import Job
from promptdrop.spool.paths import parse_image_record
from promptdrop.spool.record import read_json


@dataclass(slots=True, kw_only=True)
class Publication:
    """One image on its way to the outbox. `run` may be called again after trouble with a disk."""

    job: Job
    spec: ImageSpec
    pixels: bytes | mmap.mmap  # uint8 [height, width, 3], RGB
    rendering: Rendering | None  # None for a placeholder, which is made because of `error`
    engine: EngineInfo
    engine_name: str | None
    attempt: int  # counts from 1
    started: float  # the image's first step of work, monotonic seconds
    window: Window
    error: str | None = None
    _data: bytes | None = field(default=None, init=False)
    _sha256: str = field(default="", init=False)
    _save_ms: float = field(default=0.0, init=False)
    _temporary: Path | None = field(default=None, init=False)
    _recorded: bool = field(default=False, init=False)

    def run(self) -> str:
        """Publish; returns the image's file name. Raises OSError: trouble with a disk, call again.

        Thread: publisher.
        """
        if not self._recorded:
            self.prepare()
        return complete(self.job, self.spec.image)

    def prepare(self) -> None:
        """Write the image under a hidden name, then the record from which `complete` goes on.

        Raises OSError: trouble with a disk, call again.

        Thread: publisher.
        """
        began = time.monotonic()
        if self._data is None:
            self._data = self._encode()
        settings, folder = self.job.settings, self.job.outbox_folder
        fs.make_directories(self.job.paths.outbox, self.job.folder, settings.folder_mode)
        self._sha256 = hashlib.sha256(self._data).hexdigest()
        # Once: while the state folder cannot be written, retries must not fill the outbox.
        if self._temporary is None or not fs.exists(self._temporary):
            self._temporary = fs.write_temporary(folder, self._data, settings.file_mode)
        self._save_ms += (time.monotonic() - began) * 1e3
        _write_record(self.job, self.spec.image, self._record(self._temporary.name))
        self._recorded = True

    def close(self) -> None:
        """Give the memory of the pixels back."""
        if isinstance(self.pixels, mmap.mmap):
            self.pixels.close()

    def _encode(self) -> bytes:
        spec, output = self.spec, self.job.settings.output
        text = infotext(spec, self.engine.model) if output.embed_metadata else None
        with memoryview(self.pixels) as pixels:
            return picture.encode(
                pixels, spec.width, spec.height, spec.format, quality=output.quality, infotext=text
            )

    def _record(self, temporary: str) -> dict[str, Any]:
        """Return the record of a publication: its sidecar, and what `complete` needs besides."""
        record = self._sidecar().model_dump(mode="json")
        return {**record, "temporary": temporary, "error": self.error}

    def _sidecar(self) -> Sidecar:
        job, spec, rendering, data = self.job, self.spec, self.rendering, self._data
        assert data is not None
        file = job.stem(spec) + SUFFIX_OF_FORMAT[spec.format]
        started = time.time() - (time.monotonic() - self.started)
        return Sidecar(
            outcome="rendered" if rendering else "placeholder",
            job=sidecar.of_job(job, spec, self.attempt),
            image=sidecar.of_image(spec, file, len(data), self._sha256),
            request=sidecar.of_request(spec),
            prompt=sidecar.of_prompt(spec, rendering),
            model=sidecar.of_model(self.engine, rendering),
            evaluations=rendering.evaluations if rendering else 0,
            batch=rendering.batch if rendering else 1,
            latency_ms=sidecar.latency(job.settled, rendering, self.started, self._save_ms),
            steps_ms=[round(step, 1) for step in rendering.steps_ms] if rendering else [],
            window=self.window,
            device=sidecar.of_device(self.engine, self.engine_name, rendering),
            time=SidecarTime(claimed=job.claimed, started=clock.timestamp(started), published=None),
            host=HOST,
            version=VERSION,
        )


def complete(job: Job, number: int) -> str:
    """Finish a publication whose record is written; returns the image's file name. Repeatable.

    Thread: publisher, clerk.
    """
    publishing = job.record_path(number, "publishing")
    published = job.record_path(number, "published")
    if not fs.exists(publishing):  # renamed to `published` before a crash or error
        return _remember(job, number, json.loads(published.read_bytes()))
    record = json.loads(publishing.read_bytes())
    began = time.monotonic()
    record = _give_name(job, number, record)
    image = job.outbox_folder / record["image"]["file"]
    if fs.exists(image) and not fs.exists(_sidecar_of(image)):
        save_ms = record["latency_ms"]["save"] + (time.monotonic() - began) * 1e3
        record["latency_ms"]["save"] = round(save_ms, 1)
        _write_sidecar(job, record, _sidecar_of(image))
    os.replace(publishing, published)
    return _remember(job, number, record)


def recover(job: Job) -> None:
    """Complete what a crash left half-published, and remove its temporaries.

    Thread: clerk.
    """
    for entry in fs.entries(job.home):
        number, kind = parse_image_record(entry.name) or (0, "")
        if kind == "publishing":
            if read_json(entry.path):
                complete(job, number)
            else:  # torn, by a disk that lied about fsync: the image is rendered again
                fs.remove_file(Path(entry.path))
    if os.path.isdir(job.outbox_folder):
        fs.remove_temporaries(job.outbox_folder)


def infotext(spec: ImageSpec, model: str) -> str:
    """Return the `parameters` text that image tools read."""
    fields = {
        "Steps": spec.steps,
        "Sampler": SAMPLERS[spec.scheduler],
        "CFG scale": spec.guidance_scale,
        "Seed": spec.seed,
        "Size": f"{spec.width}x{spec.height}",
        "Model": model,
        "Version": VERSION,
    }
    return format_infotext(spec.prompt, spec.negative_prompt, fields)


def _remember(job: Job, number: int, record: dict[str, Any]) -> str:
    """Note in memory that the image is published; it is not in hand any more."""
    state, file = job.state(number), str(record["image"]["file"])
    state.outcome, state.file, state.error = record["outcome"], file, record["error"]
    fs.remove_file(job.record_path(number, "begun"))
    return file


def _give_name(job: Job, number: int, record: dict[str, Any]) -> dict[str, Any]:
    """Rename the temporary to its final name, or to NAME~2 where somebody's file stands."""
    folder, file = job.outbox_folder, record["image"]["file"]
    temporary = folder / record["temporary"]
    stem, suffix = names.split(file)
    n = 1
    while fs.exists(temporary):
        image = folder / record["image"]["file"]
        try:
            if fs.exists(
                _sidecar_of(image)
            ):  # that of an image of another format: a stem has one sidecar
                raise FileExistsError
            fs.rename(temporary, image)
        except FileExistsError:
            n += 1
            record["image"]["file"] = names.numbered(stem, suffix, n)
            _write_record(job, number, record)
    if folder.is_dir():
        fs.sync_directory(folder)
    return record


def _sidecar_of(image: Path) -> Path:
    """Return the path NAME.json beside NAME.png."""
    return image.with_name(f"{image.stem}.json")


def _write_sidecar(job: Job, record: dict[str, Any], path: Path) -> None:
    now = time.monotonic()
    document = {key: value for key, value in record.items() if key not in ("temporary", "error")}
    total_ms = job.settled.milliseconds_to(now, clock.boot_id())
    document["latency_ms"]["total"] = sidecar.rounded(total_ms)
    document["time"]["published"] = clock.timestamp()
    fs.write_once(path, to_bytes(Sidecar.model_validate(document)), job.settings.file_mode)


def _write_record(job: Job, number: int, record: dict[str, Any]) -> None:
    path = job.record_path(number, "publishing")
    fs.write_durably(path, json.dumps(record).encode(), job.settings.record_mode)
