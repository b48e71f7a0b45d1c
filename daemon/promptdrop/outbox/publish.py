"""Make one image visible in the outbox: whole, durable, once.

    hidden temporary -> ID/NNNN.publishing -> image renamed -> sidecar -> ID/NNNN.published

All of it happens in one folder, which is held open: readers may move or delete it meanwhile. An image
counts as published once it and its sidecar stood there together; what did not is published again. The
record in the job's folder stands before the image has its name, so after a crash at any point `recover`
completes the same image instead of rendering it again, if it still lies there.
"""

import errno
import hashlib
import json
import mmap
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptdrop import clock, fs, names, picture
from promptdrop.nouns import SUFFIX_OF_FORMAT, EngineInfo, ImageSpec, Rendering
from promptdrop.outbox import sidecar
from promptdrop.records import (
    HOST,
    SIDECAR_BYTES,
    VERSION,
    Sidecar,
    SidecarTime,
    Window,
    to_bytes,
)
from promptdrop.request.infotext import SAMPLERS, format_infotext
from promptdrop.spool.job import Job
from promptdrop.spool.outbox import FolderLost, Outbox
from promptdrop.spool.paths import parse_image_record
from promptdrop.spool.record import read_json, read_publication


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
    losses: int = (
        0  # how often readers took the job's folder, or the image, before it was published
    )
    _data: bytes | None = field(default=None, init=False)
    _sha256: str = field(default="", init=False)
    _save_ms: float = field(default=0.0, init=False)
    _temporary: str = field(default="", init=False)  # its name in the job's folder
    _stood: bool = field(default=False, init=False)  # its sidecar has stood beside it

    def run(self, outbox: Outbox) -> str:
        """Publish; returns the image's file name. Call again after an error.

        Raises FolderLost: readers took the folder, or the image before its sidecar was there; the job needs
        a folder (`Outbox.renew`). OSError: trouble with a disk.

        Thread: publisher.
        """
        if self._stood:
            self._flush(outbox)
        else:
            self._stand(outbox)
        return _note(self.job, self.spec.image)

    def _stand(self, outbox: Outbox) -> None:
        """Have image and sidecar stand together in the job's folder. Raises FolderLost, OSError."""
        with outbox.folder(self.job) as folder:
            try:
                if not stands(self.job, self.spec.image, folder):
                    self.prepare(folder)
                _stand_together(self.job, self.spec.image, folder, self._has_stood)
            except BaseException as e:
                is_lost = isinstance(e, FileNotFoundError) and _is_below(folder, e)
                if self._stood and is_lost:
                    return  # taken, or its folder removed, since
                if not self._stood:
                    with suppress(OSError):  # the folder is gone, or its disk is sick
                        self._take_back(folder)
                if is_lost:
                    raise FolderLost(self.job.outbox_folder) from e
                raise

    def _has_stood(self) -> None:
        """Note that readers may take it from now on, so that it does not come again."""
        self._stood = True

    def _flush(self, outbox: Outbox) -> None:
        """Flush the folder in which it stood, if that is still there: the last try could not."""
        with suppress(FolderLost, FileNotFoundError), outbox.folder(self.job) as folder:
            fs.sync_directory(folder)

    def _take_back(self, folder: Path) -> None:
        """Remove an image that has no sidecar: its folder may be taken away before the next try."""
        if self._temporary:
            fs.remove_file(folder / self._temporary)
        record = _read_record(self.job, self.spec.image)
        if record and not _has_sidecar(self.job, self.spec.image, folder, record):
            image = folder / record["image"]["file"]
            if _is_whole(image, record):
                fs.remove_file(image)

    def prepare(self, folder: Path) -> None:
        """Write the image under a hidden name, then the record from which `complete` goes on.

        Thread: publisher.
        """
        began = time.monotonic()
        if self._data is None:
            self._data = self._encode()
            self._sha256 = hashlib.sha256(self._data).hexdigest()
            self.close()
        # Once: where it cannot be removed, retries must not fill the outbox.
        if not (self._temporary and fs.exists(folder / self._temporary)):
            mode = self.job.settings.file_mode
            self._temporary = fs.write_temporary(folder, self._data, mode).name
        self._save_ms += (time.monotonic() - began) * 1e3
        _write_record(self.job, self.spec.image, self._record(self._temporary))

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


def stands(job: Job, number: int, folder: Path) -> bool:
    """Whether a publication is recorded, and its image or sidecar lies in this folder: `complete` can go on.

    Thread: publisher, clerk.
    """
    record = _read_record(job, number)
    if record is None:
        return read_publication(job, number, "published") is not None
    image = folder / record["image"]["file"]
    is_there = fs.exists(folder / record["temporary"]) or _is_whole(image, record)
    return is_there or _is_sidecar_of(job, number, _sidecar_of(image))


def complete(job: Job, number: int, folder: Path) -> str:
    """Finish a publication that `stands`; returns the image's file name. Repeatable.

    Raises FileNotFoundError: the image was taken before its sidecar was there.

    Thread: publisher, clerk.
    """
    _stand_together(job, number, folder, lambda: None)
    return _note(job, number)


