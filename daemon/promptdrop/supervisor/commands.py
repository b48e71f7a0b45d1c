"""Carry out the commands that people leave in the control folder: cancel and retry."""

import time
from collections.abc import Iterable
from functools import partial

from promptdrop import log, names, untrusted
from promptdrop.errors import UsageError
from promptdrop.intake.intake import Intake
from promptdrop.loop import Loop
from promptdrop.spool import control, retry
from promptdrop.spool.cleared import Sweep
from promptdrop.spool.job import Job
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.errands import SLICE_SECONDS, Errand, Progress
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.obeying import Obeying

SWEEP_SHARE = 0.05  # the part of the clerk's time that looks for files taken out of failed/ may use


class Commands:
    """Carries out each command once; its file is removed when all of it is done."""

    def __init__(self, loop: Loop, spool: Spool, jobs: Jobs, intake: Intake) -> None:
        self._loop, self._spool, self._jobs, self._intake = loop, spool, jobs, intake
        self._obeying = Obeying()
        self._sweep = Sweep(spool)
        self._next_sweep = 0.0  # monotonic seconds
        self._swept = 0.0  # seconds that this sweep has taken

    @property
    def is_busy(self) -> bool:
        """Whether a command is being carried out."""
        return bool(self._obeying)

    def surveyed(self, commands: Iterable[control.Command]) -> None:
        """Begin the commands that a look has found; see now and then what was taken out of failed/."""
        for command in commands:
            if command.file not in self._obeying:
                self._obeying.begin([command.file])
                self._spool.commands.begin(command.file)
                with self._spool.commands.removed_if_fatal(command.file):
                    self._begin(command)
        self._obeying.looked()
        if (now := time.monotonic()) >= self._next_sweep:
            self._begin_sweep(now)

    def _begin(self, command: control.Command) -> None:
        remove = partial(self._spool.commands.remove, command.file)
        if isinstance(command, control.Cancel):
            report = partial(self._went_on, command.file)
            self._jobs.cancel(command.targets, remove, report, command.file)
            return
        results: list[Job | str] = []
        errand = Errand(
            command.file,
            command.targets,
            do=partial(self._retry, results),
            remove=remove,
            report=partial(self._retried, command.file, results),
        )
        self._jobs.errands.begin(errand)

    def _went_on(self, file: str, progress: Progress) -> None:
        """Note what a slice of a command has come to."""
        if progress is Progress.DISK:
            self._spool.commands.set_aside(file)
        elif progress is Progress.LATER:
            self._spool.commands.wait(file, time.monotonic())
            self._obeying.leave([file])
        elif progress is Progress.DONE:
            self._spool.commands.end(file)
            self._obeying.done(file)

    # --- retry --------------------------------------------------------------------------------

    def _retry(self, results: list[Job | str], target: str) -> bool:
        """Retry one target. Adds the job to go on with, or a text that says why it is not retried.

        Thread: clerk.
        """
        self._spool.folders.require()
        try:
            results += [job] if (job := retry.retry(self._spool, target)) else []
        except (UsageError, FileNotFoundError, PermissionError, untrusted.NotPlain) as e:
            results.append(f"cannot retry {names.printable(target[:300])}: {e}")
        return True

    def _retried(self, file: str, results: list[Job | str], progress: Progress) -> None:
        """Go on with the jobs that a slice of a command has resumed."""
        with self._spool.commands.removed_if_fatal(file):
            for result in results:
                if isinstance(result, Job):
                    path, images = names.printable(result.path), len(result.todo())
                    log.get().info("job.retried", job=result.id, file=path, images=images)
                    self._jobs.accept(result)
                else:
                    log.get().warning("job.not_retried", reason=result)
        results.clear()
        self._went_on(file, progress)
        self._intake.last_activity = time.monotonic()
        self._intake.wake()

    # --- what was taken out of failed/ --------------------------------------------------------

    def _begin_sweep(self, now: float) -> None:
        self._next_sweep, self._swept = float("inf"), 0.0
        self._loop.off("clerk", self._go_on, self._go_on_done)

    def _go_on(self) -> list[tuple[str, str]]:
        """Look for the files of some parked jobs, and remove the jobs whose file is gone.

        Thread: clerk.
        """
        began = time.monotonic()
        removed = self._sweep.go_on(SLICE_SECONDS)
        self._swept += time.monotonic() - began
        return removed

    def _go_on_done(self, removed: list[tuple[str, str]]) -> None:
        for job_id, target in removed:
            log.get().info("job.forgotten", job=job_id, file=names.printable(target))
        if not self._sweep.is_over:
            self._loop.off("clerk", self._go_on, self._go_on_done)
            return
        rest = max(self._spool.config.watch.rescan_seconds, self._swept / SWEEP_SHARE)
        self._next_sweep = time.monotonic() + rest
