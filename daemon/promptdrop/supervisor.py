"""The loop and all policy: what to do next when a drop, an answer, a death, a signal or time comes.

The loop owns every decision and never waits for a disk: reading, claiming, publishing and finishing
run on a few threads that report back through the same wake-up. It never imports torch.
"""

import functools
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, Literal

from promptdrop import (
    __version__,
    clock,
    config,
    control,
    engine,
    fs,
    log,
    names,
    picture,
    publish,
    request,
)
from promptdrop.config import Config
from promptdrop.engine_process import EngineProcess, InHand, Limits
from promptdrop.errors import (
    ConfigError,
    DiskTrouble,
    Problem,
    PromptdropError,
    RequestError,
    UsageError,
)
from promptdrop.inbox import Inbox, Offer, Scan, Watcher, sees_every_writer
from promptdrop.job import EngineInfo, ImageSpec, JobOutcome, Request
from promptdrop.messages import (
    Began,
    Cancelled,
    Failed,
    Ready,
    Render,
    Rendered,
    Stage,
    Tokens,
)
from promptdrop.metrics import Nvml, RollingWindow
from promptdrop.publish import Publication
from promptdrop.queue import Queue
from promptdrop.reading import read_job_file
from promptdrop.records import (
    ErrorRecord,
    Status,
    StatusEngine,
    StatusFinished,
    StatusImage,
    StatusJob,
    StatusQueue,
    StatusWaiting,
    to_bytes,
)
from promptdrop.sdnotify import Notifier
from promptdrop.spool import (
    DEATHS_FAILED,
    Job,
    Settings,
    Settled,
    Spool,
    Unresolved,
    describe_permissions,
)

DEPTH = 2  # images in the engine: the one being rendered and the next, so the device never waits
PUBLISHING = 4  # images being encoded and saved; more would only fill memory
SCAN_SECONDS = 0.1  # shortest time between two looks at the inbox
STATUS_SECONDS = 1.0  # shortest time between two writes of status.json
HEARTBEAT_SECONDS = 10.0  # longest
PROGRESS_SECONDS = 0.1
IDLE_DEATHS = 5  # deaths in a row without one image begun after which the engine is given up
LISTED = 100  # jobs, files and ends in the status

Disk = (OSError, DiskTrouble)  # trouble with a disk: try again, charge nobody


@dataclass(slots=True)
class Running:
    """A claimed job that has not ended."""

    job: Job
    busy: int = 0  # images in the engine or being published
    cancelled: bool = False
    ending: bool = False


@dataclass(slots=True)
class Stalled:
    """Work that met trouble with a disk, to be tried again."""

    again: Callable[[], None]
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """One look at everything outside: the inbox, the control folder, the disks."""

    scan: Scan | None
    trouble: str | None
    paused: bool
    commands: tuple[control.Command, ...]


