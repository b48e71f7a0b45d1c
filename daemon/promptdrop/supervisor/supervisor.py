"""The life of the daemon: start, turns of the loop, signals, end. All else has a module of its own.

    gate         what may begin now, and why the rest waits
    work, queue  the jobs and images in hand, which the modules share; which image is next
    recovery     jobs of the daemon's last life
    jobs         accepted, cancelled, ended or refused; measuring: too long a prompt refuses a job
    feeding      queued images go to engines
    engines      what follows from their answers and deaths; unloading them when idle
    images       what comes of an image that an engine held; publishing: on its way to the outbox
    commands     `promptdrop cancel` and `retry`; cancels: NAME.cancel in the inbox; errands: in slices
    status       what the daemon does; reporting: to whom it is shown, and when

Everything here runs on the loop, except functions whose docstring names a room. Nothing imports torch.
"""

import gc
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

from promptdrop import captured, clock, config_file, log, signals
from promptdrop.config import Config
from promptdrop.engines import engine
from promptdrop.errors import ConfigError, RequestError
from promptdrop.intake.intake import Intake, Survey
from promptdrop.loop import Loop
from promptdrop.pool.pool import Backend, ChildProcesses, Pool
from promptdrop.records import Status, StatusFinished
from promptdrop.sdnotify import Notifier
from promptdrop.spool import control
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.permissions import why_not_moved
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.cancels import Cancels
from promptdrop.supervisor.commands import Commands
from promptdrop.supervisor.engines import Engines
from promptdrop.supervisor.feeding import Feeder
from promptdrop.supervisor.gate import Gate
from promptdrop.supervisor.holding import Holding
from promptdrop.supervisor.images import Images
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.publishing import Publishing
from promptdrop.supervisor.recovery import Recovery
from promptdrop.supervisor.reporting import Reporter
from promptdrop.supervisor.status import Composer
from promptdrop.supervisor.work import Work
from promptdrop.troubles import Stuck
from promptdrop.version import __version__

# Full collections only when idle: with a hundred thousand jobs one would stop a turn for half a second.
# One of the middle generation, of at most 50,000 objects, costs 10 to 20 ms.
GC_THRESHOLDS = 5_000, 10, 1_000_000
STUCK_NAMED = 10  # files that hold up a drain
TICK_SECONDS = 0.5  # the longest wait while a limit runs, so that a loop that stood still knows it


