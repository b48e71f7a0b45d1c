"""How the spool scales: what start, a claim, a turn of the loop and a look cost, against how much lies there.

    python bench/spool.py --pending 1000 10000 100000 --outbox 0 100000 1000000 --svg docs/spool.svg

For each number of pending jobs of one image: seconds to recover them, resident memory, and the longest
and the median turn of the loop while 100 images of 64x64 are rendered (gradient engine). For each number of
images in the outbox (finished jobs of 100): the median claim, from the rename out of the inbox to the
outbox folder, the first one, which lists the outbox once, and the turns while 100 images are rendered.
One job of --images images. Files dropped at once: seconds to the first claim, claims per second. Last,
against watchdog's PollingObserver and a loop of glob and stat, the CPU time of picking up one new file in
an inbox of --files, and so many at once in an empty one. Nothing here is asserted: read the curves.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from watchdog.events import FileCreatedEvent
from watchdog.observers.api import EventQueue, ObservedWatch
from watchdog.observers.polling import PollingEmitter

from promptdrop import config, log
from promptdrop.intake.inbox import Inbox
from promptdrop.intake.taking import settings_of
from promptdrop.nouns import ImageSpec, Request
from promptdrop.spool import claim, recovery
from promptdrop.spool.detail import Settled
from promptdrop.spool.job import Job
from promptdrop.spool.paths import DROP, REQUEST, SUMMARY
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.supervisor import GC_THRESHOLDS, Supervisor

Points = list[tuple[float, float]]
RENDERED = 100  # images a daemon renders while its turns are timed
SPEC = ImageSpec(
    image=1, prompt="a red fox in fresh snow, morning light, wide shot", negative_prompt=None,
    width=64, height=64, steps=3, guidance_scale=0.0, seed=1,
    scheduler="euler", format="png", timeout_seconds=60.0,
)  # fmt: skip


class Timed(Supervisor):
    """A daemon that notes how long its turns take, without the waiting, and stops by itself."""

    def __init__(self, settings: config.Config, images: int, seconds: float) -> None:
        self.turns: list[float] = []  # seconds
        # Of these, seconds on a core, which a loaded machine does not stretch.
        self.cpu: list[float] = []
        self.first_claim: float | None = None
        self.claims = 0
        self._wanted, self._until = images, time.monotonic() + seconds
        super().__init__(settings)
        self.began = time.monotonic()

    def _heed_signals(self) -> None:
        self._turn_began = time.monotonic(), time.thread_time()
        super()._heed_signals()

    def _report(self, now: float) -> None:
        super()._report(now)
        if self._pool.first_warm():
            self.turns.append(time.monotonic() - self._turn_began[0])
            self.cpu.append(time.thread_time() - self._turn_began[1])
        if self._publishing.published >= self._wanted or time.monotonic() > self._until:
            self._gate.end(0)

    def accept(self, job):  # type: ignore[no-untyped-def]  # as in Supervisor
        """Note the time of the first new job."""
        if job.place == "pending" and self._recovery.is_over:
            self.claims += 1
            self.first_claim = self.first_claim or time.monotonic() - self.began
        super().accept(job)


def settings_for(home: Path, **more: object) -> config.Config:
    """Configure the gradient engine, small images and the default watch settings."""
    base = {
        "root": str(home / "spool"), "model": {"id": "gradient"}, "engine": {"warmup": []},
        "defaults": {"width": 64, "height": 64, "steps": 3},
        "limits": {"min_free_disk_mib": 0, "images_per_job": 1_000_000, "job_file_kib": 65_536},
    }  # fmt: skip
    return config.parse({**base, **more})


def make_pending(spool: Spool, jobs: int) -> None:
    """Make pending jobs as claims leave them, without the fsyncs: half at the root, half in ten folders."""
    (spool.paths.inbox / "one.txt").write_text("a red fox\n")
    claimed = claimed_job(spool, "one.txt")
    record = json.loads((claimed.home / REQUEST).read_bytes())
    for n in range(jobs):
        job_id = f"20260101T{n:012d}-abcdef"
        sub, name = (f"sub{n % 10}" if n % 2 else ""), f"job{n:06d}"
        home = spool.paths.home("pending", job_id)
        os.makedirs(home / DROP / sub)
        (home / DROP / sub / f"{name}.txt").write_text("a red fox\n")
        folder = f"{sub}/{name}" if sub else name
        record |= {"id": job_id, "sub": sub, "file": f"{name}.txt", "folder": folder}
        (home / REQUEST).write_text(json.dumps(record))
        os.makedirs(spool.paths.outbox / folder)
    shutil.rmtree(claimed.home)


def claimed_job(spool: Spool, file: str) -> Job:
    """A dropped file, claimed and resolved."""
    claimed = claim.claim(spool, "", file)
    settled = Settled(0.0, spool.boot)
    return claim.resolve(spool, claimed, Request((SPEC,)), settled, settings_of(spool.config))


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def in_a_child(measure: Callable[..., dict[str, float]], *args: object) -> dict[str, float]:
    """Run a measurement in a child process, so that each has fresh memory."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        log.set_up("error", "json")
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)  # as a daemon does
        os.write(write, json.dumps(measure(*args)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer: dict[str, float] = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return answer


def measure_pending(home: Path) -> dict[str, float]:
    """Measure recovery, memory and turns."""
    settings = settings_for(home)
    spool = Spool(settings)
    spool.folders.prepare()
    began = time.monotonic()
    recovery.recover(spool)
    recovered = time.monotonic() - began
    daemon = Timed(settings, RENDERED, 300)
    daemon.run()
    return {
        "recover_s": recovered, "mib": resident_mib(),
        "turn_median_ms": statistics.median(daemon.turns) * 1e3, "turn_max_ms": max(daemon.turns) * 1e3, "turn_max_cpu_ms": max(daemon.cpu) * 1e3,
    }  # fmt: skip


def measure_drop(home: Path, seconds: float) -> dict[str, float]:
    """Measure how files are claimed that lie in the inbox at the start, for so many seconds."""
    daemon = Timed(settings_for(home), 10**9, seconds)
    daemon.run()
    working = seconds - (daemon.first_claim or seconds)
    return {
        "first_claim_s": daemon.first_claim or float("nan"), "claims_per_s": daemon.claims / max(working, 1e-9),
        "mib": resident_mib(), "turn_max_ms": max(daemon.turns) * 1e3, "turn_max_cpu_ms": max(daemon.cpu) * 1e3,
    }  # fmt: skip


def measure_one_job(home: Path, seconds: float) -> dict[str, float]:
    """Measure one job of very many images."""
    daemon = Timed(settings_for(home), 10**9, seconds)
    daemon.run()
    turns = daemon.turns[len(daemon.turns) // 10 :]
    return {
        "first_claim_s": daemon.first_claim or float("nan"), "images_per_s": daemon._publishing.published / seconds,
        "mib": resident_mib(), "turn_median_ms": statistics.median(turns) * 1e3, "turn_max_ms": max(turns) * 1e3, "turn_max_cpu_ms": max(daemon.cpu) * 1e3,
    }  # fmt: skip


def measure_claims(home: Path, claims: int) -> dict[str, float]:
    """Measure claim and resolve, without the engine."""
    spool = Spool(settings_for(home))
    spool.folders.prepare()
    times = []
    for n in range(claims):
        (spool.paths.inbox / f"new{n}.txt").write_text("a\n")
        began = time.perf_counter()
        claimed_job(spool, f"new{n}.txt")
        times.append(time.perf_counter() - began)
    return {"claim_first_ms": times[0] * 1e3, "claim_median_ms": statistics.median(times[1:]) * 1e3}


def pick_up(files: int, there: int) -> dict[str, float]:
    """CPU ms to know that so many new files are there and stand still: seen twice, the same both times.

    there: files that were known before. Ours also asks of each new file whether somebody has it open
    for writing.
    """
    with scratch() as home:
        watched, new = home / "inbox", home / "new"
        for folder, names in ((watched, range(there)), (new, range(there, there + files))):
            folder.mkdir()
            for n in names:
                (folder / f"{n}.txt").write_text("a\n")
        inbox, watch = Inbox(watched), config.Watch(settle_seconds=0)
        for now in (1.0, 2.0):
            inbox.scan(now, watch, True)
        events = EventQueue()
        emitter = PollingEmitter(events, ObservedWatch(str(watched), recursive=True))
        emitter.on_thread_start()  # its first picture of the folder
        known = {path: path.stat() for path in watched.rglob("*.txt")}
        new.rename(watched / "new")
        found: dict[str, int] = {}

        def promptdrop() -> None:
            inbox.scan(3.0, watch, True)
            found["promptdrop"] = len(inbox.scan(4.0, watch, True).offers)

        def polling_observer() -> None:
            created, changed = set(), set()
            for _ in range(2):
                emitter.queue_events(0)
                while not events.empty():
                    event, _ = events.get()
                    kind = created if isinstance(event, FileCreatedEvent) else changed
                    kind.add(event.src_path)
            found["polling_observer"] = len(created - changed)

        def glob_loop() -> None:
            looks = [{path: path.stat() for path in watched.rglob("*.txt")} for _ in range(2)]
            still = {path for path, status in looks[0].items() if looks[1].get(path) == status}
            found["glob_loop"] = len(still - known.keys())

        costs = {}
        for way in (promptdrop, polling_observer, glob_loop):
            began = time.thread_time()
            way()
            costs[f"{way.__name__}_ms"] = (time.thread_time() - began) * 1e3
        assert set(found.values()) == {files}, found
        return costs


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="promptdrop-bench-") as folder:
        yield Path(folder)


@contextmanager
def new_spool() -> Iterator[tuple[Path, Spool]]:
    """An empty spool in a scratch folder."""
    with scratch() as home:
        spool = Spool(settings_for(home))
        spool.folders.init()
        yield home, spool


def fill_outbox(spool: Spool, images: int) -> None:
    """Finished jobs of 100 empty images."""
    for n in range(images // 100):
        folder = spool.paths.outbox / f"old{n:06d}"
        folder.mkdir()
        for image in range(100):
            os.close(os.open(folder / f"old{n:06d}-{image:04d}.png", os.O_CREAT | os.O_WRONLY))
        (folder / SUMMARY).write_text("{}")


def say(what: str, number: int, figures: dict[str, float]) -> None:
    """One line of the report."""
    print(f"{what} {number:>9,}: " + ", ".join(f"{k} {v:,.2f}" for k, v in figures.items()), flush=True)  # fmt: skip


def median_of(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    runs = list(found)
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def draw(file: Path, curves: dict[str, Points]) -> None:
    """A picture of curves over logarithmic axes, as SVG."""
    import math

    width, height, left, top = 720, 420, 70, 30
    right, bottom = 230, 50
    points = [point for curve in curves.values() for point in curve]
    xs = [math.log10(max(x, 1)) for x, _ in points]
    ys = [math.log10(y) for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), math.floor(min(ys)), math.ceil(max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(max(x, 1)) - x0) / (x1 - x0)
        down = (y1 - math.log10(y)) / (y1 - y0)
        return left + across * (width - left - right), top + down * (height - top - bottom)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for power in range(y0, y1 + 1):
        _, y = place(1, 10**power)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10**power:g}</text>')  # fmt: skip
    for x_value in sorted({x for x, _ in points}):
        x, _ = place(x_value, 10**y0)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x_value:,.0f}</text>')  # fmt: skip
    colours = ("#0b6", "#06c", "#c60", "#909", "#c03", "#555")
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        x, y = place(*curve[-1])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/><text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')  # fmt: skip
    parts.append(f'<text x="{left}" y="{height - 8}">jobs pending, or images in the outbox</text></svg>')  # fmt: skip
    file.write_text("\n".join(parts) + "\n")


class Report:
    """Prints each measurement, and keeps the points of the curves."""

    def __init__(self) -> None:
        self.curves: dict[str, Points] = {}

    def note(self, name: str, x: float, y: float) -> None:
        """One more point of a curve."""
        self.curves.setdefault(name, []).append((x, y))

    def by_pending(self, jobs: int) -> None:
        """Start and turns with so many jobs pending."""
        with new_spool() as (home, spool):
            make_pending(spool, jobs)
            found = in_a_child(measure_pending, home)
        say("pending", jobs, found)
        self.note("start: recovery, s", jobs, found["recover_s"])
        self.note("memory, MiB", jobs, found["mib"])
        self.note("longest turn, ms", jobs, found["turn_max_ms"])
        self.note("median turn, ms", jobs, found["turn_median_ms"])

    def by_outbox(self, images: int) -> None:
        """Claims and turns with so many images in the outbox."""
        with new_spool() as (home, spool):
            fill_outbox(spool, images)
            found = in_a_child(measure_claims, home, 50)
            make_pending(spool, RENDERED)
            found |= in_a_child(measure_pending, home)
        say("images in the outbox", images, found)
        self.note("a claim, ms (by outbox)", images, found["claim_median_ms"])
        self.note("median turn, ms (by outbox)", images, found["turn_median_ms"])


def report_dropped(files: int, seconds: float) -> None:
    """So many files dropped at once."""
    with new_spool() as (home, spool):
        for n in range(files):
            (spool.paths.inbox / f"{n:06d}.txt").write_text("a red fox\n")
        say("dropped at once", files, in_a_child(measure_drop, home, seconds))


def report_one_job(images: int, seconds: float) -> None:
    """One job of so many images."""
    with new_spool() as (home, spool):
        (spool.paths.inbox / "one.yaml").write_text(f"prompt: a red fox\ncount: {images}\n")
        say("images of one job", images, in_a_child(measure_one_job, home, seconds))


def report_pick_up(files: int) -> None:
    """One new file in an inbox of so many, and so many in an empty one."""
    for new, there in ((1, files), (files, 0)):
        found = median_of(pick_up(new, there) for _ in range(5))
        say(f"pick-up of {new:,} in an inbox of", new + there, found)
        for other in ("polling_observer", "glob_loop"):
            times = found[f"{other}_ms"] / found["promptdrop_ms"]
            print(f"  {other}: {times:.1f} times ours", flush=True)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pending", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--outbox", type=int, nargs="*", default=[0, 10_000, 100_000])
    parser.add_argument("--dropped", type=int, default=10_000, help="files at once")
    parser.add_argument("--images", type=int, default=10_000, help="of one job")
    parser.add_argument("--files", type=int, default=10_000, help="in the inbox that is looked at")
    parser.add_argument("--seconds", type=float, default=30, help="for each daemon")
    parser.add_argument("--svg", type=Path)
    wanted = parser.parse_args()
    report = Report()
    for jobs in wanted.pending:
        report.by_pending(jobs)
    for images in wanted.outbox:
        report.by_outbox(images)
    if wanted.dropped:
        report_dropped(wanted.dropped, wanted.seconds)
    if wanted.images:
        report_one_job(wanted.images, wanted.seconds)
    if wanted.files:
        report_pick_up(wanted.files)
    if wanted.svg:
        draw(wanted.svg, report.curves)


if __name__ == "__main__":
    main()
