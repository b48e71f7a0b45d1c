"""All policy: what to do next when a drop, an answer, a death, a signal or time comes.

Everything here runs on the loop, decides from memory, and never imports torch.
"""

import gc
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any, Literal

from promptdrop import __version__, clock, config_file, fs, log, names, picture
from promptdrop.config import Config
from promptdrop.engines import engine
from promptdrop.errors import ConfigError, Problem, RequestError, UsageError
from promptdrop.intake.intake import Intake, Survey
from promptdrop.loop import PUBLISHERS, TROUBLE, Loop, Room, reason_of
from promptdrop.metrics import RollingWindow
from promptdrop.nouns import EngineInfo, ImageSpec, JobOutcome
from promptdrop.outbox import publish
from promptdrop.outbox.publish import Publication
from promptdrop.pool.link import EngineLink, InHand
from promptdrop.pool.messages import (
    Answer,
    Began,
    Cancelled,
    CannotStart,
    Failed,
    Placed,
    Ready,
    Render,
    Rendered,
    Stage,
    Tokens,
)
from promptdrop.pool.pool import UNLOADED, Backend, ChildProcesses, Ended, Pool, Slot
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
from promptdrop.request.problems import MAX_PROBLEMS
from promptdrop.sdnotify import Notifier
from promptdrop.spool import claim, control, ending, record, recovery, retry
from promptdrop.spool.job import DEATHS_FAILED, Job, Unresolved
from promptdrop.spool.permissions import why_not_moved
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.queue import Queue

STATUS_SECONDS = 1.0  # shortest time between two writes of status.json
HEARTBEAT_SECONDS = 10.0  # longest
PROGRESS_SECONDS = 0.1
REST_SECONDS = 30.0  # until an engine that could not be started, while others work, is tried again
IDLE_DEATHS = 5  # deaths in a row without an image in hand after which the engine is given up
OPEN_IMAGES = 1000  # queued, beyond which a new job's detail is kept on the disk only
# Full collections only when idle: with a hundred thousand jobs one would stop a turn for half a second.
# One of the middle generation, of at most 50,000 objects, costs 10 to 20 ms.
GC_THRESHOLDS = 5_000, 10, 1_000_000
ACCEPT_SECONDS = 0.02  # of one turn, for jobs left from before
RETRY_SECONDS = 0.1  # of the clerk's time at once, for a command with many targets
LISTED = 100  # jobs, files and ends in the status

State = Literal["starting", "ready", "rendering", "paused", "waiting", "stopping"]


@dataclass(slots=True)
class Running:
    """A claimed job that has not ended."""

    job: Job
    left: int  # images that are neither published nor given up
    alone: set[int] = field(default_factory=set)  # images of a batch that failed
    busy: int = 0  # images in the engine or on their way to the disk
    ending: bool = False


