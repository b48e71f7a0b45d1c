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
from promptdrop.records import (
    HOST,
    VERSION,
    Device,
    LatencyMs,
    Sidecar,
    SidecarImage,
    SidecarJob,
    SidecarModel,
    SidecarPrompt,
    SidecarRequest,
    SidecarTime,
    Window,
    to_bytes,
)
from promptdrop.request.infotext import format_infotext
from promptdrop.spool.job import Job
from promptdrop.spool.record import read_json


@dataclass(slots=True)
class Publication:
    """One image on its way to the outbox. `run` may be called again after trouble with a disk."""

    job: Job
    spec: ImageSpec
    pixels: bytes | mmap.mmap  # buffer of uint8 [height, width, 3]
    rendering: Rendering | None  # None: a placeholder, made because of `error`
    engine: EngineInfo
    attempt: int
    started: float  # the image's first step of work, monotonic seconds
    window: Window
    engine_name: str | None
    error: str | None = None
    _data: bytes | None = field(default=None, init=False)
    _sha256: str = field(default="", init=False)
    _save_ms: float = field(default=0.0, init=False)
    _temporary: Path | None = field(default=None, init=False)
    _recorded: bool = field(default=False, init=False)

    def run(self) -> str:
        """Publish; returns the image's file name. Raises OSError: trouble with a disk, call again."""
        began = time.monotonic()
        if not self._recorded:
            if self._data is None:
                self._data = self._encode()
            folder = self.job.outbox_folder
            fs.make_directories(folder, self._directory_mode, below=self.job.paths.outbox)
            self._sha256 = hashlib.sha256(self._data).hexdigest()
            # Once: state that cannot be written all night must not fill the outbox meanwhile.
            if self._temporary is None or not fs.exists(self._temporary):
                self._temporary = fs.write_temporary(folder, self._data, self._mode)
            self._save_ms += (time.monotonic() - began) * 1e3
            _write_record(self.job, self.spec.image, self._record(self._temporary.name))
            self._recorded = True
        return complete(self.job, self.spec.image)

    def close(self) -> None:
        """Give the memory of the pixels back."""
        if isinstance(self.pixels, mmap.mmap):
            self.pixels.close()

    @property
    def _mode(self) -> int:
        return int(self.job.settings.output.mode, 8)

    @property
    def _directory_mode(self) -> int:
        return int(self.job.settings.output.directory_mode, 8)

    def _encode(self) -> bytes:
        spec, output = self.spec, self.job.settings.output
        text = infotext(spec, self.engine.model) if output.embed_metadata else None
        size = spec.width, spec.height
        with memoryview(self.pixels) as pixels:
            return picture.encode(pixels, *size, spec.format, output.quality, text)

    def _record(self, temporary: str) -> dict[str, Any]:
        record = self._sidecar().model_dump(mode="json")
        return {**record, "temporary": temporary, "error": self.error}

    def _sidecar(self) -> Sidecar:
        job, spec, rendering, data = self.job, self.spec, self.rendering, self._data
        assert spec.seed is not None
        assert data is not None
        latency = rendering.latency_ms if rendering else None
        return Sidecar(
            outcome="rendered" if rendering else "placeholder",
            job=SidecarJob(
                id=job.id,
                name=job.name,
                file=names.printable(job.file),
                image=spec.image,
                images=job.images,
                attempt=self.attempt,
            ),
            image=SidecarImage(
                file=job.stem(spec) + SUFFIX_OF_FORMAT[spec.format],
                format=spec.format,
                width=spec.width,
                height=spec.height,
                bytes=len(data),
                sha256=self._sha256,
            ),
            request=SidecarRequest(
                prompt=spec.prompt,
                negative_prompt=spec.negative_prompt,
                seed=spec.seed,
                width=spec.width,
                height=spec.height,
                steps=spec.steps,
                guidance_scale=spec.guidance_scale,
                scheduler=spec.scheduler,
                meta=spec.meta,
            ),
            prompt=SidecarPrompt(
                text=rendering.prompt if rendering else spec.prompt,
                tokens=rendering.tokens if rendering else None,
                truncated=rendering.truncated if rendering else False,
            ),
            model=SidecarModel(
                id=self.engine.model,
                revision=self.engine.revision,
                dtype=self.engine.dtype,
                quantization=self.engine.quantization,
                compiled=rendering.compiled if rendering else self.engine.compiled,
            ),
            evaluations=rendering.evaluations if rendering else 0,
            batch=rendering.batch if rendering else 1,
            latency_ms=LatencyMs(
                queued=_round(job.settled.milliseconds_to(self.started, clock.boot_id())),
                encode=_round(latency.encode) if latency else None,
                denoise=_round(latency.denoise) if latency else None,
                decode=_round(latency.decode) if latency else None,
                transfer=_round(latency.transfer) if latency else None,
                render=_round(latency.render) if latency else None,
                save=round(self._save_ms, 1),
                total=None,
            ),
            steps_ms=[round(step, 1) for step in rendering.steps_ms] if rendering else [],
            window=self.window,
            device=Device(
                name=self.engine.device,
                engine=self.engine_name,
                host=self.engine.host,
                utilization_percent=rendering.utilization_percent if rendering else None,
                memory_allocated_mib=rendering.memory_allocated_mib if rendering else None,
                memory_reserved_mib=rendering.memory_reserved_mib if rendering else None,
                memory_peak_mib=rendering.memory_peak_mib if rendering else None,
            ),
            time=SidecarTime(
                claimed=job.claimed,
                started=clock.timestamp(time.time() - (time.monotonic() - self.started)),
                published=None,
            ),
            host=HOST,
            version=VERSION,
        )