def _stand_together(job: Job, number: int, folder: Path, stood: Callable[[], None]) -> None:
    """Give the image its name and put its sidecar beside it, unless they have stood together.

    stood: called in the moment in which they do.
    """
    record = _read_record(job, number)
    if record is None or _has_sidecar(job, number, folder, record):
        return stood()
    began = time.monotonic()
    while True:
        record = _give_name(job, number, folder, record)
        save_ms = record["latency_ms"]["save"] + (time.monotonic() - began) * 1e3
        latency_ms = {**record["latency_ms"], "save": round(save_ms, 1)}
        try:
            return _write_sidecar(job, {**record, "latency_ms": latency_ms}, folder, stood)
        except FileExistsError:  # a stranger was faster: the image gets the next name
            fs.rename(folder / record["image"]["file"], folder / record["temporary"])


def _note(job: Job, number: int) -> str:
    """Record that an image is published, and note it in memory; returns its file name."""
    publishing = job.record_path(number, "publishing")
    if fs.exists(publishing):  # else it was renamed before a crash or error
        os.replace(publishing, job.record_path(number, "published"))
    record = read_publication(job, number, "published")
    if record is None:
        path = job.record_path(number, "published")
        raise OSError(errno.EIO, "is not what was written", str(path))
    state, file = job.state(number), str(record["image"]["file"])
    state.outcome, state.file, state.error = record["outcome"], file, record["error"]
    fs.remove_file(job.record_path(number, "begun"))  # it is not in hand any more
    return file


def recover(job: Job, outbox: Outbox) -> None:
    """Complete what a crash left half-published, and remove its temporaries.

    What does not lie in the job's folder any more is to be rendered again.

    Thread: clerk.
    """
    numbers = [known[0] for known in _records_of(job) if known[1] == "publishing"]
    try:
        with outbox.folder(job) as folder:
            for number in numbers:
                if stands(job, number, folder):
                    complete(job, number, folder)
                else:
                    fs.remove_file(job.record_path(number, "publishing"))
            fs.remove_temporaries(folder)
    except FolderLost:
        for number in numbers:
            fs.remove_file(job.record_path(number, "publishing"))


def _is_below(folder: Path, error: OSError) -> bool:
    """Whether what an error is about lies in this folder, and not among our own records."""
    return str(error.filename).startswith(f"{folder}/") or str(error.filename) == str(folder)


def _records_of(job: Job) -> list[tuple[int, str]]:
    found = (parse_image_record(entry.name) for entry in fs.entries(job.home))
    return [known for known in found if known]


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


def _has_sidecar(job: Job, number: int, folder: Path, record: dict[str, Any]) -> bool:
    """Whether the image's sidecar stands: the image was there, too, even if it was taken since."""
    return _is_sidecar_of(job, number, _sidecar_of(folder / record["image"]["file"]))


def _give_name(job: Job, number: int, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Rename the temporary to its final name, or to NAME~2 where somebody's file stands.

    Raises FileNotFoundError: somebody took it.
    """
    temporary = folder / record["temporary"]
    stem, suffix = names.split(record["image"]["file"])
    n = 1
    while fs.exists(temporary):
        image = folder / record["image"]["file"]
        try:
            # A stem has one sidecar: one that stands is that of an image of another format, or a stranger's.
            if fs.exists(_sidecar_of(image)):
                raise FileExistsError
            fs.rename(temporary, image)
        except FileExistsError:
            n += 1
            record["image"]["file"] = names.numbered(stem, suffix, n)
            _write_record(job, number, record)
    fs.sync_directory(folder)
    return record


def _is_whole(image: Path, record: dict[str, Any]) -> bool:
    """Whether an image that lies there under the recorded name can be the recorded one."""
    status = fs.status_of(image)
    if status is None or not stat.S_ISREG(status.st_mode):
        return False
    return bool(status.st_size == record["image"]["bytes"])


def _is_sidecar_of(job: Job, number: int, path: Path) -> bool:
    """Whether this is the sidecar of this image of this job; what is closed to us is not."""
    try:
        document = read_json(path, SIDECAR_BYTES)
    except PermissionError:
        return False
    owner = document.get("job")
    return isinstance(owner, dict) and (owner.get("id"), owner.get("image")) == (job.id, number)


def _sidecar_of(image: Path) -> Path:
    """Return the path NAME.json beside NAME.png."""
    return image.with_name(f"{image.stem}.json")


def _write_sidecar(
    job: Job, record: dict[str, Any], folder: Path, stood: Callable[[], None]
) -> None:
    """Write the sidecar beside its image.

    Raises FileNotFoundError: the image is gone, so that they would never stand together.
    FileExistsError: somebody's file has the sidecar's name.
    """
    now = time.monotonic()
    document = {key: value for key, value in record.items() if key not in ("temporary", "error")}
    total_ms = job.settled.milliseconds_to(now, clock.boot_id())
    document["latency_ms"]["total"] = sidecar.rounded(total_ms)
    document["time"]["published"] = clock.timestamp()
    image = folder / record["image"]["file"]
    path = _sidecar_of(image)
    with fs.temporary(folder, job.settings.file_mode) as (file, name):
        file.write(to_bytes(Sidecar.model_validate(document)))
        fs.sync(file)
        os.lstat(image)  # just before: from the next call on a reader may take both
        fs.rename(name, path)
        stood()
    fs.sync_directory(folder)


def _read_record(job: Job, number: int) -> dict[str, Any] | None:
    """Read what is to be published; None if nothing is, or the record is torn: it is rendered again."""
    return read_publication(job, number, "publishing")


def _write_record(job: Job, number: int, record: dict[str, Any]) -> None:
    path = job.record_path(number, "publishing")
    fs.write_durably(path, json.dumps(record).encode(), job.settings.record_mode)
