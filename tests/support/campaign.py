"""A night of trouble for one daemon: drops, SIGKILLs and commands at random, everything counted at the end.

The engine is torch-free. `soak.py` runs it for long; short campaigns run in the suite (test_crash.py).
"""

import hashlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gauges import Gauges, gauges
from harness import Daemon, until
from promptdrop.spool import control
from promptdrop.spool.control import PAUSE
from promptdrop.spool.failed import failures

SETTINGS: dict[str, Any] = {
    "watch": {"settle_seconds": 0.02, "rescan_seconds": 0.2},
    # Engines are killed here without end: no image may run out of attempts by bad luck.
    "engine": {"warmup": [], "max_attempts": 100, "stop_seconds": 5},
    "defaults": {"steps": 1},
}
JOB_IMAGES = 40  # at most
QUIET_IMAGES = 1500  # of the last phase, in which nothing is killed and the memory is watched
MEMORY_MIB = 5.0  # most that the daemon may grow over them


@dataclass
class Campaign:
    """One daemon and all that happens to it. `run` raises AssertionError where a promise was broken."""

    daemon: Daemon
    seed: int
    images: int
    kills: int
    deadline: float = float("inf")  # monotonic seconds: stop making trouble then
    asked: dict[str, list[int]] = field(default_factory=dict)  # SUB/JOB -> seeds
    dropped: dict[str, bytes] = field(default_factory=dict)  # SUB/JOB -> the file
    seen: dict[Path, str] = field(default_factory=dict)  # sidecars -> SHA-256 when first seen
    done: Counter[str] = field(default_factory=Counter)  # what was done how often

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def run(self) -> None:
        """Drop, disturb, finish, count."""
        self._start()
        while self.killed() < self.kills and time.monotonic() < self.deadline:
            if self.images_asked() < self.images:
                self._drop_some()
            self._let_it_work()
            self._disturb()
            self._look()
        while self.images_asked() < self.images:
            self._drop_some()
        self._finish()
        self._count()

    def images_asked(self) -> int:
        """The number of images that the drops so far ask for."""
        return sum(map(len, self.asked.values()))

    def killed(self) -> int:
        """The number of SIGKILLs so far."""
        return sum(count for what, count in self.done.items() if what.startswith("SIGKILL"))

    def growth_mib(self, images: int) -> float:
        """Render images in one undisturbed life. Returns the growth of the daemon's memory in the last half."""
        self._start()
        wanted = self.images_asked() + images
        while self.images_asked() < wanted:
            self._drop_some()
        self._until_published(images // 2)
        before = self._gauges().rss_mib
        self._until_published(images)
        grown = self._gauges().rss_mib - before
        self._finish()
        self._count()
        return grown

    def _start(self) -> None:
        self.daemon.start()

    # --- what goes in ---

    def _drop_some(self) -> None:
        for _ in range(self.random.randint(1, 5)):
            n, count = len(self.asked), self.random.randint(1, JOB_IMAGES)
            folder = self.random.choice(["", "", "night/", "night/deep/"])
            seeds = list(range(n * 1000, n * 1000 + count))
            flag = self.daemon.home / f"flag{n}"
            fault = self.random.choice(["", "", "", f"!once-crash {flag} ", f"!once-raise {flag} "])
            text = f"prompt: '{fault}job {n}'\nseed: {seeds}\nformat: png\n"
            self.asked[f"{folder}job{n}"] = seeds
            self.dropped[f"{folder}job{n}"] = text.encode()
            self.daemon.drop(f"{folder}job{n}.yaml", text)

    # --- what happens ---

    def _let_it_work(self) -> None:
        """Wait a random while: for some images, or for some moment of a start."""
        if self.random.random() < 0.3:
            time.sleep(self.random.uniform(0, 0.6))
            return
        wanted = self._published() + self.random.randint(1, 60)
        patience = time.monotonic() + 2  # paused, or nothing left to do
        while self._published() < wanted and time.monotonic() < patience:
            time.sleep(0.01)

    def _disturb(self) -> None:
        """Do one random thing that disturbs the daemon."""
        things: list[tuple[int, Callable[[], None]]] = [
            (4, self._kill_daemon),
            (4, self._kill_engine),
            (4, self._kill_both),
            (1, self._stop),
            (1, self._reload),
            (1, self._pause_or_resume),
            (2, self._cancel),
            (1, self._retry),
        ]
        self._start_again()
        weights, actions = zip(*things, strict=True)
        action = self.random.choices(actions, weights)[0]
        action()

    def _start_again(self) -> None:
        """Start it again, as systemd does. By itself it ends only if we kill an engine that is loading."""
        assert self.daemon.process
        if (status := self.daemon.process.poll()) is None:
            return
        if status != 0:
            reason = self.daemon.log("daemon.ending")[-1]["reason"]
            assert "killed by SIGKILL" in reason
            assert status in (1, -signal.SIGTERM), reason  # or hit in its last moment
        self._start()

    def _kill_daemon(self) -> None:
        self.done["SIGKILL daemon"] += 1
        self._kill_parent()
        self._start()

    def _kill_engine(self) -> None:
        for engine in self._engines():
            self.done["SIGKILL engine"] += 1
            engine.kill()

    def _kill_both(self) -> None:
        self.done["SIGKILL both"] += 1
        with suppress(psutil.NoSuchProcess):
            for engine in self._engines():
                engine.kill()
        self._kill_parent()
        self._start()

    def _kill_parent(self) -> None:
        assert self.daemon.process
        self.daemon.process.kill()
        self.daemon.process.wait(30)

    def _engines(self) -> list[psutil.Process]:
        assert self.daemon.process
        return psutil.Process(self.daemon.process.pid).children()

    def _stop(self) -> None:
        self.done["SIGTERM"] += 1
        self._listening().terminate()
        assert self.daemon.process
        self.daemon.process.wait(60)
        self._start_again()

    def _reload(self) -> None:
        self.done["SIGHUP"] += 1
        self._listening().send_signal(signal.SIGHUP)

    def _listening(self) -> psutil.Process:
        """The daemon, once it handles signals."""
        assert self.daemon.process
        pid = self.daemon.process.pid
        until(lambda: [e for e in self.daemon.log("daemon.started") if e["pid"] == pid], "a start")
        return psutil.Process(pid)

    def _pause_or_resume(self) -> None:
        folder = self.daemon.own / "control"
        if (folder / PAUSE).exists():
            control.resume(folder)
        else:
            self.done["pause"] += 1
            control.pause(folder)

    def _cancel(self) -> None:
        if jobs := self.daemon.status().get("jobs"):
            self.done["cancel"] += 1
            job = self.random.choice(jobs)["id"]
            control.send(self.daemon.own / "control", control.Cancel((job,)))

    def _retry(self) -> None:
        if targets := tuple(target for target, _ in failures(self.daemon.failed)):
            self.done["retry"] += 1
            control.send(self.daemon.own / "control", control.Retry(targets))

    # --- what comes out ---

    def _finish(self) -> None:
        """Let everything end, cancelled jobs too."""
        self._start_again()
        control.resume(self.daemon.own / "control")
        self._until_ended()
        self.daemon.until_status("a daemon that heeds signals", self._is_its_own)
        assert self.daemon.stop() == 0

    def _until_ended(self) -> None:
        until(self._is_done_or_retried, f"the end of seed {self.seed}", 600)

    def _is_its_own(self, status: dict[str, Any]) -> bool:
        """Whether the daemon of the last start wrote it: one that was just started dies of SIGTERM."""
        process = self.daemon.process
        return process is not None and bool(status["pid"] == process.pid)

    def _is_done_or_retried(self) -> bool:
        self._start_again()
        if not list((self.daemon.own / "control").glob("*.json")):
            self._retry()
        time.sleep(0.2)
        done = all((self.daemon.outbox / job / "job.json").exists() for job in self.asked)
        return done and not self.daemon.unfinished() and not any(self.daemon.failed.rglob("*.yaml"))

    def _look(self) -> None:
        for path in self._sidecars():
            if path not in self.seen:
                self.seen[path] = hashlib.sha256(path.read_bytes()).hexdigest()

    def _count(self) -> None:
        """Assert that every image is there once, whole, with its seed, every file in its place, nothing else."""
        for job, seeds in self.asked.items():
            folder = self.daemon.outbox / job
            sidecars = self.daemon.sidecars(job)
            assert json.loads((folder / "job.json").read_bytes())["outcome"] == "done", job
            assert [s["request"]["seed"] for s in sidecars] == seeds, job
            assert [s["job"]["image"] for s in sidecars] == list(range(1, len(seeds) + 1)), job
            for sidecar in sidecars:
                data = (folder / sidecar["image"]["file"]).read_bytes()
                assert hashlib.sha256(data).hexdigest() == sidecar["image"]["sha256"], job
            assert (folder / "request.yaml").read_bytes() == self.dropped[job], job
            assert len(list(folder.iterdir())) == 2 * len(seeds) + 2, job
        for path, digest in self.seen.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, f"{path} came twice"
        left = [p for p in self.daemon.root.rglob(".promptdrop-*") if p != self.daemon.own]
        assert [
            left,
            *(
                list((self.daemon.own / s).iterdir())
                for s in ("pending", "active", "parked", "finished")
            ),
        ] == [[]] * 5
        assert [p for p in self.daemon.inbox.rglob("*") if p.is_file()] == []
        assert [p for p in self.daemon.failed.rglob("*") if p.is_file()] == []

    def _sidecars(self) -> list[Path]:
        return [p for p in self.daemon.outbox.rglob("*-[0-9]*.json") if p.name[0] != "."]

    def _published(self) -> int:
        return len(self._sidecars())

    def _until_published(self, images: int) -> None:
        assert self.daemon.process

        def are_published() -> bool:
            status = self.daemon.status()
            return bool(
                status and self._is_its_own(status) and status["images_published"] >= images
            )

        until(are_published, f"{images} images", 600)

    def _gauges(self) -> Gauges:
        assert self.daemon.process
        return gauges(self.daemon.process.pid)
