"""`promptdrop doctor`: what would keep this configuration from working, one line each."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from promptdrop import fs, mounts, names, weights
from promptdrop.cluster import backend
from promptdrop.config import Config
from promptdrop.engines import engine
from promptdrop.errors import PromptdropError
from promptdrop.intake.inbox import strangers, watch_mode
from promptdrop.pool import pool
from promptdrop.spool.permissions import describe_permissions, why_not_moved
from promptdrop.spool.spool import Spool

_STRANGERS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    grade: Literal["ok", "note", "bad"]
    what: str
    text: str


def examine(settings: Config) -> Iterator[Finding]:
    """Check everything that can be checked without loading the model."""
    spool = Spool(settings)
    yield from _guarded("configuration", lambda: _configuration(settings))
    yield from _folders(spool)
    if settings.engine.backend == "ray":
        yield from _guarded("cluster", lambda: _cluster(settings))
    else:
        yield from _guarded("model", lambda: _model(settings))
        yield from _guarded("device", lambda: _device(settings))
    yield _daemon(spool)


def _guarded(what: str, check: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield check()
    except PromptdropError as e:
        yield Finding("bad", what, str(e))


def _configuration(settings: Config) -> Finding:
    return Finding("ok", "configuration", f"{settings.file}")


def _folders(spool: Spool) -> Iterator[Finding]:
    folders = {
        "inbox": spool.paths.inbox,
        "state": spool.paths.state,
        "outbox": spool.paths.outbox,
        "failed": spool.paths.failed,
    }
    for what, path in folders.items():
        if not path.is_dir():
            yield Finding(
                "bad",
                what,
                f"{path} is missing; make it with: promptdrop init {spool.paths.root.parent}",
            )
            continue
        yield _folder(what, path, spool.config.limits.min_free_disk_mib)
    if spool.paths.inbox.is_dir():
        yield from _inbox(spool)


def _folder(what: str, path: Path, min_free_mib: int) -> Finding:
    free = mounts.free_mib(path)
    text = f"{path} on {mounts.file_system(path)}, {free:,.0f} MiB free, mode {stat.S_IMODE(path.stat().st_mode):04o}"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding("bad", what, f"{describe_permissions(path)} cannot be read and written")
    if free < min_free_mib:
        return Finding("bad", what, f"{text}; less than limits.min_free_disk_mib: {min_free_mib}")
    return Finding("ok", what, text)


def _inbox(spool: Spool) -> Iterator[Finding]:
    status = spool.paths.inbox.stat()
    if spool.paths.state.is_dir() and status.st_dev != spool.paths.state.stat().st_dev:
        yield Finding(
            "bad",
            "inbox",
            f"{spool.paths.inbox} and {spool.paths.state} are on different file systems; a claim is one rename, so mount the file system on {spool.paths.root} instead",
        )
    for folder, _ in fs.walk(spool.paths.inbox):
        if why := why_not_moved(Path(folder)):
            yield Finding("bad", "inbox", why)
    for what, path in (("outbox", spool.paths.outbox), ("failed", spool.paths.failed)):
        if path.is_dir() and path.stat().st_gid != status.st_gid:
            group = status.st_gid
            yield Finding(
                "note",
                what,
                f"{describe_permissions(path)}: the inbox's group is {group}; "
                f"so that all of it can fetch and delete: chgrp -R {group} {path}",
            )
    watch = spool.config.watch
    how = watch_mode(watch.mode, mounts.file_system(spool.paths.inbox))[1]
    yield Finding("ok", "watch", f"{how}; a look every {watch.rescan_seconds:g} s")
    for n, (stranger, why) in enumerate(strangers(spool.paths.inbox)):
        if n == _STRANGERS_SHOWN:
            yield Finding("note", "inbox", "... and more")
            break
        yield Finding("note", "inbox", f"{names.printable(stranger)}: {why}")


def _model(settings: Config) -> Finding:
    engine.require(settings)
    if settings.model.id in engine.ENGINES:
        return Finding("note", "model", f"{settings.model.id}: no model, for tests and dry runs")
    return Finding("ok", "model", f"{settings.model.id} in {weights.resolve(settings)}")


def _cluster(settings: Config) -> Finding:
    """Models and devices are the hosts' own: they say at loading what is missing."""
    backend.require_ray()
    address = settings.ray.address
    if ":" not in address:
        return Finding(
            "note", "cluster", f"ray.address: {address}: looked for when the daemon starts"
        )
    try:
        backend.knock(address)
    except OSError as e:
        return Finding("bad", "cluster", f"ray.address: {address}: no head answers: {e}")
    return Finding("ok", "cluster", f"{address} answers; its hosts: promptdrop cluster status")


def _device(settings: Config) -> Finding:
    pool.ChildProcesses(settings)  # as many engines as there are GPUs
    wanted, present = settings.model.device, _nvidia_devices()
    if wanted == "cpu" or (wanted == "auto" and not present):
        engine.require_quantization(settings, "cpu", None)
        return Finding(
            "ok" if wanted == "cpu" else "note",
            "device",
            "cpu, float32" + ("" if wanted == "cpu" else ": no NVIDIA GPU was found"),
        )
    index = int(wanted.partition(":")[2] or 0)
    if index >= len(present):
        return Finding(
            "bad",
            "device",
            f"model.device: {wanted}: no such device; found {len(present)} NVIDIA GPUs",
        )
    gpu = present[index]
    engine.require_quantization(settings, gpu.name, gpu.capability)
    free = f"{gpu.free / 2**30:.0f} GiB free"
    return Finding("ok", "device", f"cuda:{index} {gpu.name}, {free}, {settings.model.dtype}")


class _Gpu(NamedTuple):
    name: str
    free: int  # bytes
    capability: tuple[int, int]  # CUDA's


def _nvidia_devices() -> list[_Gpu]:
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            _Gpu(
                pynvml.nvmlDeviceGetName(h),
                pynvml.nvmlDeviceGetMemoryInfo(h).free,
                tuple(pynvml.nvmlDeviceGetCudaComputeCapability(h)),
            )
            for h in handles
        ]
    except pynvml.NVMLError:
        return []


def _daemon(spool: Spool) -> Finding:
    pid = spool.lock.daemon_pid()
    return Finding("ok", "daemon", f"running, pid {pid}" if pid is not None else "not running")
