"""The checks of `promptdrop doctor`, one function each; none of them loads the model."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from promptdrop import fs, mounts, names, weights
from promptdrop.cluster import backend
from promptdrop.config import Config
from promptdrop.engines import engine
from promptdrop.errors import PromptdropError
from promptdrop.intake.files import strangers
from promptdrop.intake.watcher import watch_mode
from promptdrop.pool import pool
from promptdrop.spool.paths import STATES
from promptdrop.spool.permissions import describe_permissions, why_not_moved
from promptdrop.spool.spool import Spool

_STRANGERS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    grade: Literal["ok", "note", "bad"]
    what: str
    text: str


Check = Callable[[Spool], Iterator[Finding]]


def examine(settings: Config) -> Iterator[Finding]:
    """Make every check of this configuration. An error that a check raises is a bad finding."""
    spool = Spool(settings)
    for what, check in _checks(spool):
        try:
            yield from check(spool)
        except (PromptdropError, OSError) as e:
            yield Finding("bad", what, str(e))


def _checks(spool: Spool) -> Iterator[tuple[str, Check]]:
    """Yield the checks in the order of the report, each with the name of what it looks at."""
    yield "configuration", check_configuration
    yield "folders", check_folders
    if spool.paths.state.is_dir():
        yield "state", check_records
    if spool.paths.inbox.is_dir():
        yield "inbox", check_file_system
        yield "inbox", check_claims
        yield "inbox", check_groups
        yield "watch", check_watch
        yield "inbox", check_strangers
    if spool.config.engine.backend == "ray":
        yield "cluster", check_cluster
    else:
        yield "model", check_model
        yield "device", check_device
    yield "daemon", check_daemon


def check_configuration(spool: Spool) -> Iterator[Finding]:
    """Name the configuration file; it is valid, since it was loaded."""
    yield Finding("ok", "configuration", f"{spool.config.file}")


def check_folders(spool: Spool) -> Iterator[Finding]:
    """Check that each of the four folders is there, can be read and written, and has enough space."""
    folders = {
        "inbox": spool.paths.inbox,
        "state": spool.paths.state,
        "outbox": spool.paths.outbox,
        "failed": spool.paths.failed,
    }
    for what, path in folders.items():
        if path.is_dir():
            yield _folder(what, path, spool.config.limits.min_free_disk_mib)
        else:
            home = spool.paths.root.parent
            text = f"{path} is missing; make it with: promptdrop init {home}"
            yield Finding("bad", what, text)


def _folder(what: str, path: Path, min_free_mib: int) -> Finding:
    free, mode = mounts.free_mib(path), stat.S_IMODE(path.stat().st_mode)
    text = f"{path} on {mounts.file_system(path)}, {free:,.0f} MiB free, mode {mode:04o}"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding("bad", what, f"{describe_permissions(path)} cannot be read and written")
    if free < min_free_mib:
        return Finding("bad", what, f"{text}; less than limits.min_free_disk_mib: {min_free_mib}")
    return Finding("ok", what, text)


def check_records(spool: Spool) -> Iterator[Finding]:
    """Name the first 20 folders among our jobs that are not ours, whose records nobody believes."""
    state, trust = spool.paths.state, spool.paths.trust
    mode = stat.S_IMODE(state.stat().st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        trust.asks_modes = False
        text = f"{state} can be written by others (mode {mode:04o}): the daemon ends that at its start, unless"
        yield Finding("note", "state", f"{text} this is a share that gives each file one mode")
    not_ours = (
        (home, why) for home in spool.paths.homes(*STATES) if (why := trust.why_not(os.lstat(home)))
    )
    for home, why in islice(not_ours, _STRANGERS_SHOWN):
        cure = f"chown -R {state.stat().st_uid} {home} && chmod -R go-w {home}"
        text = f"{home} is not ours and is left alone: {why}; remove it, or if you made it: {cure}"
        yield Finding("bad", "state", text)


def check_file_system(spool: Spool) -> Iterator[Finding]:
    """Check that inbox and state folder are on one file system."""
    if (
        spool.paths.state.is_dir()
        and spool.paths.inbox.stat().st_dev != spool.paths.state.stat().st_dev
    ):
        text = (
            f"{spool.paths.inbox} and {spool.paths.state} are on different file systems; a claim is one rename, "
            f"so mount the file system on {spool.paths.root} instead"
        )
        yield Finding("bad", "inbox", text)


def check_claims(spool: Spool) -> Iterator[Finding]:
    """Check that files can be moved out of the inbox and each of its sub-folders."""
    for sub, _ in fs.walk(spool.paths.inbox):
        if why := why_not_moved(spool.paths.inbox / sub):
            yield Finding("bad", "inbox", why)


def check_groups(spool: Spool) -> Iterator[Finding]:
    """Check that outbox and failed belong to the inbox's group, whose members fetch and delete."""
    group = spool.paths.inbox.stat().st_gid
    for what, path in (("outbox", spool.paths.outbox), ("failed", spool.paths.failed)):
        if path.is_dir() and path.stat().st_gid != group:
            text = (
                f"{describe_permissions(path)}: the inbox's group is {group}; "
                f"so that all of it can fetch and delete: chgrp -R {group} {path}"
            )
            yield Finding("note", what, text)


