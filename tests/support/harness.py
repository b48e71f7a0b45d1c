"""A real daemon in a process of its own, on a spool in a temporary folder, and how tests wait for it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]

needs_systemd_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)

PATIENCE_SECONDS = 60.0  # longest wait for anything; a loaded machine is slow, not wrong

# Fast enough for tests: a gradient instead of a model, 64x64, one process start in half a second.
FAST: dict[str, Any] = {
    "root": "spool",
    "model": {"id": "gradient", "device": "cpu"},
    "engine": {"warmup": ["64x64"], "stop_seconds": 5},
    "defaults": {"width": 64, "height": 64, "steps": 3},
    "watch": {"settle_seconds": 0.2, "rescan_seconds": 0.5, "give_up_seconds": 0.6},
    "limits": {"min_free_disk_mib": 0},
}

# Events of the log that end a job.
ENDS = ("job.done", "job.partial", "job.failed", "job.cancelled", "job.refused")


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Poll until `condition()` is true and return it; fail naming `what` when patience ends."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.01)
    return value


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, section by section."""
    both = dict(base)
    for key, value in changes.items():
        old = both.get(key)
        both[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both


def jsonl(*prompts: str) -> str:
    """A job of one image per prompt, as JSON lines."""
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Daemon:
    """One spool and the daemon that may run on it."""

    def __init__(self, home: Path, changes: dict[str, Any] | None = None) -> None:
        self.home = home
        self.settings = merged(FAST, changes or {})
        self.root = home / self.settings["root"]
        self.inbox, self.outbox, self.failed = (
            self.root / n for n in ("inbox", "outbox", "failed")
        )
        self.own = self.root / ".promptdrop"
        self.config = home / "config.yaml"
        self.process: subprocess.Popen[str] | None = None
        self.log_file = home / "daemon.log"
        self._entries: list[dict[str, Any]] = []  # of the log, up to _read
        self._read = 0  # bytes
        self._started_ns: int | None = None  # mtime of what was made when this life began
        self.write_config()
        for folder in (self.inbox, self.outbox, self.failed, self.own / "control"):
            folder.mkdir(parents=True, exist_ok=True)

    # --- configuration and drops ---

    def write_config(self, changes: dict[str, Any] | None = None) -> None:
        """Write config.yaml, with more changes."""
        self.settings = merged(self.settings, changes or {})
        self.config.write_text(yaml.safe_dump(self.settings))

    def drop(self, name: str, content: str | bytes, folder: Path | None = None) -> Path:
        """Put a file into the inbox as mv does: whole, under its name at once."""
        path = (folder or self.inbox) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        temporary = self.root / f"drop-{os.urandom(4).hex()}"  # on the inbox's file system
        temporary.write_bytes(data)
        temporary.rename(path)
        return path

    # --- the process ---

    def command(self, *arguments: str) -> list[str]:
        """A promptdrop command on this configuration."""
        return [sys.executable, "-m", "promptdrop", *arguments, "--config", str(self.config)]

    def run(
        self, *arguments: str, timeout: float = PATIENCE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=timeout, cwd=self.home
        )

    def start(
        self, *arguments: str, env: dict[str, str] | None = None, wrapper: list[str] | None = None
    ) -> "Daemon":
        """Start `promptdrop run`; `wrapper` replaces `python -m promptdrop`."""
        head = wrapper or [sys.executable, "-m", "promptdrop"]
        with self.log_file.open("a") as log:
            os.utime(log.fileno())  # the kernel's clock, which is a tick behind ours
            self._started_ns = os.fstat(log.fileno()).st_mtime_ns
            self.process = subprocess.Popen(
                [*head, "run", "--config", str(self.config), *arguments],
                stdout=subprocess.DEVNULL, stderr=log, text=True, cwd=self.home,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
            )  # fmt: skip
        return self

    def drain(self, timeout: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run `run --drain` to its end."""
        done = self.run("run", "--drain", timeout=timeout)
        with self.log_file.open("a") as log:
            log.write(done.stderr)
        return done

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the daemon and return its exit status.

        One that does not end is made to show where its threads are, and its log is shown.
        """
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(PATIENCE_SECONDS)
            last_words = self.own / "last-words"
            traceback = last_words.read_text() if last_words.exists() else ""
            said = f"{self.log_file.read_text()[-8000:]}\n{traceback}"
            raise AssertionError(f"did not stop:\n{said}") from None

    def kill(self) -> None:
        """Send SIGKILL to daemon and engine: they end at once, as in a power cut."""
        if self.process is None:
            return
        engine = (self.status().get("engine") or {}).get("pid")
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        if engine:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(engine, signal.SIGKILL)

    # --- what it says ---

    def status(self) -> dict[str, Any]:
        """Read status.json as it is now, or an empty mapping."""
        try:
            loaded: dict[str, Any] = json.loads((self.own / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return loaded

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """Read the log's lines, or those of one event."""
        if self.log_file.exists():
            with self.log_file.open("rb") as file:
                file.seek(self._read)
                new, newline, _ = file.read().rpartition(
                    b"\n"
                )  # the last line may not be complete yet
            self._read += len(new + newline)
            for line in new.splitlines():
                with suppress(ValueError):  # a line that Python itself printed
                    self._entries.append(json.loads(line))
        return [e for e in self._entries if event is None or e.get("event") == event]

    def until_log(self, event: str, times: int = 1, **keys: Any) -> dict[str, Any]:
        """Wait until an event was logged so often with these keys; returns the last."""

        def found() -> list[dict[str, Any]] | None:
            matching = [e for e in self.log(event) if all(e.get(k) == v for k, v in keys.items())]
            return matching if len(matching) >= times else None

        try:
            entries: list[dict[str, Any]] = until(found, f"{times} x {event} {keys}")
        except AssertionError as e:
            raise AssertionError(f"{e}; the log:\n{self.log_file.read_text()[-4000:]}") from None
        return entries[-1]

    def until_ready(self) -> "Daemon":
        """Wait until the engine is warm."""
        lives = len(self.log("daemon.started"))
        until(lambda: len(self.log("daemon.started")) >= max(lives, 1), "daemon.started")
        self.until_log("engine.ready")
        return self

    def engine_pid(self) -> int:
        """The process id of the engine that was started last."""
        return int(self.until_log("engine.starting")["pid"])

    def published(self) -> list[tuple[str, int]]:
        """Every image that was published, in order, as (file in the outbox, image number)."""
        return [(e["file"], e["image"]) for e in self.log("image.published")]

    def until_begun(self, image: int = 1) -> None:
        """Wait until the engine works on this image of a job; it must take a while."""
        until(lambda: list(self.own.glob(f"active/*/{image:04d}.begun")), f"image {image} begun")

    def until_status(self, what: str, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Wait until the status fulfils a condition; returns it."""

        def found() -> dict[str, Any] | None:
            status = self.status()
            return status if status and condition(status) else None

        found_status: dict[str, Any] = until(found, f"a status with {what}")
        return found_status

    def until_idle(self) -> None:
        """Wait until every job that was claimed has ended, also on the disk."""

        def is_idle() -> bool:
            claimed, ended = ({e["job"] for e in self.log(f"job.{n}")} for n in ("claimed", "done"))
            return claimed <= ended and not self.unfinished()

        until(is_idle, "the end of all jobs")

    def until_waiting(self, file: str, word: str = "") -> str:
        """Wait until the status says that a file in the inbox waits, and why."""

        def why(status: dict[str, Any]) -> list[str]:
            return [w["why"] for w in status["waiting"] if w["file"] == file and word in w["why"]]

        return why(self.until_status(f"{file} waiting: {word}", why))[0]

    # --- what came of it ---

    def job(self, folder: str) -> dict[str, Any]:
        """Wait for job.json of an outbox folder, and read it."""
        path = self.outbox / folder / "job.json"
        try:
            until(path.exists, str(path))
        except AssertionError as e:
            raise AssertionError(f"{e}; the log:\n{self.log_file.read_text()[-4000:]}") from None
        loaded: dict[str, Any] = json.loads(path.read_bytes())
        self._until_said(path, loaded, lambda line: line.get("job") == loaded["id"])
        return loaded

    def error(self, name: str) -> dict[str, Any]:
        """Wait for FILE.error.json in failed/, and read it."""
        path = self.failed / f"{name}.error.json"
        until(path.exists, str(path))
        loaded: dict[str, Any] = json.loads(path.read_bytes())
        self._until_said(path, loaded, lambda e: e.get("file", "").endswith(loaded["file"]))
        return loaded

    def _until_said(
        self, path: Path, end: dict[str, Any], is_about: Callable[[dict[str, Any]], bool]
    ) -> None:
        """Wait until the log says how a job has ended, as its lines may come after its files.

        Nothing is waited for if the daemon runs no more, or if an earlier life made the file.
        """

        def is_said() -> bool:
            assert self.process
            if self.process.poll() is not None:
                return True
            ends = [e["event"] for e in self.log() if e.get("event") in ENDS and is_about(e)]
            return ends[-1:] == [f"job.{end['outcome']}"]

        if self._started_ns is not None and path.stat().st_mtime_ns >= self._started_ns:
            until(is_said, f"the log's line about {path}")

    def sidecars(self, folder: str) -> list[dict[str, Any]]:
        """The sidecars of an outbox folder, by image number."""
        read = [json.loads(p.read_bytes()) for p in (self.outbox / folder).glob("*.json")]
        images = [s for s in read if s.get("schema") == "promptdrop.image/1"]
        return sorted(images, key=lambda s: s["job"]["image"])

    def tree(self) -> list[str]:
        """Every file of inbox, outbox and failed, but the outbox's status."""
        folders = (self.inbox, self.outbox, self.failed)
        return sorted(
            str(p.relative_to(self.root))
            for f in folders
            for p in f.rglob("*")
            if p.is_file() and p.name not in ("status.json", ".promptdrop-status.json.tmp")
        )

    def unfinished(self) -> list[str]:
        """The folders of jobs that have not ended."""
        return sorted(
            p.name for state in ("pending", "active") for p in (self.own / state).glob("*")
        )


def works(daemon: Daemon, name: str = "witness") -> None:
    """Assert that an ordinary job is rendered."""
    daemon.drop(f"{name}.txt", "a cat\n")
    assert daemon.job(name)["outcome"] == "done"


MakeDaemon = Callable[..., Daemon]