class Supervisor:
    """The daemon of one configuration. `run` returns the exit status."""

    def __init__(
        self,
        settings: Config,
        drain: bool = False,
        on_change: Callable[[Status], None] | None = None,
    ) -> None:
        self.config = settings
        self.drain = drain
        self.exit_status: int | None = None
        self.ending: str | None = None  # why it ended, unless as asked
        self.finished: deque[StatusFinished] = deque(maxlen=LISTED)
        self.failures = 0
        self._on_change = on_change
        self.spool = Spool(settings)
        self._inbox = Inbox(self.spool.inbox)
        self._notifier = Notifier()
        self._queue = Queue(settings.queue.policy)
        self._running: dict[str, Running] = {}
        self._tickets: dict[int, Running] = {}  # images in the engine
        self._measuring: dict[int, Running] = {}  # jobs whose prompts are being counted
        self._unmeasured: list[Running] = []
        self._ticket = 0
        self._engine: EngineProcess | None = None
        self._info: EngineInfo | None = None
        self._kill_reason: str | None = None
        self._lives = 0
        self._idle_deaths = 0
        self._nvml = Nvml(None)
        self._window = RollingWindow(settings.metrics.window)
        self._rendered = 0
        self._published = 0
        self._publishing = 0
        self._stalled: list[Stalled] = []
        self._retry_at = float("inf")
        self._trouble: str | None = None
        self._paused = False
        self._scanning = False
        self._look_now = True
        self._recovering = True
        self._last_scan = self._next_scan = 0.0
        self._quiet_since: float | None = None  # start of the last scan that found nothing
        self._last_activity = 0.0
        self._waiting: dict[str, str] = {}
        self._offered = 0
        self._verdicts: list[Callable[[], None]] = []
        self._signals: set[int] = set()
        self._stop_at: float | None = None
        self._started = clock.timestamp()
        self._status_at = self._progress_at = 0.0
        self._status_key: object = None
        self._results: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watcher = Watcher(self._wake_to_look)
        self._scanner, self._reader, self._clerk = (
            ThreadPoolExecutor(1, name) for name in ("scanner", "reader", "clerk")
        )
        self._publishers = ThreadPoolExecutor(PUBLISHING, "publisher")

    # --- a life -------------------------------------------------------------------------------

    def run(self) -> int:
        """The whole life of the daemon, from lock to exit status.

        Raises ConfigError, SpoolBusy: it cannot start.
        """
        self._startup()
        try:
            while self.exit_status is None:
                self._turn()
        finally:
            self._shutdown()
        return self.exit_status

    def _startup(self) -> None:
        config.refuse_what_is_not_ready(self.config)
        engine.require(self.config)
        self.spool.prepare()
        self.spool.lock()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        log.get().info(
            "daemon.started",
            pid=os.getpid(),
            root=str(self.spool.root),
            version=__version__,
            watch=self._watch_mode(),
        )
        self._start_engine()
        self._off(self._clerk, self._recover, self._recovered)

    def _turn(self) -> None:
        now = time.monotonic()
        descriptors: list[Any] = [
            self._wake_read,
            *(self._engine.filenos() if self._engine else []),
        ]
        wait(descriptors, max(0.0, self._next_deadline(now) - now))
        self._drain_wake()
        self._heed_signals()
        while not self._results.empty():
            self._results.get()()
        now = time.monotonic()
        self._hear_engine(now)
        self._look(now)
        self._try_again(now)
        self._feed(now)
        self._maybe_end(now)
        self._report(now)

    def _shutdown(self) -> None:
        self._notifier.stopping()
        if self._engine:
            for image in self._engine.in_hand.values():
                image.pixels.close()
            if not self._engine.reap():
                log.get().error("engine.unkillable", pid=self._engine.pid)
        self._watcher.close()
        for executor in (self._scanner, self._reader, self._clerk, self._publishers):
            executor.shutdown(wait=True, cancel_futures=True)
        self._put_down_images()
        self._write_status(self._status("stopping"))
        self.spool.unlock()
        self._notifier.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        log.get().info("daemon.stopped", exit_status=self.exit_status, published=self._published)

    def _put_down_images(self) -> None:
        """Images in hand at an orderly stop are nobody's fault."""
        for running in self._running.values():
            for spec in running.job.specs if running.job.home.exists() else ():
                state = running.job.states.get(spec.image)
                if state is not None and state.outcome == "todo":
                    try:
                        self.spool.end_attempt(running.job, spec.image)
                    except OSError:
                        pass  # the disk is sick: the image is charged with a daemon death too many

    def _end(self, exit_status: int, reason: str | None = None) -> None:
        self.exit_status, self.ending = exit_status, reason
        if reason:
            log.get().error("daemon.ending", exit_status=exit_status, reason=reason)

    # --- waking -------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Called from any thread and from signal handlers."""
        try:
            os.write(self._wake_write, b"\0")
        except (BlockingIOError, OSError):
            pass  # the pipe is full of wake-ups already, or we are closing

    def _wake_to_look(self) -> None:
        self._look_now = True
        self._wake()

    def _drain_wake(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass  # drained

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.add(-number if number in self._signals else number)
        self._wake()

    def _heed_signals(self) -> None:
        signals, self._signals = self._signals, set()
        if signal.SIGHUP in signals:
            self._reload()
        stops = {abs(number) for number in signals} & {signal.SIGTERM, signal.SIGINT}
        if stops:
            twice = (
                self._stop_at is not None or len(signals & {-signal.SIGTERM, -signal.SIGINT}) > 0
            )
            self._stop(at_once=twice)

    def _next_deadline(self, now: float) -> float:
        due = [self._next_scan, self._retry_at, now + HEARTBEAT_SECONDS]
        if self._look_now:
            due.append(self._last_scan + SCAN_SECONDS)
        if self._scanning:
            due = due[1:2] + due[2:3]
        if self._notifier.watchdog_seconds:
            due.append(now + self._notifier.watchdog_seconds / 2)
        if self._engine:
            due.append(self._engine.next_deadline(self._limits()))
        if self._stop_at is not None:
            due.append(self._stop_at)
        if self._has_work():
            due.append(self._status_at + STATUS_SECONDS)
        return min(due)

    # --- work off the loop --------------------------------------------------------------------

    def _off(
        self, executor: Executor, function: Callable[[], Any], then: Callable[[Any], None]
    ) -> None:
        """Run `function` on a thread, then `then(result)` on the loop; after disk trouble, again."""

        def done(future: Future[Any]) -> None:
            self._results.put(lambda: self._returned(future, executor, function, then))
            self._wake()

        if self.exit_status is None:
            executor.submit(function).add_done_callback(done)

    def _returned(
        self,
        future: "Future[Any]",
        executor: Executor,
        function: Callable[[], Any],
        then: Callable[[Any], None],
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, Disk):
            reason = _reason(error)
            log.get().warning("disk.trouble", reason=reason)
            self._stalled.append(Stalled(lambda: self._off(executor, function, then), reason))
            self._retry_at = min(
                self._retry_at, time.monotonic() + self.config.watch.rescan_seconds
            )
        elif error is not None:
            raise error
        else:
            then(future.result())

    def _try_again(self, now: float) -> None:
        if now < self._retry_at:
            return
        stalled, self._stalled, self._retry_at = self._stalled, [], float("inf")
        for work in stalled:
            work.again()

    # --- the inbox ----------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Start a scan if one is due."""
        due = now >= self._next_scan or (self._look_now and now >= self._last_scan + SCAN_SECONDS)
        if self._scanning or not due or self._recovering:
            return
        self._scanning, self._look_now, self._last_scan = True, False, now
        verdicts, self._verdicts = self._verdicts, []
        self._off(self._scanner, functools.partial(self._survey, now, verdicts), self._surveyed)

    def _survey(self, now: float, verdicts: list[Callable[[], None]]) -> Survey:
        """On the scanner's thread."""
        for verdict in verdicts:
            verdict()
        verdicts.clear()
        scan, trouble = None, None
        try:
            self._watcher.check(self._watched_folders())
            self.spool.require_folders()
            scan = self._inbox.scan(now, self.config.watch, self.config.inbox.recursive)
            self.spool.require_space(self.config.limits.min_free_disk_mib)
        except Disk as e:
            trouble = _reason(e)
        paused, commands = control.read(self.spool.control)
        return Survey(scan, trouble, paused, commands)

    def _surveyed(self, survey: Survey) -> None:
        self._scanning = False
        self._next_scan = self._last_scan + self.config.watch.rescan_seconds
        if survey.trouble != self._trouble:
            self._trouble = survey.trouble
            if survey.trouble:
                log.get().warning("disk.trouble", reason=survey.trouble)
            else:
                log.get().info("disk.cured")
        if survey.paused != self._paused:
            self._paused = survey.paused
            log.get().info("daemon.paused" if survey.paused else "daemon.resumed")
        for command in survey.commands:
            self._obey(command)
        if scan := survey.scan:
            self._waiting = scan.waiting
            self._next_scan = min(self._next_scan, scan.next_look)
            self._quiet_since = scan.started if scan.found == 0 else None
            for offer in scan.offers:
                self._offered += 1
                self._last_activity = time.monotonic()
                self._off(
                    self._reader,
                    functools.partial(self._read, offer),
                    functools.partial(self._was_read, offer),
                )

    def _watched_folders(self) -> dict[Path, bool]:
        folders = {self.spool.control: False}
        if self._watch_mode() == "inotify":
            folders[self.spool.inbox] = self.config.inbox.recursive
        return folders

    def _watch_mode(self) -> Literal["inotify", "poll"]:
        mode = self.config.watch.mode
        if mode == "auto":
            return (
                "inotify"
                if not self.spool.inbox.is_dir() or sees_every_writer(self.spool.inbox)
                else "poll"
            )
        return mode

    def _read(self, offer: Offer) -> Request | RequestError | None:
        """On the reader's thread: what the file asks for, why it is refused, or None: it changed."""
        path = self.spool.inbox / offer.sub / offer.file
        return read_job_file(path, offer.file, self.config, offer.signature)

    def _was_read(self, offer: Offer, result: Request | RequestError | None) -> None:
        if result is None:
            self._offered -= 1
            self._verdicts.append(lambda: self._inbox.put_back(offer.path))
            self._wake_to_look()
        elif isinstance(result, RequestError) and offer.give_up is None:
            self._offered -= 1
            self._verdicts.append(lambda: self._inbox.object(offer.path, str(result)))
            self._wake_to_look()
        else:
            self._off(
                self._clerk,
                functools.partial(self._claim, offer),
                functools.partial(self._was_claimed, offer, result),
            )

    def _claim(self, offer: Offer) -> Unresolved | None:
        """On the clerk's thread. None: withdrawn."""
        self.spool.require_folders()
        source = self.spool.inbox / offer.sub / offer.file
        try:
            return self.spool.claim(offer.sub, offer.file)
        except FileNotFoundError:
            if os.path.lexists(source):
                raise
            return None
        except PermissionError as e:
            raise DiskTrouble(
                f"{names.printable(offer.path)} cannot be moved out of the inbox: {e.strerror}: {describe_permissions(source.parent)}"
            ) from None

    def _was_claimed(
        self, offer: Offer, result: Request | RequestError, claimed: Unresolved | None
    ) -> None:
        self._offered -= 1
        self._last_activity = time.monotonic()
        if claimed is None:
            self._verdicts.append(lambda: self._inbox.put_back(offer.path))
            return
        if isinstance(result, RequestError):
            self._refuse(claimed, result)
        else:
            self._off(
                self._clerk,
                functools.partial(self._resolve, claimed, offer, result),
                self._resolved,
            )

    def _resolve(
        self, claimed: Unresolved, offer: Offer | None, asked: Request | None
    ) -> Job | tuple[Unresolved, RequestError] | None:
        """On the clerk's thread. The claimed file is looked at again: a writer may hold it still."""
        self.spool.require_folders()
        drop = claimed.home / "drop" / claimed.sub / claimed.file
        if (
            offer is None
            or asked is None
            or not _same_content(fs.signature_of(drop), offer.signature)
        ):
            result = read_job_file(drop, claimed.file, self.config, None)
            if not isinstance(result, Request):
                return claimed, result or RequestError("changed while it was claimed")
            asked = result
        moment = offer.settled if offer else time.monotonic()
        asked = request.with_seeds(asked, claimed.id)
        return self.spool.resolve(
            claimed, asked, Settled(moment, self.spool.boot), self._settings()
        )

    def _resolved(self, result: Job | tuple[Unresolved, RequestError] | None) -> None:
        if isinstance(result, Job):
            log.get().info(
                "job.claimed",
                job=result.id,
                file=names.printable(result.path),
                images=len(result.specs),
                folder=result.folder,
            )
            self._accept(result)
        elif result is not None:
            self._refuse(*result)

    def _settings(self) -> Settings:
        return Settings(
            self.config.prompt,
            self.config.output,
            self.config.engine.max_attempts,
            self.config.engine.on_timeout,
        )

    def _refuse(self, claimed: Unresolved, error: RequestError) -> None:
        self._running[claimed.id] = Running(_nobody(claimed))  # keeps the drain waiting
        path = f"{claimed.sub}/{claimed.file}" if claimed.sub else claimed.file
        inode = _inode(claimed.home / "drop" / path)
        self._off(
            self._clerk,
            functools.partial(self.spool.refuse, claimed, error.problems),
            functools.partial(self._refused, claimed.id, path, inode),
        )

    def _refused(self, job_id: str, path: str, inode: int, record: ErrorRecord) -> None:
        del self._running[job_id]
        self.failures += 1
        log.get().warning("job.refused", file=names.printable(path), error=record.error)
        self._note_end(job_id, path, inode, "refused", None, record.error)

    # --- jobs ---------------------------------------------------------------------------------

    def _recover(self) -> tuple[list[Job], list[Unresolved]]:
        """On the clerk's thread."""
        jobs, unresolved = self.spool.recover()
        for job in jobs:
            publish.recover(job)
            for image in job.todo():
                if job.states.get(image) and job.states[image].deaths >= DEATHS_FAILED:
                    self.spool.fail_image(
                        job, image, f"the daemon died {DEATHS_FAILED} times with this image in hand"
                    )
        return jobs, unresolved

    def _recovered(self, left: tuple[list[Job], list[Unresolved]]) -> None:
        self._recovering = False
        jobs, unresolved = left
        if jobs or unresolved:
            log.get().info("spool.recovered", jobs=len(jobs), unresolved=len(unresolved))
        for job in jobs:
            self._accept(job)
        for claimed in unresolved:
            self._off(
                self._clerk, functools.partial(self._resolve, claimed, None, None), self._resolved
            )
        self._wake_to_look()

    def _accept(self, job: Job) -> None:
        running = self._running[job.id] = Running(job)
        self._last_activity = time.monotonic()
        if job.settings.prompt.overflow == "refuse" and not job.states:
            self._unmeasured.append(running)
            self._measure()
        else:
            self._enqueue(running)

    def _enqueue(self, running: Running) -> None:
        self._queue.add(running.job, running.job.todo())
        self._maybe_finish(running)

    def _measure(self) -> None:
        """Ask how long the prompts are of jobs that are refused when one is too long."""
        if self._engine and self._engine.is_ready:
            for running in self._unmeasured:
                ticket = self._next_ticket()
                self._measuring[ticket] = running
                self._engine.count_tokens(ticket, tuple(spec.prompt for spec in running.job.specs))
            self._unmeasured = []

    def _measured(self, answer: Tokens) -> None:
        running = self._measuring.pop(answer.ticket, None)
        if running is None or running.job.id not in self._running:
            return
        job, limit = running.job, running.job.settings.prompt.max_tokens
        problems = [
            Problem(
                f"image {spec.image}: the prompt has {count} tokens, more than prompt.max_tokens: {limit}",
                field="prompt",
            )
            for spec, count in zip(job.specs, answer.counts, strict=True)
            if count > limit
        ]
        if problems:
            self._off(
                self._clerk,
                functools.partial(self.spool.refuse_job, job, problems),
                functools.partial(self._refused, job.id, job.path, job.inode),
            )
        else:
            self._enqueue(running)

    def _maybe_finish(self, running: Running) -> None:
        """End the job if nothing of it is left to do or in flight."""
        if running.ending or running.busy or (running.job.todo() and not running.cancelled):
            return
        running.ending = True
        self._off(
            self._clerk,
            functools.partial(self._finish, running),
            functools.partial(self._job_ended, running),
        )

    def _finish(self, running: Running) -> JobOutcome:
        """On the clerk's thread."""
        self.spool.require_folders()
        return self.spool.finish(running.job, running.cancelled)

    def _job_ended(self, running: Running, outcome: JobOutcome) -> None:
        job = running.job
        del self._running[job.id]
        self._last_activity = time.monotonic()
        states = job.states.values()
        errors = [
            f"image {image}: {state.error}" for image, state in job.states.items() if state.error
        ]
        lasted = job.settled.milliseconds_to(time.monotonic(), self.spool.boot)
        write = log.get().info if outcome == "done" else log.get().warning
        write(
            f"job.{outcome}",
            job=job.id,
            file=names.printable(job.path),
            folder=job.folder,
            images=len(job.specs),
            rendered=sum(s.outcome == "rendered" for s in states),
            seconds=lasted and round(lasted / 1e3, 3),
            **({"error": "; ".join(errors[:3])} if errors else {}),
        )
        self.failures += outcome != "done"
        self._note_end(
            job.id, job.path, job.inode, outcome, job.folder, "; ".join(errors[:3]) or None
        )

    def _note_end(
        self,
        job_id: str,
        path: str,
        inode: int,
        outcome: Any,
        folder: str | None,
        error: str | None,
    ) -> None:
        self.finished.append(
            StatusFinished(
                id=job_id,
                file=names.printable(path),
                inode=inode,
                outcome=outcome,
                folder=folder,
                error=error,
                finished=clock.timestamp(),
            )
        )
        self._status_at = 0.0  # whoever waits for this job reads the status

    # --- commands -----------------------------------------------------------------------------

    def _obey(self, command: control.Command) -> None:
        if isinstance(command, control.Cancel):
            for target in command.targets:
                if running := self._running.get(target):
                    self._cancel(running)
        else:
            for target in command.targets:
                self._off(self._clerk, functools.partial(self._retry, target), self._retried)

    def _cancel(self, running: Running) -> None:
        if running.ending or not running.job.specs:
            return
        log.get().info("job.cancelling", job=running.job.id)
        running.cancelled = True
        self._queue.drop(running.job)
        if running in self._unmeasured:
            self._unmeasured.remove(running)
        for ticket, other in self._tickets.items():
            if other is running and self._engine:
                self._engine.cancel(ticket)
        self._maybe_finish(running)

    def _retry(self, target: str) -> Job | str | None:
        """On the clerk's thread. A text says why nothing is retried."""
        self.spool.require_folders()
        try:
            return self.spool.retry(target)
        except (UsageError, FileNotFoundError) as e:
            return f"cannot retry {names.printable(target)}: {e}"

    def _retried(self, result: Job | str | None) -> None:
        self._last_activity = time.monotonic()
        if isinstance(result, Job):
            log.get().info(
                "job.retried",
                job=result.id,
                file=names.printable(result.path),
                images=len(result.todo()),
            )
            self._accept(result)
        elif result:
            log.get().warning("job.not_retried", reason=result)
        self._wake_to_look()

    def _reload(self) -> None:
        self._notifier.reloading()
        try:
            assert self.config.file is not None
            new = config.load(self.config.file)
            merged, needs_restart = config.reloaded(self.config, new)
            config.refuse_what_is_not_ready(merged)
        except (ConfigError, AssertionError) as e:
            log.get().error("config.refused", error=str(e) or "there is no file to read again")
        else:
            self.config = merged
            self._queue.policy = merged.queue.policy
            log.set_up(merged.log.level, merged.log.format)
            log.get().info("config.reloaded", needs_restart=needs_restart)
            self._wake_to_look()
        self._notifier.ready()

    # --- the engine ---------------------------------------------------------------------------

    def _start_engine(self) -> None:
        self._lives += 1
        self._kill_reason = None
        self._engine = EngineProcess(self.config, time.monotonic())
        log.get().info("engine.starting", pid=self._engine.pid, life=self._lives)

    def _hear_engine(self, now: float) -> None:
        if self._engine is None:
            return
        ended = self._engine.has_ended()  # before reading: what it said last is heard first
        for answer in self._engine.answers(now):
            self._heed(answer, now)
        if ended:
            self._bury_engine(now)
        elif self._kill_reason is None and (reason := self._engine.overdue(now, self._limits())):
            log.get().error("engine.killed", pid=self._engine.pid, reason=reason)
            self._kill_reason = reason
            self._engine.kill()

    def _heed(self, answer: object, now: float) -> None:
        assert self._engine is not None
        if isinstance(answer, Stage):
            log.get().info("engine.stage", stage=answer.text)
        elif isinstance(answer, Ready):
            self._engine_ready(answer)
        elif isinstance(answer, Tokens):
            self._measured(answer)
        elif isinstance(answer, Began):
            self._image_began(answer.ticket)
        elif isinstance(answer, (Rendered, Failed, Cancelled)):
            running, image = self._tickets.pop(answer.ticket), self._engine.take(answer)
            if isinstance(answer, Rendered):
                self._image_rendered(running, image, answer, now)
                return
            image.pixels.close()
            running.busy -= 1
            if isinstance(answer, Failed):
                self._image_failed(running, image.spec, answer.error, answer.timed_out, now)
            else:
                self._put_back(running, image.spec)
            self._maybe_finish(running)

    def _engine_ready(self, answer: Ready) -> None:
        assert self._engine is not None
        self._info = answer.info
        self._nvml = Nvml(answer.info.device_index)
        seconds = round(time.monotonic() - self._engine.started, 1)
        log.get().info(
            "engine.ready",
            model=answer.info.model,
            device=answer.info.device,
            dtype=answer.info.dtype,
            seconds=seconds,
        )
        self._notifier.ready()
        self._measure()

    def _bury_engine(self, now: float) -> None:
        """The engine process is dead: charge whom it had in hand, and start another."""
        dead = self._engine
        assert dead is not None
        dead.reap()
        self._engine = None
        how = self._kill_reason or dead.how_it_ended()
        log.get().error("engine.died", pid=dead.pid, how=how, in_hand=len(dead.in_hand))
        if dead.cannot_start:
            self._end(dead.cannot_start.exit_status, reason=dead.cannot_start.error)
        elif not dead.is_ready:
            self._end(1, reason=f"the engine ended while {dead.stage}: {how}")
        began = False
        for ticket, image in dead.in_hand.items():
            running = self._tickets.pop(ticket)
            image.pixels.close()
            running.busy -= 1
            if image.began is not None:
                began = True
                timed_out = self._kill_reason is not None
                self._image_failed(
                    running,
                    image.spec,
                    f"the engine died: {how}" if not timed_out else how,
                    timed_out,
                    now,
                )
            else:
                self._put_back(running, image.spec)
            self._maybe_finish(running)
        self._unmeasured += self._measuring.values()
        self._measuring = {}
        self._idle_deaths = 0 if began or self.exit_status is not None else self._idle_deaths + 1
        if self._idle_deaths >= IDLE_DEATHS:
            self._end(
                1,
                reason=f"the engine died {IDLE_DEATHS} times in a row without an image in hand: {how}",
            )
        if self.exit_status is None and self._stop_at is None:
            self._start_engine()

    def _feed(self, now: float) -> None:
        """Keep the engine in work."""
        engine_ = self._engine
        if engine_ is None or not engine_.is_ready or self._hold() or self._kill_reason:
            return
        while len(engine_.in_hand) < DEPTH and self._publishing < PUBLISHING:
            taken = self._queue.take()
            if taken is None:
                return
            job, image = taken
            try:
                self.spool.take(job)
            except OSError as e:
                self._queue.put_back(job, image)
                self._trouble = _reason(e)
                log.get().warning("disk.trouble", reason=self._trouble)
                return
            running = self._running[job.id]
            running.busy += 1
            self._rendered += 1
            ticket = self._next_ticket()
            self._tickets[ticket] = running
            empty_cache = self._rendered % self.config.engine.empty_cache_every == 0
            engine_.render(
                ticket, Render(ticket, job.specs[image - 1], job.settings.prompt, empty_cache), now
            )

    def _hold(self) -> bool:
        """Whether no new image may begin."""
        return self._paused or self._trouble is not None or self._stop_at is not None

    def _image_began(self, ticket: int) -> None:
        assert self._engine is not None
        running, spec = self._tickets[ticket], self._engine.in_hand[ticket].spec
        try:
            self.spool.begin_image(running.job, spec.image)
        except OSError as e:
            log.get().warning("disk.trouble", reason=_reason(e))  # a death of ours goes uncounted

    def _image_rendered(
        self, running: Running, image: InHand, answer: Rendered, now: float
    ) -> None:
        assert self._info is not None
        assert image.began is not None
        self._idle_deaths = 0
        utilization = self._nvml.utilization_percent()
        self._window.add(now, answer.rendering.latency_ms.render, utilization)
        attempt = running.job.state(image.spec.image).attempts + 1
        publication = Publication(
            running.job,
            image.spec,
            image.pixels,
            answer.rendering,
            self._info,
            attempt,
            image.began,
            self._window.summary(),
            utilization,
        )
        self._publish(running, publication)

    def _publish(self, running: Running, publication: Publication) -> None:
        self._publishing += 1

        def run() -> str:
            self.spool.require_folders()
            return publication.run()

        self._off(
            self._publishers, run, functools.partial(self._image_published, running, publication)
        )

    def _image_published(self, running: Running, publication: Publication, file: str) -> None:
        self._publishing -= 1
        self._published += 1
        running.busy -= 1
        close = getattr(publication.pixels, "close", None)
        if close:
            close()
        spec, rendering = publication.spec, publication.rendering
        log.get().info(
            "image.published",
            job=running.job.id,
            image=spec.image,
            file=f"{running.job.folder}/{file}",
            seed=spec.seed,
            render_ms=rendering and round(rendering.latency_ms.render, 1),
        )
        self._maybe_finish(running)

    def _image_failed(
        self, running: Running, spec: ImageSpec, error: str, timed_out: bool, now: float
    ) -> None:
        """One attempt is charged; the last one decides."""
        job, state = running.job, running.job.state(spec.image)
        state.attempts += 1
        last = state.attempts >= job.settings.max_attempts
        log.get().warning(
            "image.failed",
            job=job.id,
            image=spec.image,
            attempt=state.attempts,
            error=error,
            last=last,
        )
        if not last:
            self._put_back(running, spec)
        elif (
            timed_out
            and job.settings.on_timeout == "placeholder"
            and self._info
            and not running.cancelled
        ):
            running.busy += 1
            pixels = picture.placeholder(spec.width, spec.height, error)
            self._publish(
                running,
                Publication(
                    job,
                    spec,
                    pixels,
                    None,
                    self._info,
                    state.attempts,
                    now,
                    self._window.summary(),
                    None,
                    error,
                ),
            )
        else:
            running.busy += 1
            text = f"{error} (attempt {state.attempts} of {job.settings.max_attempts})"
            self._off(
                self._clerk,
                functools.partial(self.spool.fail_image, job, spec.image, text),
                functools.partial(self._image_given_up, running),
            )

    def _image_given_up(self, running: Running, _: None) -> None:
        running.busy -= 1
        self._maybe_finish(running)

    def _put_back(self, running: Running, spec: ImageSpec) -> None:
        """The image was not rendered and has another try; a cancelled job wants none."""
        if not running.cancelled:
            self._queue.put_back(running.job, spec.image)
        try:
            self.spool.end_attempt(running.job, spec.image)
        except OSError as e:
            log.get().warning(
                "disk.trouble", reason=_reason(e)
            )  # a death of ours is counted too many

    def _limits(self) -> Limits:
        section = self.config.engine
        return Limits(
            section.load_timeout_seconds, section.kill_grace_seconds, section.stall_seconds
        )

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    # --- ending -------------------------------------------------------------------------------

    def _stop(self, at_once: bool) -> None:
        """SIGTERM, SIGINT: finish the image in hand if it can end in time; a second signal: at once."""
        if self._stop_at is None:
            log.get().info("daemon.stopping")
            self._notifier.stopping()
        self._stop_at = time.monotonic() + (0 if at_once else self.config.engine.stop_seconds)
        if self._engine:
            for ticket, image in self._engine.in_hand.items():
                if image.began is None:
                    self._engine.cancel(ticket)

    def _maybe_end(self, now: float) -> None:
        if self._stop_at is not None:
            in_hand = self._engine is not None and bool(self._engine.in_hand)
            saving = self._publishing > 0 and not self._stalled
            if now >= self._stop_at or not (in_hand or saving):
                self._end(0)
        elif self.drain and not self._recovering:
            self._maybe_drained()

    def _maybe_drained(self) -> None:
        busy = self._running or self._offered or self._verdicts or self._scanning
        blocked = self._stuck_reason()
        if blocked and (self._paused or self._trouble or self._stalled):
            if not self._tickets and not (self._publishing and not self._stalled):
                self._end(1, reason=f"cannot drain: {blocked}")
        elif not busy and self._engine and self._engine.is_ready:
            if self._quiet_since is not None and self._quiet_since >= self._last_activity:
                self._end(0)
            else:
                self._look_now = True

    def _stuck_reason(self) -> str | None:
        if self._paused:
            return "paused; resume with: promptdrop resume"
        return self._trouble or (self._stalled[0].reason if self._stalled else None)

    # --- reporting ----------------------------------------------------------------------------

    def snapshot(self) -> Status:
        """The state now; called from any thread."""
        return self._status(self._state())

    def _has_work(self) -> bool:
        return bool(self._running)

    def _report(self, now: float) -> None:
        self._notifier.ping(now)
        if self._on_change and now >= self._progress_at + PROGRESS_SECONDS:
            self._progress_at = now
            self._on_change(self._status(self._state()))
        if now < self._status_at + STATUS_SECONDS:
            return
        state = self._state()
        key = (
            state,
            self._published,
            len(self._running),
            tuple(self._waiting.items())[:LISTED],
            self._stuck_reason(),
            len(self.finished) and self.finished[-1].id,
            self._engine and self._engine.stage,
        )
        if (
            key == self._status_key
            and not self._tickets
            and now < self._status_at + HEARTBEAT_SECONDS
        ):
            return
        self._status_key, self._status_at = key, now
        status = self._status(state)
        self._notifier.status(one_line(status))
        self._write_status(status)

    def _write_status(self, status: Status) -> None:
        try:
            fs.write_quickly(self.spool.own / "status.json", to_bytes(status))
        except OSError:
            pass  # the disk's trouble is reported by those who need it to work

    def _state(self) -> Literal["starting", "ready", "rendering", "paused", "waiting", "stopping"]:
        if self._stop_at is not None:
            return "stopping"
        if self._paused:
            return "paused"
        if self._trouble or self._stalled:
            return "waiting"
        if self._engine is None or not self._engine.is_ready:
            return "starting"
        return "rendering" if self._tickets else "ready"

    def _status(self, state: Any) -> Status:
        window = self._window.summary()
        left = len(self._queue) + len(self._tickets)
        rate = window.images_per_second or (1e3 / window.p50_ms if window.p50_ms else None)
        return Status(
            state=state,
            reason=self._stuck_reason(),
            pid=os.getpid(),
            engine=self._status_engine(),
            current=self._current(),
            queue=StatusQueue(jobs=len(self._running), images=left, publishing=self._publishing),
            jobs=[
                _status_job(running.job)
                for running in list(self._running.values())[:LISTED]
                if running.job.specs
            ],
            waiting=[
                StatusWaiting(file=names.printable(path), why=why)
                for path, why in list(self._waiting.items())[:LISTED]
            ],
            finished=list(self.finished),
            window=window,
            eta_seconds=round(left / rate, 1) if rate else None,
            images_published=self._published,
            started=self._started,
            updated=clock.timestamp(),
            version=f"promptdrop {__version__}",
        )

    def _status_engine(self) -> StatusEngine:
        alive, info = self._engine, self._info
        state: Any = (
            "stopped"
            if alive is None
            else "ready"
            if alive.is_ready
            else "starting"
            if self._lives == 1
            else "replacing"
        )
        return StatusEngine(
            state=state,
            stage="ready" if state == "ready" else alive.stage if alive else "stopped",
            pid=alive.pid if alive else None,
            model=info.model if info else self.config.model.id,
            device=info.device if info else None,
            dtype=info.dtype if info else None,
        )

    def _current(self) -> StatusImage | None:
        for ticket, image in self._engine.in_hand.items() if self._engine else ():
            if image.began is not None and ticket in self._tickets:
                job = self._tickets[ticket].job
                return StatusImage(
                    job=job.id,
                    file=names.printable(job.path),
                    image=image.spec.image,
                    images=len(job.specs),
                    step=image.step,
                    steps=image.spec.steps,
                    seconds=round(time.monotonic() - image.began, 1),
                )
        return None


def one_line(status: Status) -> str:
    """The state in a line, for `systemctl status`."""
    if status.reason:
        return f"{status.state}: {status.reason}"
    if status.state == "starting":
        return f"{status.engine.stage}; {status.queue.images} images queued"
    parts: list[str] = [status.state]
    if status.current:
        parts.append(f"{status.current.file} {status.current.image}/{status.current.images}")
    parts.append(f"{status.queue.images} images queued")
    if status.window.images_per_second:
        parts.append(f"{status.window.images_per_second:.2f} images/s")
    return ", ".join(parts)


def _status_job(job: Job) -> StatusJob:
    return StatusJob(
        id=job.id,
        file=names.printable(job.path),
        inode=job.inode,
        folder=job.folder,
        images=len(job.specs),
        done=len(job.specs) - len(job.todo()),
    )


def _same_content(now: Any, then: Any) -> bool:
    """Whether inode, size and mtime are the same: the rename itself changed only ctime."""
    return now is not None and now[:3] == then[:3]


def _nobody(claimed: Unresolved) -> Job:
    """A job without images, for a file on its way to failed/."""
    settings = Settings(config.Prompt(), config.Output(), 1, "fail")
    return Job(
        claimed.id,
        claimed.home,
        claimed.sub,
        claimed.file,
        0,
        Path(),
        "",
        0,
        clock.timestamp(),
        Settled(0, ""),
        settings,
        (),
    )


def _inode(path: Path) -> int:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return 0


def _reason(error: BaseException) -> str:
    """The file, the error and what it means."""
    if isinstance(error, PromptdropError):
        return str(error)
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