class Supervisor:
    """The daemon of one configuration. `run` returns the exit status."""

    def __init__(
        self,
        settings: Config,
        drain: bool = False,
        on_change: Callable[[Status], None] | None = None,
    ) -> None:
        self.config = settings
        self.spool = Spool(settings)
        self.exit_status: int | None = None
        self.ending: str | None = None  # why it ended, unless as asked
        self.finished: deque[StatusFinished] = deque(maxlen=LISTED)
        self._drain = drain
        self._on_change = on_change
        self._loop = Loop()
        self._intake = Intake(self._loop, self.spool, self)
        self._notifier = Notifier()

        self._queue = Queue(settings.queue.policy)
        self._running: dict[str, Running] = {}
        self._obeying: set[str] = set()  # commands that are being carried out
        self._turned_away: set[str] = (
            set()
        )  # NAME.cancel files that fit no job, for as long as they stand
        self._refusing = 0  # files on their way to failed/
        self._recovering = True
        self._left_over: deque[Job] = deque()  # recovered, not accepted yet

        self._pool = Pool(settings, _backend(settings, drain))
        self._ticket = secrets.randbits(40)  # engines that outlive us know those of our last life
        self._tickets: dict[int, Running] = {}  # images in the engines
        self._measuring: dict[int, Running] = {}  # jobs whose prompts an engine counts
        self._unmeasured: list[Running] = []

        self._idle_since = 0.0  # when the engines were last needed, on the monotonic clock

        self._window = RollingWindow(settings.metrics.window)
        self._published = 0
        self._publishing = 0

        self._trouble: str | None = None
        self._looked = False
        self._paused: str | None = None  # how to go on
        self._stop_at: float | None = None
        self._signals: list[int] = []
        self._started = clock.timestamp()
        self._status_at = self._progress_at = 0.0
        self._status_key: object = None
        self._shown = self._status("starting")  # what status.json says
        self._shared: Status | None = None  # what the outbox's says
        self._sharing = False
        self._shared_at = 0.0

    # --- a life -------------------------------------------------------------------------------

    def run(self) -> int:
        """The whole life of the daemon, from lock to exit status.

        Raises ConfigError, ModelError, SpoolBusy: it cannot start.
        """
        if self.config.engine.backend == "process":
            engine.require(self.config)
        self.spool.folders.require_mount()
        self.spool.folders.prepare()
        self.spool.lock.acquire()
        os.umask(0o022 | os.umask(0o022))  # what we make for ourselves, only we may change
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._startup()
        try:
            while self.exit_status is None:
                self._turn()
        finally:
            self._shutdown()
        return self.exit_status

    def _startup(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        # Somebody opened a file for writing just as inbox.is_open_for_writing asked: fcntl(2), leases.
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        self._intake.decide_watch()
        log.get().info(
            "daemon.started",
            pid=os.getpid(),
            root=str(self.spool.paths.root),
            watch=self._intake.watch,
            version=__version__,
        )
        self._paused = control.why_paused(self.spool.paths)
        if why := why_not_moved(self.spool.paths.inbox):
            log.get().warning("inbox.unusable", reason=f"the inbox {why}")
        self._export_metrics()
        self._write_status(self._shown)
        self._hear_engines(time.monotonic())  # starts them
        self._off("clerk", self._recover, self._recovered)

    def _export_metrics(self) -> None:
        """Once the spool is ours: a second daemon must end as such, not on the port."""
        if listen := self.config.metrics.listen:
            from promptdrop.supervisor import prometheus  # only who asks for it loads it

            prometheus.start(listen, lambda: self._shown)

    def _turn(self) -> None:
        deadline = self._next_deadline(time.monotonic())
        self._loop.wait(self._pool.readers(), self._pool.writers(), deadline)
        self._heed_signals()
        self._loop.run_results()
        now = time.monotonic()
        self._hear_engines(now)
        if not self._recovering:
            self._accept_left_over(now)
            self._intake.look(now)
        self._feed(now)
        self._maybe_unload(now)
        self._maybe_end(now)
        self._report(now)

    def _next_deadline(self, now: float) -> float:
        due = [now + HEARTBEAT_SECONDS, self._pool.next_deadline()]
        if not self._recovering:
            due.append(self._intake.next_look())
        if self._notifier.watchdog_seconds:
            due.append(now + self._notifier.watchdog_seconds / 2)
        if self._stop_at is not None:
            due.append(self._stop_at)
        if (after := self.config.engine.unload_after_seconds) and not self._pool.is_unloaded:
            due.append(max(now, self._idle_since + after))
        if self._running:
            due.append(self._status_at + STATUS_SECONDS)
        if self._shared is not self._shown and not (self._sharing or self._recovering):
            due.append(self._shared_at + STATUS_SECONDS)
        return min(due)

    def _shutdown(self) -> None:
        self._notifier.stopping()
        self._pool.close()
        self._intake.close()
        has_ended = self._loop.close()
        self._put_down_images()
        last = self._status("stopping")
        self._write_status(last)
        if has_ended and not self._why_held():  # an outbox in trouble is not waited for
            self._write_shared(last)
        if self._on_change:
            self._on_change(last)
        self.spool.lock.release()
        self._notifier.close()
        log.get().info("daemon.stopped", exit_status=self.exit_status, published=self._published)
        if not has_ended and self.exit_status is not None:
            log.get().error("disk.hangs", reason="a disk did not answer; ended without it")
            log.settle()
            os._exit(self.exit_status)  # the interpreter would wait for its threads
        log.settle()

    def _put_down_images(self) -> None:
        """Images in hand at an orderly stop are nobody's fault."""
        for running in self._running.values():
            for image, state in running.job.states.items():
                if state.outcome == "todo" and running.job.home.exists():
                    self._end_attempt(running.job, image)

    def _end(self, exit_status: int, reason: str | None = None) -> None:
        self.exit_status, self.ending = exit_status, reason
        if reason:
            log.get().error("daemon.ending", exit_status=exit_status, reason=reason)

    def _off(self, room: Room, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self._loop.off(room, function, then, self.config.watch.rescan_seconds)

    # --- signals and commands -----------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._loop.wake()

    def _heed_signals(self) -> None:
        signals, self._signals = self._signals, []
        for number in signals:
            if number == signal.SIGHUP:
                self._reload()
            else:
                self._stop(at_once=self._stop_at is not None)

    def _stop(self, at_once: bool) -> None:
        """Finish the image in hand if it can end in time; a second signal: at once."""
        log.get().info("daemon.stopping", at_once=at_once)
        self._notifier.stopping()
        self._stop_at = time.monotonic() + (0 if at_once else self.config.engine.stop_seconds)
        self._recall_prefetched()

    def _recall_prefetched(self) -> None:
        """No image that the engine has not begun shall begin; each comes back as Cancelled."""
        for _, link, ticket, image in self._pool.in_hand():
            if image.began is None:
                link.cancel(ticket)

    def _reload(self) -> None:
        self._notifier.reloading()
        try:
            if self.config.file is None:
                raise ConfigError("there is no file to read again")
            merged, needs_restart = config_file.reloaded(
                self.config, config_file.load(self.config.file)
            )
        except ConfigError as e:
            log.get().error("config.refused", error=str(e))
        else:
            self.config = self.spool.config = self._pool.settings = merged
            self._queue.policy = merged.queue.policy
            log.set_up(merged.log.level, merged.log.format)
            log.get().info("config.reloaded", needs_restart=needs_restart)
            self._intake.wake()
        self._notifier.ready()

    def surveyed(self, survey: Survey) -> None:
        """What the last look found outside the inbox."""
        self._looked = True
        if survey.trouble != self._trouble:
            self._trouble = survey.trouble
            if survey.trouble:
                log.get().warning("disk.trouble", reason=survey.trouble)
            else:
                log.get().info("disk.cured")
        if survey.paused != self._paused:
            self._paused = survey.paused
            log.get().info(
                "daemon.paused" if survey.paused else "daemon.resumed", reason=survey.paused
            )
            if survey.paused:
                self._recall_prefetched()
            else:
                self._load()
        for command in survey.commands:
            if command.file not in self._obeying:
                self._obey(command)
        if scan := survey.scan:
            self._turned_away &= scan.cancels.keys()
            heeded = self._obeying | self._turned_away
            if cancels := {path: t for path, t in scan.cancels.items() if path not in heeded}:
                self._heed_cancels(cancels)

    def _obey(self, command: control.Command) -> None:
        if isinstance(command, control.Retry):
            self._obey_retry(command, list(command.targets))
            return
        self._obeying.add(command.file)
        done = partial(control.done, self.spool.paths.control, command.file)
        work = partial(self._record_cancel, command.targets, done)
        self._off("clerk", work, partial(self._obeyed, command.file, self._cancel))

    def _obeyed(self, file: str, then: Callable[[Any], None], result: Any) -> None:
        self._obeying.discard(file)
        then(result)

    def _record_cancel(self, targets: Sequence[str], done: Callable[[], None]) -> Sequence[str]:
        """On the clerk's thread: durable before the command goes."""
        for target in targets:
            if running := self._running.get(target):
                record.cancel(running.job)
        done()
        return targets

    def _heed_cancels(self, cancels: dict[str, float]) -> None:
        """SUB/NAME.cancel in the inbox -> since when: all at once, there may be thousands."""
        self._obeying |= cancels.keys()
        jobs = [running.job for running in self._running.values()]
        then = partial(self._named_by_cancels, cancels)
        self._off("clerk", partial(_named, cancels, jobs), then)

    def _named_by_cancels(self, cancels: dict[str, float], named: dict[str, list[str]]) -> None:
        """Withdraw the one job that each names, or say why not: a few at a time, others drop too."""
        self._obeying -= cancels.keys()
        too_late = time.monotonic() - self.config.watch.give_up_seconds
        for path, since in cancels.items():
            ids = named[path]
            if len(ids) == 1:
                self._obeying.add(path)
                work = partial(
                    self._record_cancel, ids, partial(claim.take_cancel, self.spool, path)
                )
                self._off("clerk", work, partial(self._obeyed, path, self._cancel))
            elif since <= too_late and self._intake.has_room():
                self._turned_away.add(path)
                why = f"names {len(ids)} jobs: {', '.join(ids[:20])}" if ids else ""
                why = why or "names no job that waits or is being rendered"
                self._intake.turn_away(path, RequestError(why))

    def _cancel(self, targets: Sequence[str]) -> None:
        for running in [self._running[target] for target in targets if target in self._running]:
            if running.ending:
                continue
            log.get().info("job.cancelling", job=running.job.id)
            running.job.cancelled = True
            self._queue.drop(running.job)
            self._unmeasured = [other for other in self._unmeasured if other is not running]
            for _, link, ticket, _ in self._pool.in_hand():
                if self._tickets[ticket] is running:
                    link.cancel(ticket)
            self._maybe_finish(running)

    def _retry(
        self, command: control.Retry, left: list[str], results: list[Job | str]
    ) -> list[Job | str]:
        """On the clerk's thread. `left` and `results` last over trouble with a disk.

        Returns jobs to go on with, and texts that say why something is not retried. What takes
        longer is left for the clerk's next turn, when `_retried` asks for it.
        """
        self.spool.folders.require()
        until = time.monotonic() + RETRY_SECONDS
        while left and time.monotonic() < until:
            try:
                results += [job] if (job := retry.retry(self.spool, left[0])) else []
            except (UsageError, FileNotFoundError, PermissionError) as e:
                results.append(f"cannot retry {names.printable(left[0][:300])}: {e}")
            left.pop(0)
        if not left:
            control.done(self.spool.paths.control, command.file)
        return results

    def _retried(self, command: control.Retry, left: list[str], results: list[Job | str]) -> None:
        for result in results:
            if isinstance(result, Job):
                file, images = names.printable(result.path), len(result.todo())
                log.get().info("job.retried", job=result.id, file=file, images=images)
                self.accept(result)
            else:
                log.get().warning("job.not_retried", reason=result)
        if left:
            self._obey_retry(command, left)
        self._intake.last_activity = time.monotonic()
        self._intake.wake()

    def _obey_retry(self, command: control.Retry, left: list[str]) -> None:
        self._obeying.add(command.file)
        then = partial(self._obeyed, command.file, partial(self._retried, command, left))
        self._off("clerk", partial(self._retry, command, left, []), then)

    # --- jobs ---------------------------------------------------------------------------------

    def _recover(self) -> tuple[list[Job], list[Unresolved]]:
        """On the clerk's thread."""
        jobs, unresolved = recovery.recover(self.spool)
        for job in jobs:
            if job.is_fresh and job.place == "pending":
                continue  # nothing of it was ever begun
            publish.recover(job)
            for image in job.todo():
                if job.deaths(image) >= DEATHS_FAILED:
                    reason = f"the daemon died {DEATHS_FAILED} times with this image in hand"
                    record.fail_image(job, image, reason)
        return jobs, unresolved

    def _recovered(self, left: tuple[list[Job], list[Unresolved]]) -> None:
        self._recovering = False
        jobs, unresolved = left
        if jobs or unresolved:
            log.get().info("spool.recovered", jobs=len(jobs), unresolved=len(unresolved))
        for claimed in unresolved:
            self._intake.resolve_again(claimed)
        self._left_over.extend(jobs)
        self._intake.wake()

    def _accept_left_over(self, now: float) -> None:
        """Jobs from before, in slices: a turn stays short however many there are."""
        while self._left_over and time.monotonic() < now + ACCEPT_SECONDS:
            self.accept(self._left_over.popleft())
        if self._left_over:
            self._loop.wake()

    def accept(self, job: Job) -> None:
        """A job to render: new, recovered or retried."""
        running = self._running[job.id] = Running(job, len(job.todo()))
        self._intake.last_activity = time.monotonic()
        if job.must_fit and job.is_fresh and not job.cancelled:
            self._unmeasured.append(running)
            self._measure()
        else:
            self._enqueue(running)

    def _enqueue(self, running: Running) -> None:
        if not running.job.cancelled:
            self._queue.add(running.job, running.job.todo())
            self._recall_less_urgent(running.job.priority)
            if len(self._queue) > OPEN_IMAGES:
                running.job.close()
        self._maybe_finish(running)

    def _recall_less_urgent(self, priority: int) -> None:
        """A higher priority goes in front at the next image, also of one that is prefetched."""
        for _, link, ticket, image in self._pool.in_hand():
            if image.began is None and self._tickets[ticket].job.priority < priority:
                link.cancel(ticket)

    def refuse(self, claimed: Unresolved, error: RequestError) -> None:
        """A claimed file that is no job goes to failed/, with the reason."""
        self._refusing += 1
        self._off(
            "clerk",
            partial(ending.refuse, self.spool, claimed, error.problems),
            partial(self._refused, claimed),
        )

    def _refused(self, claimed: Unresolved, record: ErrorRecord) -> None:
        self._refusing -= 1
        self._intake.last_activity = time.monotonic()
        log.get().warning("job.refused", file=names.printable(claimed.path), error=record.error)
        self._note_end(claimed, "refused", None, record.error)

    def _measure(self) -> None:
        """Ask how long the prompts are of jobs that are refused when one is too long."""
        if link := self._pool.first_warm():
            for running in self._unmeasured:
                ticket = self._next_ticket()
                self._measuring[ticket] = running
                texts = dict.fromkeys(text for _, _, text in _texts(running.job))
                link.count_tokens(ticket, tuple(texts), time.monotonic())
            self._unmeasured = []

    def _measured(self, answer: Tokens) -> None:
        running = self._measuring.pop(answer.ticket, None)
        if running is None or running.job.cancelled:
            return
        job, limit = running.job, running.job.settings.prompt.max_tokens
        texts = dict.fromkeys(text for _, _, text in _texts(job))
        counts = dict(zip(texts, answer.counts, strict=True))
        problems = [
            Problem(
                f"image {spec.image}: the {field} has {counts[text]} tokens with its template,"
                f" more than prompt.max_tokens: {limit}",
                field=field,
            )
            for spec, field, text in _texts(job)
            if counts[text] > limit
        ][:MAX_PROBLEMS]
        if not problems:
            self._enqueue(running)
            return
        del self._running[job.id]
        self._refusing += 1
        then = partial(self._refused, job.unresolved())
        self._off("clerk", partial(ending.refuse_job, self.spool, job, problems), then)

    def _maybe_finish(self, running: Running) -> None:
        """End the job if nothing of it is left to do or in flight."""
        if running.ending or running.busy or (running.left and not running.job.cancelled):
            return
        running.ending = True
        self._off("clerk", partial(self._finish, running), partial(self._job_ended, running))

    def _finish(self, running: Running) -> JobOutcome:
        """On the clerk's thread."""
        self.spool.folders.require()
        return ending.finish(self.spool, running.job)

    def _job_ended(self, running: Running, outcome: JobOutcome) -> None:
        job = running.job
        del self._running[job.id]
        if not self._running:
            gc.collect()
        self._intake.last_activity = time.monotonic()
        errors = [f"image {image}: {s.error}" for image, s in sorted(job.states.items()) if s.error]
        error = "; ".join(errors[:3]) or ("cancelled on request" if job.cancelled else None)
        lasted = job.settled.milliseconds_to(time.monotonic(), self.spool.boot)
        write = log.get().info if outcome == "done" else log.get().warning
        write(
            f"job.{outcome}",
            job=job.id,
            file=names.printable(job.path),
            folder=job.folder,
            images=job.images,
            rendered=sum(state.outcome == "rendered" for state in job.states.values()),
            seconds=None if lasted is None else round(lasted / 1e3, 3),
            **({"error": error} if error else {}),
        )
        self._note_end(job, outcome, job.folder, error)

    def _note_end(
        self, ended: Job | Unresolved, outcome: Any, folder: str | None, error: str | None
    ) -> None:
        self.finished.append(
            StatusFinished(
                id=ended.id,
                file=names.printable(ended.path),
                inode=ended.inode,
                outcome=outcome,
                folder=folder,
                error=error,
                finished=clock.timestamp(),
            )
        )
        self._status_at = 0.0  # whoever waits for this job reads the status

    # --- the engines --------------------------------------------------------------------------

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def _hear_engines(self, now: float) -> None:
        for slot, link, news in self._pool.hear(now, may_start=self._may_start_engines()):
            if isinstance(news, Ended):
                self._bury(slot, link)
            else:
                self._heed(slot, link, news, now)

    def _may_start_engines(self) -> bool:
        return self.exit_status is None and self._stop_at is None

    def _heed(self, slot: Slot, link: EngineLink, answer: Answer, now: float) -> None:
        if isinstance(answer, Stage):
            log.get().info("engine.stage", engine=slot.name, stage=answer.text)
        elif isinstance(answer, Placed):
            log.get().info("engine.placed", engine=slot.name, host=answer.host, pid=answer.pid)
        elif isinstance(answer, Ready):
            self._engine_ready(slot, link, answer.info)
        elif isinstance(answer, CannotStart):
            self._cannot_start(slot, answer.error, answer.exit_status)
        elif isinstance(answer, Tokens):
            self._measured(answer)
        elif isinstance(answer, Began):
            self._begin_attempt(self._tickets[answer.ticket].job, link.in_hand[answer.ticket].spec)
        elif isinstance(answer, Rendered):
            running, image = self._tickets.pop(answer.ticket), link.take(answer)
            self._image_rendered(slot, running, image, answer, now)
        elif isinstance(answer, (Failed, Cancelled)):
            running, image = self._tickets.pop(answer.ticket), link.take(answer)
            image.pixels.close()
            running.busy -= 1
            if isinstance(answer, Failed) and answer.images > 1:
                self._batch_failed(running, image.spec, answer.error)
            elif isinstance(answer, Failed):
                self._image_failed(running, image.spec, answer.error, answer.timed_out)
            else:
                self._put_back(running, image.spec)

    def _engine_ready(self, slot: Slot, link: EngineLink, info: EngineInfo) -> None:
        slot.info = info
        log.get().info(
            "engine.ready",
            engine=slot.name,
            model=info.model,
            host=link.host,
            device=info.device,
            dtype=info.dtype,
            seconds=round(time.monotonic() - link.started, 1),
        )
        self._notifier.ready()
        self._measure()

    def _cannot_start(self, slot: Slot, reason: str, exit_status: int) -> None:
        """The daemon ends, at once, however long the engine takes to die; unless others can work."""
        slot.rest(reason, time.monotonic() + REST_SECONDS)
        if self._pool.is_hopeless():
            self._end(exit_status, reason)
        else:
            log.get().error(
                "engine.not_started", engine=slot.name, reason=reason, retry_seconds=REST_SECONDS
            )

    def _maybe_unload(self, now: float) -> None:
        """Give the devices back when they were not needed for a while, and take them again."""
        if (after := self.config.engine.unload_after_seconds) is None:
            return
        waits = bool(len(self._queue) or self._unmeasured) and not self._is_held()
        if waits or self._tickets or self._measuring:
            self._load()
            self._idle_since = now
        elif not self._pool.are_loaded:
            self._idle_since = now
        elif now >= self._idle_since + after and not self._pool.is_unloaded:
            self._pool.unload(now)

    def _load(self) -> None:
        self._idle_since = time.monotonic()
        if self._pool.is_unloaded:
            self._pool.is_unloaded = False
            self._loop.wake()

    def _bury(self, slot: Slot, dead: EngineLink) -> None:
        """An engine is dead: charge whom it had in hand. Another takes its place."""
        if slot.is_unloading:
            log.get().info("engine.unloaded", engine=slot.name, pid=dead.pid)
            return
        how = dead.killed or dead.how_it_ended()
        event = "engine.lost" if dead.is_lost else "engine.died"
        hand = len(dead.in_hand)
        log.get().error(
            event, engine=slot.name, host=dead.host, pid=dead.pid, how=how, in_hand=hand
        )
        error = dead.killed or f"the engine died: {how}"
        if (
            not dead.is_ready
            and not dead.is_lost
            and not slot.trouble
            and self._may_start_engines()
        ):
            self._cannot_start(slot, f"while {dead.stage}: {error}", 1)
        began = any(image.began is not None for image in dead.in_hand.values())
        for ticket, image in dead.in_hand.items():
            running = self._tickets.pop(ticket)
            image.pixels.close()
            running.busy -= 1
            if image.began is None:
                self._put_back(running, image.spec)
            elif dead.is_lost:
                self._image_lost(running, image.spec, counts=dead.gone is not None)
            elif image.batch > 1 or image.is_shared:
                self._batch_failed(running, image.spec, error)
            else:
                self._image_failed(running, image.spec, error, dead.timed_out)
        asked = [ticket for ticket in dead.questions if ticket in self._measuring]
        self._unmeasured += [self._measuring.pop(ticket) for ticket in asked]
        self._measure()
        if dead.is_lost and not dead.is_ready and self._may_start_engines():
            slot.due = time.monotonic() + self.config.watch.rescan_seconds
        was_good = began or (dead.is_lost and dead.is_ready)
        slot.idle_deaths = 0 if was_good else slot.idle_deaths + 1
        if slot.idle_deaths >= IDLE_DEATHS and self.exit_status is None:
            slot.idle_deaths = 0
            reason = f"the engine died {IDLE_DEATHS} times in a row without an image in hand: {how}"
            self._cannot_start(slot, reason, 1)

    def _feed(self, now: float) -> None:
        """Keep the engines in work."""
        if not self._is_held():
            self._send_images(now)
            self._pool.begin()

    def _send_images(self, now: float) -> None:
        publishers = max(PUBLISHERS, 2 * len(self._pool.slots) * self.config.engine.batch)
        while self._publishing < publishers and (slot := self._pool.has_room()):
            taken = self._queue.take()
            if taken is None:
                self._pool.share()
                return
            job, image = taken
            try:
                claim.take(job)
                self._send(slot, self._running[job.id], image, now)
            except OSError as e:
                self._queue.put_back(job, image)
                self._trouble = reason_of(e)
                log.get().warning("disk.trouble", reason=self._trouble)
                return

    def _send(self, slot: Slot, running: Running, image: int, now: float) -> None:
        """Raises OSError: out of descriptors or memory."""
        assert slot.engine
        job, ticket = running.job, self._next_ticket()
        empty_cache = (slot.sent + 1) % self.config.engine.empty_cache_every == 0
        spec, prompt, kind = job.specs[image - 1], job.settings.prompt, _kind(running, image)
        slot.engine.render(ticket, Render(ticket, spec, prompt, kind, empty_cache), now)
        running.busy += 1
        slot.sent += 1
        slot.has_news = True
        self._tickets[ticket] = running

    def _is_held(self) -> bool:
        """Whether no new image may begin."""
        blind = not self._looked  # the disks and the pause are not known yet
        return blind or bool(self._paused or self._trouble) or self._stop_at is not None

    # --- images -------------------------------------------------------------------------------

    def _image_rendered(
        self, slot: Slot, running: Running, image: InHand, answer: Rendered, now: float
    ) -> None:
        assert slot.info
        assert image.began is not None
        slot.idle_deaths = 0
        utilization = answer.rendering.utilization_percent
        self._window.add(now, answer.rendering.latency_ms.render, utilization)
        publication = Publication(
            job=running.job,
            spec=image.spec,
            pixels=image.pixels,
            rendering=answer.rendering,
            engine=slot.info,
            engine_name=slot.name,
            attempt=running.job.state(image.spec.image).attempts + 1,
            started=image.began,
            window=self._window.summary(),
        )
        self._publish(running, publication)

    def _image_failed(self, running: Running, spec: ImageSpec, error: str, timed_out: bool) -> None:
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
        if not last or running.job.cancelled:
            self._put_back(running, spec, behind=True)  # what may be poison does not come next
        elif timed_out and job.settings.on_timeout == "placeholder" and (info := self._any_info()):
            running.busy += 1
            self._publish(running, self._placeholder(job, spec, info, error))
        else:
            running.busy += 1
            text = f"{error} (attempt {state.attempts} of {job.settings.max_attempts})"
            work = partial(record.fail_image, job, spec.image, text)
            self._off("clerk", work, partial(self._image_given_up, running))

    def _image_lost(self, running: Running, spec: ImageSpec, counts: bool) -> None:
        """Nobody is charged; but an image that hosts die of has the fate of one that daemons die of."""
        state = running.job.state(spec.image)
        state.deaths += counts
        if state.deaths < DEATHS_FAILED or running.job.cancelled:
            self._put_back(running, spec, behind=True)
            return
        running.busy += 1
        text = f"hosts were lost, or the daemon died, {DEATHS_FAILED} times with this image in hand"
        work = partial(record.fail_image, running.job, spec.image, text)
        self._off("clerk", work, partial(self._image_given_up, running))

    def _batch_failed(self, running: Running, spec: ImageSpec, error: str) -> None:
        """Whose fault it was nobody knows: nobody is charged, and each is rendered alone."""
        log.get().warning("image.alone", job=running.job.id, image=spec.image, error=error)
        running.alone.add(spec.image)
        self._put_back(running, spec)

    def _any_info(self) -> EngineInfo | None:
        return next((slot.info for slot in self._pool.slots if slot.info), None)

    def _placeholder(self, job: Job, spec: ImageSpec, info: EngineInfo, error: str) -> Publication:
        pixels = picture.placeholder(spec.width, spec.height, error)
        return Publication(
            job=job,
            spec=spec,
            pixels=pixels,
            rendering=None,
            engine=info,
            engine_name=None,
            attempt=job.state(spec.image).attempts,
            started=time.monotonic(),
            window=self._window.summary(),
            error=error,
        )

    def _image_given_up(self, running: Running, _: None) -> None:
        running.busy -= 1
        running.left -= 1
        self._maybe_finish(running)

    def _put_back(self, running: Running, spec: ImageSpec, behind: bool = False) -> None:
        """The image was not rendered and has another try; a cancelled job wants none."""
        if not running.job.cancelled:
            self._queue.put_back(running.job, spec.image, behind)
        self._end_attempt(running.job, spec.image)
        self._maybe_finish(running)

    def _begin_attempt(self, job: Job, spec: ImageSpec) -> None:
        try:
            record.begin_image(job, spec.image)
        except OSError as e:
            log.get().warning("disk.trouble", reason=reason_of(e))  # a death of ours goes uncounted

    def _end_attempt(self, job: Job, image: int) -> None:
        try:
            record.end_attempt(job, image)
        except OSError as e:
            log.get().warning("disk.trouble", reason=reason_of(e))  # one death too many is counted

    def _publish(self, running: Running, publication: Publication) -> None:
        self._publishing += 1

        def run() -> str:
            self.spool.folders.require()
            return publication.run()

        self._off("publisher", run, partial(self._image_published, running, publication))

    def _image_published(self, running: Running, publication: Publication, file: str) -> None:
        self._publishing -= 1
        self._published += 1
        running.busy -= 1
        running.left -= 1
        publication.close()
        spec, rendering = publication.spec, publication.rendering
        log.get().info(
            "image.published",
            job=running.job.id,
            image=spec.image,
            file=f"{running.job.folder}/{file}",
            seed=spec.seed,
            render_ms=round(rendering.latency_ms.render, 1) if rendering else None,
        )
        self._maybe_finish(running)

    # --- ending -------------------------------------------------------------------------------

    def _maybe_end(self, now: float) -> None:
        if self.exit_status is not None:
            return
        if self._stop_at is not None:
            in_hand = bool(self._tickets)
            saving = self._publishing > 0 and not self._loop.trouble
            if now >= self._stop_at or not (in_hand or saving):
                self._end(0)
        elif self._drain:
            self._maybe_drained()

    def _maybe_drained(self) -> None:
        if reason := self._why_held():
            saving = self._publishing > 0 and not self._loop.trouble
            if (self._pool.trouble or not self._tickets) and not saving:
                self._end(1, f"cannot drain: {reason}")
        elif not (
            self._recovering or self._left_over or self._running or self._refusing or self._obeying
        ):
            ready = self._pool.is_unloaded or self._pool.first_warm() is not None
            if self._intake.is_quiet() and ready:
                self._end(0)
            elif self._intake.obstacle and ready and self._intake.is_idle():
                self._end(1, f"cannot drain: a file {self._intake.obstacle}")

    def _why_held(self) -> str | None:
        """Why work does not go on by itself."""
        return (
            self._paused
            or self._pool.trouble
            or self._trouble
            or next(iter(self._loop.trouble.values()), None)
        )

    def _reason(self) -> str | None:
        """What the status says about it; something slow is not held."""
        return self._why_held() or self._loop.slow(time.monotonic())

    # --- reporting ----------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        if not self._pool.outlive_kill:
            self._notifier.ping(now)  # else systemd may do what we cannot
        if self._on_change and now >= self._progress_at + PROGRESS_SECONDS:
            self._progress_at = now
            self._on_change(self._status(self._state()))
        self._share_status(now)
        if now < self._status_at + STATUS_SECONDS:
            return
        last = self.finished[-1].id if self.finished else None
        stages = [
            (slot.trouble, self._pool.is_unloaded, slot.engine and slot.engine.stage)
            for slot in self._pool.slots
        ]
        waiting = tuple(islice(self._intake.waiting.items(), LISTED))
        jobs = len(self._running)
        key = (self._state(), self._reason(), self._published, jobs, last, stages, waiting)
        is_old = now >= self._status_at + HEARTBEAT_SECONDS
        if key == self._status_key and not self._tickets and not is_old:
            return
        self._status_key, self._status_at = key, now
        self._shown = self._status(self._state())
        self._notifier.status(one_line(self._shown))
        self._write_status(self._shown)

    def _write_status(self, status: Status) -> None:
        try:
            fs.write_quickly(self.spool.paths.status, to_bytes(status))
        except OSError:
            pass  # the disk's trouble is reported by those who need it to work

    def _share_status(self, now: float) -> None:
        """The same in the outbox, at most once a second and off the loop: a share may hang."""
        if self._shared is self._shown or self._sharing:
            return
        if self._recovering or now < self._shared_at + STATUS_SECONDS:
            return
        self._shared, self._shared_at, self._sharing = self._shown, now, True
        self._off("herald", partial(self._write_shared, self._shown), self._was_shared)

    def _was_shared(self, _: None) -> None:
        self._sharing = False

    def _write_shared(self, status: Status) -> None:
        """On the herald's thread, and at the end."""
        try:
            self.spool.folders.require()
            mode = int(self.config.output.mode, 8)
            fs.write_quickly(self.spool.paths.shared_status, to_bytes(status), mode)
        except TROUBLE:
            pass  # reported by those who need the outbox to work

    def _state(self) -> State:
        if self._stop_at is not None:
            return "stopping"
        if self._paused:
            return "paused"
        if self._pool.trouble or self._trouble or self._loop.trouble:
            return "waiting"
        if self._pool.is_unloaded:
            return "ready"
        if not self._pool.first_warm():
            return "starting"
        return "rendering" if self._tickets else "ready"

    def _status(self, state: State) -> Status:
        window = self._window.summary()
        left = len(self._queue) + len(self._tickets)
        warm = sum(slot.warm is not None for slot in self._pool.slots)
        rate = window.images_per_second or (warm * 1e3 / window.p50_ms if window.p50_ms else None)
        engines = [self._status_engine(slot) for slot in self._pool.slots or [Slot(1)]]
        waiting = islice(self._intake.waiting.items(), LISTED)
        return Status(
            state=state,
            reason=self._reason(),
            pid=os.getpid(),
            engine=next((e for e in engines if e.state == "ready"), engines[0]),
            engines=engines,
            current=next((e.current for e in engines if e.current), None),
            watch=self._intake.watch,
            queue=StatusQueue(jobs=len(self._running), images=left, publishing=self._publishing),
            jobs=[_status_job(running) for running in islice(self._running.values(), LISTED)],
            waiting=[StatusWaiting(file=names.printable(path), why=why) for path, why in waiting],
            finished=list(self.finished),
            window=window,
            eta_seconds=round(left / rate, 1) if rate else None,
            images_published=self._published,
            started=self._started,
            updated=clock.timestamp(),
            version=f"promptdrop {__version__}",
        )

    def _status_engine(self, slot: Slot) -> StatusEngine:
        link, info = slot.engine, slot.info
        state: Literal["starting", "ready", "replacing", "stopped"]
        if link is None or self._pool.is_unloaded:
            state = "stopped"
        elif link.is_ready:
            state = "ready"
        else:
            state = "starting" if slot.lives == 1 else "replacing"
        stage = state if link is None or link.is_ready else link.stage
        return StatusEngine(
            name=slot.name,
            state=state,
            stage=UNLOADED if self._pool.is_unloaded else stage,
            reason=slot.trouble,
            pid=link.pid if link else None,
            host=link.host if link else None,
            model=info.model if info else self.config.model.id,
            device=info.device if info else None,
            dtype=info.dtype if info else None,
            current=self._status_image(link) if link else None,
        )

    def _status_image(self, link: EngineLink) -> StatusImage | None:
        for ticket, image in link.in_hand.items():
            if image.began is not None and ticket in self._tickets:
                job = self._tickets[ticket].job
                return StatusImage(
                    job=job.id,
                    file=names.printable(job.path),
                    image=image.spec.image,
                    images=job.images,
                    step=image.step,
                    steps=image.spec.evaluations,
                    seconds=round(time.monotonic() - image.began, 1),
                )
        return None


def _backend(settings: Config, drain: bool) -> Backend:
    """Where engines run; those of a daemon that drains are given back when it has ended."""
    if settings.engine.backend == "process":
        return ChildProcesses(settings)
    from promptdrop.cluster.backend import RayCluster

    return RayCluster(settings, outlives=not drain)


def one_line(status: Status) -> str:
    """The state in a line, for `systemctl status`."""
    if status.reason:
        return f"{status.state}: {status.reason}"
    if status.state == "starting":
        return f"{status.engine.stage}; {status.queue.images} images queued"
    parts: list[str] = [UNLOADED if status.engine.stage == UNLOADED else status.state]
    if status.current:
        parts.append(f"{status.current.file} {status.current.image}/{status.current.images}")
    parts.append(f"{status.queue.images} images queued")
    if status.window.images_per_second:
        parts.append(f"{status.window.images_per_second:.2f} images/s")
    return ", ".join(parts)


def _named(cancels: Iterable[str], jobs: Iterable[Job]) -> dict[str, list[str]]:
    """The ids of the jobs that each SUB/NAME.cancel fits: NAME is a FILE, a JOB or an id."""
    known: dict[str, list[str]] = {}
    for job in jobs:
        for name in {names.fold(job.path), names.fold(job.folder), f"/{job.id.casefold()}"}:
            known.setdefault(name, []).append(job.id)
    named = {}
    for path in cancels:
        name = names.fold(names.split(path)[0])
        ids = known.get(name, []) + known.get(f"/{name.rpartition('/')[2]}", [])
        named[path] = list(dict.fromkeys(ids))
    return named


def _kind(running: Running, image: int) -> tuple[Any, ...] | None:
    """What images that are rendered together have in common; None: what may be poison is alone."""
    job, state = running.job, running.job.states.get(image)
    if image in running.alone or (state and (state.attempts or state.deaths)):
        return None
    return job.specs[image - 1].kind, job.settings.prompt, job.priority


def _texts(job: Job) -> list[tuple[ImageSpec, str, str]]:
    """Every text of a job that the encoder is given: (image, field, text)."""
    texts = [(spec, "prompt", spec.prompt) for spec in job.specs]
    return texts + [
        (spec, "negative_prompt", spec.negative_prompt)
        for spec in job.specs
        if spec.negative_prompt and spec.guidance_scale > 0
    ]


def _status_job(running: Running) -> StatusJob:
    job = running.job
    return StatusJob(
        id=job.id,
        file=names.printable(job.path),
        inode=job.inode,
        folder=job.folder,
        images=job.images,
        done=job.images - running.left,
    )