class Supervisor:
    """The daemon of one configuration. `run` returns the exit status."""

    def __init__(
        self,
        settings: Config,
        drain: bool = False,
        on_change: Callable[[Status], None] | None = None,
    ) -> None:
        self.config = settings
        self.spool = spool = Spool(settings)
        self._drain = drain
        self._signals: list[int] = []
        self._notifier = Notifier()
        self._presence = clock.Presence(0.0)
        self._loop = loop = Loop(settings.watch.rescan_seconds)
        self._intake = intake = Intake(loop, spool, self)
        self._pool = pool = Pool(settings, _backend(settings, drain))
        self._gate = gate = Gate(loop, pool)
        self._work = work = Work(pool)
        holding = Holding(work.queue)
        self._jobs = jobs = Jobs(work, loop, spool, intake, holding)
        self._recovery = Recovery(loop, spool, intake, self.accept)
        self._commands = Commands(loop, spool, jobs, intake)
        self._cancels = Cancels(work, gate, loop, spool, jobs, intake)
        self._publishing = Publishing(loop, spool, holding, jobs.image_ended)
        self._images = Images(work, loop, jobs, self._publishing)
        self._feeder = Feeder(work, gate, loop, jobs, holding, self._publishing)
        self._engines = Engines(work, gate, loop, self._images, jobs.measuring, self._notifier)
        composer = Composer(work, gate, intake, jobs, self._images, self._publishing)
        self._reporter = Reporter(
            work, loop, spool, self._recovery, composer, self._notifier, on_change=on_change
        )

    @property
    def finished(self) -> deque[StatusFinished]:
        """The jobs that ended last, and the files that were refused."""
        return self._jobs.finished

    @property
    def ending(self) -> str | None:
        """The reason why the daemon ended; None if it was asked to."""
        return self._gate.ending

    # --- a life -------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the daemon until it ends. Returns the exit status.

        Raises ConfigError, ModelError, SpoolBusy: it cannot start.
        """
        if self.config.engine.backend == "process":
            engine.require(self.config)
        self.spool.folders.require_mount()
        self.spool.folders.prepare()
        self.spool.lock.acquire()
        captured.keep_last_words(self.spool.paths.last_words)
        os.umask(0o022 | os.umask(0o022))  # only we may change the files that we make for ourselves
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._startup()
        try:
            while self._gate.exit_status is None:
                self._turn()
        finally:
            self._shutdown()
        return self._gate.exit_status

    def _startup(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._signals += signals.noted()
        # Sent if somebody opens a file just as intake/writers.py takes a lease on it: fcntl(2).
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        self._intake.decide_watch()
        log.get().info(
            "daemon.started",
            pid=os.getpid(),
            root=str(self.spool.paths.root),
            watch=self._intake.watch,
            version=__version__,
        )
        self._gate.paused = control.why_paused(self.spool.paths)
        if why := why_not_moved(self.spool.paths.inbox):
            log.get().warning("inbox.unusable", reason=f"the inbox {why}")
        self._export_metrics()
        self._reporter.start()
        self._heed_signals()  # no engine is begun to be killed at once
        now = time.monotonic()
        self._presence = clock.Presence(now)
        self._engines.hear(now)  # starts them
        self._recovery.start()

    def _export_metrics(self) -> None:
        """Start Prometheus. After the lock, so that a second daemon exits 75, not with "address in use"."""
        if listen := self.config.metrics.listen:
            from promptdrop.supervisor import prometheus  # loaded only if it is asked for

            prometheus.start(listen, lambda: self._reporter.shown)

    def _turn(self) -> None:
        before = time.monotonic()
        deadline = self._next_deadline(before)
        self._loop.wait(self._pool.readers(), self._pool.writers(), deadline)
        self._heed_signals()
        self._loop.run_results()
        now = time.monotonic()
        if away := self._presence.away(now, planned=max(0.0, deadline - before)):
            self._move_deadlines(away)
        self._engines.hear(now)
        if not self._recovery.is_looking:
            self._recovery.go_on(now)
            self._intake.look(now)
        self._feeder.feed(now)
        self._engines.maybe_unload(now)
        self._maybe_end(now)
        self._report(now)

    def _move_deadlines(self, seconds: float) -> None:
        """Charge nobody for time in which this process stood still, perhaps engines and writers, too."""
        log.get().info("daemon.stood_still", seconds=round(seconds, 1))
        self._pool.move_deadlines(seconds)
        self._intake.move_deadlines(seconds)
        if self._gate.stop_at is not None:
            self._gate.stop_at += seconds

    def _report(self, now: float) -> None:
        self._reporter.report(now)

    def _next_deadline(self, now: float) -> float:
        due = [self._reporter.next_deadline(now), self._engines.next_deadline(now)]
        if not self._recovery.is_looking:
            due.append(self._intake.next_look())
        if self._gate.stop_at is not None:
            due.append(self._gate.stop_at)
        if self._gate.stop_at or self._intake.waiting or self._pool.next_deadline() < float("inf"):
            due.append(now + TICK_SECONDS)
        return min(due)

    def _shutdown(self) -> None:
        self._notifier.stopping()
        self._pool.close()
        self._intake.close()
        has_ended = self._loop.close()
        self._images.put_down_all()
        # An outbox in trouble is not waited for.
        share = has_ended and not self._gate.why_held()
        has_answered = self._reporter.report_last(time.monotonic(), share)
        self.spool.lock.release()
        self._notifier.close()
        status, published = self._gate.exit_status, self._publishing.published
        log.get().info("daemon.stopped", exit_status=status, published=published)
        if not (has_ended and has_answered) and status is not None:
            log.get().error("disk.hangs", reason="a disk did not answer; ended without it")
            log.settle()
            os._exit(status)  # the interpreter would wait for its threads
        log.settle()

    # --- signals ------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._loop.wake()

    def _heed_signals(self) -> None:
        signals, self._signals = self._signals, []
        for number in signals:
            if number == signal.SIGHUP:
                self._reload()
            else:
                self._stop(at_once=self._gate.stop_at is not None)

    def _stop(self, at_once: bool) -> None:
        """Begin to stop: wait engine.stop_seconds for images in hand; `at_once`, after a second signal, not."""
        log.get().info("daemon.stopping", at_once=at_once)
        self._notifier.stopping()
        patience = 0 if at_once else self.config.engine.stop_seconds
        self._gate.stop_at = time.monotonic() + patience
        self._work.recall_prefetched()

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
            self._loop.retry_seconds = merged.watch.rescan_seconds
            self._work.queue.policy = merged.queue.policy
            log.set_up(merged.log.level, merged.log.format)
            log.get().info("config.reloaded", needs_restart=needs_restart)
            self._intake.wake()
        self._notifier.ready()

    # --- what comes in ------------------------------------------------------------------------

    def accept(self, job: Job) -> None:
        """Take on a job, new or of the last life."""
        self._jobs.accept(job)

    def refuse(self, claimed: Unresolved, error: RequestError) -> None:
        """Move a claimed file that is no job to failed/, with the reason."""
        self._cancels.refused(claimed.path)
        self._jobs.refuse(claimed, error)

    def surveyed(self, survey: Survey) -> None:
        """Act on what the last look found: a pause, trouble, commands and marks that cancel."""
        if self._gate.surveyed(survey):
            if survey.paused:
                self._work.recall_prefetched()
            else:
                self._engines.load()
        if not self._recovery.is_over:
            return  # a command may name a job that is not known yet
        self._commands.surveyed(survey.commands)
        if survey.scan:
            self._cancels.surveyed(survey.scan.cancels)

    # --- ending -------------------------------------------------------------------------------

    def _maybe_end(self, now: float) -> None:
        if self._gate.exit_status is not None:
            return
        if (stop_at := self._gate.stop_at) is not None:
            if now >= stop_at or not (self._work.tickets or self._publishing.is_saving):
                self._gate.end(0)
        elif self._drain:
            self._maybe_drained()

    def _maybe_drained(self) -> None:
        if reason := self._gate.why_held():
            in_hand = self._work.tickets and not self._pool.trouble
            if not (in_hand or self._publishing.is_saving):
                self._gate.end(1, f"cannot drain: {reason}")
            return
        if not (self._pool.is_unloaded or self._pool.first_warm()):
            return
        stuck = list(self._gate.stuck())
        if not self._is_busy():
            if self._intake.is_quiet():
                self._gate.end(0)
            elif self._intake.obstacle and self._intake.is_idle() and not stuck:
                self._gate.end(1, f"cannot drain: {self._intake.obstacle}")
        if stuck and self._intake.is_stuck() and not self._is_working():
            self._gate.end(1, _cannot_drain(stuck))

    def _is_working(self) -> bool:
        """Whether anything is left to do that is not stuck."""
        return bool(
            self._work.tickets
            or len(self._work.queue)
            or self._publishing.under_way
            or self._jobs.measuring.waiting
            or self._jobs.measuring.asked
            or self._loop.is_working
        )

    def _is_busy(self) -> bool:
        """Whether a job has not ended, or a command is being carried out."""
        return bool(
            not self._recovery.is_over
            or self._recovery.troubled
            or self._work.running
            or self._jobs.refusing
            or self._commands.is_busy
            or self._cancels.is_busy
        )


def _cannot_drain(stuck: list[Stuck]) -> str:
    """Name what holds up a drain."""
    named = "; ".join(f"{one.name}: {one.why}" for one in stuck[:STUCK_NAMED])
    more = f"; and {len(stuck) - STUCK_NAMED} more" if len(stuck) > STUCK_NAMED else ""
    return f"cannot drain: stuck: {named}{more}"


def _backend(settings: Config, drain: bool) -> Backend:
    """Make the backend that starts engines. Engines of a daemon that drains end with it."""
    if settings.engine.backend == "process":
        return ChildProcesses(settings)
    from promptdrop.cluster.backend import RayCluster

    return RayCluster(settings, outlives=not drain)
