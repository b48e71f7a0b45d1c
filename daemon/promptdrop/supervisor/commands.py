"""Carry out the commands that people leave in the control folder: cancel and retry."""

import time
from collections.abc import Iterable
from functools import partial

from promptdrop import log, names
from promptdrop.errors import UsageError
from promptdrop.intake.intake import Intake
from promptdrop.loop import Loop
from promptdrop.spool import control, retry
from promptdrop.spool.job import Job
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.obeying import Obeying

RETRY_SECONDS = 0.1  # that the clerk spends at once on a command with many targets


class Commands:
    """Carries out each command once; its file is removed when all of it is done."""

    def __init__(self, loop: Loop, spool: Spool, jobs: Jobs, intake: Intake) -> None:
        self._loop, self._spool, self._jobs, self._intake = loop, spool, jobs, intake
        self._obeying = Obeying()

    @property
    def is_busy(self) -> bool:
        """Whether a command is being carried out."""
        return bool(self._obeying)

    def surveyed(self, commands: Iterable[control.Command]) -> None:
        """Begin the commands that a look has found."""
        for command in commands:
            if command.file in self._obeying:
                continue
            self._obeying.begin([command.file])
            if isinstance(command, control.Retry):
                self._obey_retry(command.file, list(command.targets))
            else:
                remove = partial(control.done, self._spool.paths.control, command.file)
                self._jobs.cancel(command.targets, remove, partial(self._obeying.end, command.file))
        self._obeying.looked()

    def _obey_retry(self, file: str, left: list[str]) -> None:
        then = partial(self._retry_done, file, left)
        self._loop.off("clerk", partial(self._retry, file, left, []), then)

    def _retry(self, file: str, left: list[str], results: list[Job | str]) -> list[Job | str]:
        """Retry as many targets as one turn of the clerk has time for; the rest stays in `left`.

        `left` and `results` keep what was done when trouble with a disk repeats this. Returns the jobs to go on with, and texts
        that say why something is not retried.

        Thread: clerk.
        """
        self._spool.folders.require()
        until = time.monotonic() + RETRY_SECONDS
        while left:
            try:
                results += [job] if (job := retry.retry(self._spool, left[0])) else []
            except (UsageError, FileNotFoundError, PermissionError) as e:
                results.append(f"cannot retry {names.printable(left[0][:300])}: {e}")
            left.pop(0)
            if time.monotonic() >= until:
                break
        if not left:
            control.done(self._spool.paths.control, file)
        return results

    def _retry_done(self, file: str, left: list[str], results: list[Job | str]) -> None:
        for result in results:
            if isinstance(result, Job):
                path, images = names.printable(result.path), len(result.todo())
                log.get().info("job.retried", job=result.id, file=path, images=images)
                self._jobs.accept(result)
            else:
                log.get().warning("job.not_retried", reason=result)
        if left:
            self._obey_retry(file, left)
        else:
            self._obeying.done(file)
        self._intake.last_activity = time.monotonic()
        self._intake.wake()
