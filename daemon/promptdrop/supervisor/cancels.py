"""Obey NAME.cancel in the inbox: withdraw the one job that it names, or say why not."""

import time
from collections.abc import Iterable
from functools import partial

from promptdrop import names
from promptdrop.errors import RequestError
from promptdrop.intake.inbox import those_of
from promptdrop.intake.intake import Intake
from promptdrop.loop import Loop
from promptdrop.spool import claim
from promptdrop.spool.job import Job
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.errands import Progress
from promptdrop.supervisor.gate import Gate
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.obeying import Obeying
from promptdrop.supervisor.work import Work


class Cancels:
    """Obeys each NAME.cancel once; one that names no job goes to failed/ after a while."""

    def __init__(
        self, work: Work, gate: Gate, loop: Loop, spool: Spool, jobs: Jobs, intake: Intake
    ) -> None:
        self._work, self._gate, self._loop, self._spool = work, gate, loop, spool
        self._jobs, self._intake = jobs, intake
        self._obeying = Obeying()
        self._turned_away: set[str] = set()  # marks that fit no job, as long as they stand

    @property
    def is_busy(self) -> bool:
        """Whether a NAME.cancel is being obeyed."""
        return bool(self._obeying)

    def surveyed(self, found: dict[str, float]) -> None:
        """Obey the marks that a look has found, as there may be thousands, in one go; then open the gate.

        found: SUB/NAME.cancel -> when it was first seen, monotonic seconds.
        """
        self._turned_away &= found.keys()
        cancels = {
            path: since
            for path, since in found.items()
            if path not in self._obeying and path not in self._turned_away
        }
        if cancels:
            self._obeying.begin(cancels)
            jobs = [running.job for running in self._work.running.values()]
            work = partial(_find_jobs, list(cancels), jobs, list(self._intake.arriving))
            self._loop.off("clerk", work, partial(self._find_jobs_done, cancels))
        else:
            self._gate.open()
        self._obeying.looked()

    def refused(self, path: str) -> None:
        """Note that a file was moved from the inbox to failed/: its name is free for another."""
        if path in self._turned_away:
            self._turned_away.discard(path)
            self._obeying.done(path)

    def _find_jobs_done(self, cancels: dict[str, float], named: dict[str, list[str]]) -> None:
        """Withdraw the job of each mark that names just one; move a few of the other marks to failed/.

        The rest of those follows later, so that they do not hold up dropped files. A mark that is not
        in `named` waits, too: its file is on the way to a job.
        """
        self._obeying.leave(cancels)
        too_late = time.monotonic() - self._work.config.watch.give_up_seconds
        for path, since in cancels.items():
            if (ids := named.get(path)) is None:
                continue
            if len(ids) == 1:
                self._obeying.begin([path])
                remove = partial(claim.take_cancel, self._spool, path)
                self._jobs.cancel(ids, remove, partial(self._went_on, path), path)
            elif since <= too_late and self._intake.has_room():
                self._turned_away.add(path)
                why = f"names {len(ids)} jobs: {', '.join(ids[:20])}" if ids else ""
                why = why or "names no job that waits or is being rendered"
                self._intake.turn_away(path, RequestError(why))
        self._gate.open()

    def _went_on(self, path: str, progress: Progress) -> None:
        """Note what became of a mark."""
        if progress is Progress.DONE:
            self._obeying.done(path)
        elif progress is Progress.LATER:
            self._obeying.leave([path])


def _find_jobs(
    cancels: Iterable[str], jobs: Iterable[Job], arriving: Iterable[str]
) -> dict[str, list[str]]:
    """Return the ids of the jobs that each SUB/NAME.cancel fits: NAME is a FILE, a JOB or an id.

    One that fits no job but a file of `arriving` is left out.

    Thread: clerk.
    """
    known: dict[str, list[str]] = {}
    for job in jobs:
        for name in {names.fold(job.path), names.fold(job.folder), f"/{job.id.casefold()}"}:
            known.setdefault(name, []).append(job.id)
    named = {}
    for path in cancels:
        name = names.fold(names.split(path)[0])
        ids = known.get(name, []) + known.get(f"/{name.rpartition('/')[2]}", [])
        named[path] = list(dict.fromkeys(ids))
    for path in those_of(cancels, arriving):
        if not named[path]:
            del named[path]
    return named
