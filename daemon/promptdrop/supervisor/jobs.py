"""The life of a job: accepted, queued, cancelled, ended or refused."""

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from promptdrop import clock, log, names
from promptdrop.errors import Problem, RequestError
from promptdrop.intake.intake import Intake
from promptdrop.loop import Loop, Owner
from promptdrop.nouns import JobOutcome
from promptdrop.records import ErrorRecord, StatusFinished
from promptdrop.spool import ending, record
from promptdrop.spool.ids import is_job_id
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.errands import Errand, Errands, Progress
from promptdrop.supervisor.holding import Holding
from promptdrop.supervisor.measuring import Measuring
from promptdrop.supervisor.work import Running, Work

OPEN_IMAGES = 1000  # so many queued: a new job's detail is kept on the disk only
CANCEL_SHARE = 0.1  # to end a job takes about ten times as long as to record that it is cancelled
LISTED = 100  # ends that are remembered for the status


class Jobs:
    """Every job from its acceptance to its end."""

    def __init__(
        self, work: Work, loop: Loop, spool: Spool, intake: Intake, holding: Holding
    ) -> None:
        self.errands = Errands(loop)  # of commands
        self.measuring = Measuring(work, self._enqueue, self._refuse_too_long)
        self.finished: deque[StatusFinished] = deque(maxlen=LISTED)
        self.refusing = 0  # files on their way to failed/
        self._work, self._loop, self._spool, self._intake = work, loop, spool, intake
        self._holding = holding

    def accept(self, job: Job) -> None:
        """Take on a job to render: new, recovered or retried."""
        running = self._work.running[job.id] = Running(job, len(job.todo()))
        self._intake.last_activity = time.monotonic()
        if job.must_fit and job.is_fresh and not job.cancelled:
            self.measuring.add(running)
        else:
            self._enqueue(running)

    def _enqueue(self, running: Running) -> None:
        queue = self._work.queue
        if not running.job.cancelled:
            queue.add(running.job, running.job.todo())
            self._work.recall_less_urgent(running.job.priority)
            if len(queue) > OPEN_IMAGES:
                running.job.close()
        self.maybe_finish(running)

    # --- cancelling ---------------------------------------------------------------------------

    def cancel(
        self,
        ids: Sequence[str],
        remove: Callable[[], None],
        report: Callable[[Progress], None],
        name: str = "",
    ) -> None:
        """Withdraw jobs, of which no image begins from now on; those being rendered stop at their next step.

        Once that is recorded, `remove` takes the command `name` away on the clerk's thread. It is reported
        how that goes; LATER: the command stays, as it names a job that is claimed but not accepted yet.
        """
        running = self._work.running
        unknown = [job_id for job_id in ids if job_id not in running]
        named = [running[job_id] for job_id in ids if job_id in running]
        withdrawn = [one for one in named if not (one.ending or one.job.cancelled)]
        for one in withdrawn:
            self._withdraw(one)
        recorded: list[Running] = []
        errand = Errand(
            name,
            [*withdrawn, *unknown],
            do=partial(self._cancel, recorded),
            remove=remove,
            report=partial(self._cancelled, recorded, report),
            share=CANCEL_SHARE,
        )
        self.errands.begin(errand)

    def _withdraw(self, running: Running) -> None:
        running.job.cancelled = True
        running.busy += 1  # it does not end before this is recorded
        self._work.queue.drop(running.job)
        self._holding.forget(running.job)
        self.measuring.forget(running)
        self._work.stop(running)
        log.get().info("job.cancelling", job=running.job.id)

    def _cancel(self, recorded: list[Running], one: Running | str) -> bool:
        """Record durably that nobody wants a job; False for the id of one that is not accepted yet.

        Thread: clerk.
        """
        if isinstance(one, str):
            return not (is_job_id(one) and self._spool.paths.is_in_hand(one))
        record.cancel(one.job)
        recorded.append(one)
        return True

    def _cancelled(
        self, recorded: list[Running], report: Callable[[Progress], None], progress: Progress
    ) -> None:
        """End the jobs of which a slice has recorded that they are cancelled."""
        report(progress)
        for running in recorded:
            running.busy -= 1
            self.maybe_finish(running)
        recorded.clear()

    # --- refusing -----------------------------------------------------------------------------

    def refuse(self, claimed: Unresolved, error: RequestError) -> None:
        """Move a claimed file that is no job to failed/, with the reason."""
        self._send_to_failed(claimed, error.problems)

    def _refuse_too_long(self, running: Running, problems: list[Problem]) -> None:
        del self._work.running[running.job.id]
        self._send_to_failed(running.job, problems)

    def _send_to_failed(self, refused: Job | Unresolved, problems: Sequence[Problem]) -> None:
        self.refusing += 1
        work = partial(self._refuse, refused, problems)
        self._loop.off("clerk", work, partial(self._refuse_done, refused), owner=_owner(refused))

    def _refuse(self, refused: Job | Unresolved, problems: Sequence[Problem]) -> ErrorRecord:
        """Move the file to failed/, with the reason.

        Thread: clerk.
        """
        if isinstance(refused, Job):
            return ending.refuse_job(self._spool, refused, problems)
        return ending.refuse(self._spool, refused, problems)

    def _refuse_done(self, refused: Job | Unresolved, refusal: ErrorRecord) -> None:
        self.refusing -= 1
        self._intake.last_activity = time.monotonic()
        log.get().warning("job.refused", file=names.printable(refused.path), error=refusal.error)
        self._note_end(refused, "refused", None, refusal.error)

    # --- ending -------------------------------------------------------------------------------

    def image_ended(self, running: Running) -> None:
        """Count an image that was on its way to the disk: it is published or given up."""
        running.busy -= 1
        running.left -= 1
        self.maybe_finish(running)

    def maybe_finish(self, running: Running) -> None:
        """End the job if none of its images is left to do or in flight."""
        if running.ending or running.busy or (running.left and not running.job.cancelled):
            return
        running.ending = True
        then = partial(self._finish_done, running.job)
        self._loop.off("clerk", partial(self._finish, running.job), then, owner=_owner(running.job))

    def _finish(self, job: Job) -> JobOutcome:
        """Move the dropped file to its last place, and remove or park the job.

        Thread: clerk.
        """
        self._spool.folders.require()
        self._spool.folders.require_inner("outbox", job.folder)
        return ending.finish(self._spool, job)

    def _finish_done(self, job: Job, outcome: JobOutcome) -> None:
        del self._work.running[job.id]
        if not self._work.running:
            gc.collect()
        self._intake.last_activity = time.monotonic()
        errors = [
            f"image {n}: {state.error}" for n, state in sorted(job.states.items()) if state.error
        ]
        error = "; ".join(errors[:3]) or ("cancelled on request" if job.cancelled else None)
        lasted = job.settled.milliseconds_to(time.monotonic(), self._spool.boot)
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


def _owner(job: Job | Unresolved) -> Owner:
    """Say whose trouble it is when the end of a job meets trouble with a disk."""
    return Owner(job.shown, job.lane if isinstance(job, Job) else job.id)