def check_watch(spool: Spool) -> Iterator[Finding]:
    """Say how the inbox is watched: inotify or poll, and why."""
    watch = spool.config.watch
    how = watch_mode(watch.mode, mounts.file_system(spool.paths.inbox))[1]
    yield Finding("ok", "watch", f"{how}; a look every {watch.rescan_seconds:g} s")


def check_strangers(spool: Spool) -> Iterator[Finding]:
    """Name the first 20 files in the inbox that will never be taken, and say why."""
    for n, (stranger, why) in enumerate(strangers(spool.paths.inbox)):
        if n == _STRANGERS_SHOWN:
            yield Finding("note", "inbox", "... and more")
            break
        yield Finding("note", "inbox", f"{names.printable(stranger)}: {why}")


def check_model(spool: Spool) -> Iterator[Finding]:
    """Check that the files of the model are there. Raises ModelError."""
    settings = spool.config
    engine.require(settings)
    if settings.model.id in engine.ENGINES:
        text = f"{settings.model.id}: no model, for tests and dry runs"
        yield Finding("note", "model", text)
    else:
        text = f"{settings.model.id} in {weights.resolve(settings)}"
        yield Finding("ok", "model", text)


def check_cluster(spool: Spool) -> Iterator[Finding]:
    """Check that the cluster's head answers. Each host checks its own model and device at loading.

    Raises ConfigError: ray is missing.
    """
    backend.require_ray()
    address = spool.config.ray.address
    if ":" not in address:
        text = f"ray.address: {address}: looked for when the daemon starts"
        yield Finding("note", "cluster", text)
        return
    try:
        backend.knock(address)
    except OSError as e:
        yield Finding("bad", "cluster", f"ray.address: {address}: no head answers: {e}")
    else:
        text = f"{address} answers; its hosts: promptdrop cluster status"
        yield Finding("ok", "cluster", text)


def check_device(spool: Spool) -> Iterator[Finding]:
    """Check that the device is there and can do `engine.quantization`, and that no engine lacks one.

    Raises ConfigError.
    """
    settings = spool.config
    pool.ChildProcesses(settings)  # as many engines as there are GPUs
    wanted, present = settings.model.device, _nvidia_devices()
    if wanted == "cpu" or (wanted == "auto" and not present):
        engine.require_quantization(settings, "cpu", None)
        yield (
            Finding("ok", "device", "cpu, float32")
            if wanted == "cpu"
            else Finding("note", "device", "cpu, float32: no NVIDIA GPU was found")
        )
        return
    index = int(wanted.partition(":")[2] or 0)
    if index >= len(present):
        text = f"model.device: {wanted}: no such device; found {len(present)} NVIDIA GPUs"
        yield Finding("bad", "device", text)
        return
    gpu = present[index]
    engine.require_quantization(settings, gpu.name, gpu.capability)
    free = f"{gpu.free / 2**30:.0f} GiB free"
    yield Finding("ok", "device", f"cuda:{index} {gpu.name}, {free}, {settings.model.dtype}")


class _Gpu(NamedTuple):
    name: str
    free: int  # bytes
    capability: tuple[int, int]  # CUDA's


def _nvidia_devices() -> list[_Gpu]:
    """List the GPUs that NVML knows; none without a driver."""
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


def check_daemon(spool: Spool) -> Iterator[Finding]:
    """Say whether a daemon runs; neither answer is bad."""
    pid = spool.lock.daemon_pid()
    yield Finding("ok", "daemon", f"running, pid {pid}" if pid is not None else "not running")