def complete(job: Job, image: int) -> str:
    """Finish a publication whose record stands. Repeatable; returns the image's file name."""
    path = job.record_path(image, "publishing")
    if not fs.exists(path):  # done but for what comes after the last rename
        record = json.loads(job.record_path(image, "published").read_bytes())
        return _remember(job, image, record)
    record = json.loads(path.read_bytes())
    folder = job.outbox_folder
    began = time.monotonic()
    record = _give_name(job, image, record)
    file = record["image"]["file"]
    sidecar = folder / f"{Path(file).stem}.json"
    if fs.exists(folder / file) and not fs.exists(sidecar):
        record["latency_ms"]["save"] = round(
            record["latency_ms"]["save"] + (time.monotonic() - began) * 1e3, 1
        )
        _write_sidecar(job, record, sidecar)
    os.replace(path, job.record_path(image, "published"))
    return _remember(job, image, record)


def recover(job: Job) -> None:
    """Complete what a crash left half-published, and remove its temporaries."""
    for entry in fs.entries(job.home):
        image, _, kind = entry.name.partition(".")
        if kind == "publishing" and image.isdecimal():
            if read_json(Path(entry.path)):
                complete(job, int(image))
            else:  # torn, by a disk that lied about fsync: the image is rendered again
                fs.remove_file(Path(entry.path))
    if os.path.isdir(job.outbox_folder):
        fs.remove_temporaries(job.outbox_folder)


def infotext(spec: ImageSpec, model: str) -> str:
    """The `parameters` text that image tools read."""
    fields = {
        "Steps": spec.steps,
        "Sampler": _SAMPLERS[spec.scheduler],
        "CFG scale": spec.guidance_scale,
        "Seed": spec.seed,
        "Size": f"{spec.width}x{spec.height}",
        "Model": model,
        "Version": VERSION,
    }
    return format_infotext(spec.prompt, spec.negative_prompt, fields)


_SAMPLERS = {
    "euler": "Euler",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "heun": "Heun",
}


def _remember(job: Job, image: int, record: dict[str, Any]) -> str:
    state, file = job.state(image), str(record["image"]["file"])
    state.outcome, state.file, state.error = record["outcome"], file, record["error"]
    fs.remove_file(job.record_path(image, "begun"))
    return file


def _give_name(job: Job, image: int, record: dict[str, Any]) -> dict[str, Any]:
    """Rename the temporary to its final name, or to NAME~2 where somebody's file stands."""
    folder, file = job.outbox_folder, record["image"]["file"]
    temporary = folder / record["temporary"]
    stem, suffix = names.split(file)
    n = 1
    while fs.exists(temporary):
        sidecar = folder / f"{Path(record['image']['file']).stem}.json"
        try:
            if fs.exists(sidecar):  # of another image, whose format differs: one stem, one sidecar
                raise FileExistsError
            fs.rename(temporary, folder / record["image"]["file"])
        except FileExistsError:
            n += 1
            record["image"]["file"] = names.numbered(stem, suffix, n)
            _write_record(job, image, record)
    if folder.is_dir():
        fs.sync_directory(folder)
    return record


def _write_sidecar(job: Job, record: dict[str, Any], sidecar: Path) -> None:
    now = time.monotonic()
    document = {key: value for key, value in record.items() if key not in ("temporary", "error")}
    document["latency_ms"]["total"] = _round(job.settled.milliseconds_to(now, clock.boot_id()))
    document["time"]["published"] = clock.timestamp()
    mode = int(job.settings.output.mode, 8)
    fs.write_once(sidecar, to_bytes(Sidecar.model_validate(document)), mode)


def _write_record(job: Job, image: int, record: dict[str, Any]) -> None:
    fs.write_durably(job.record_path(image, "publishing"), json.dumps(record).encode())


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
