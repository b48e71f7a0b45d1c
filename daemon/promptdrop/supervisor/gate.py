"""Decide what may begin now: not all may during a pause, trouble with a disk, a stop or the end."""

from collections.abc import Iterator

from promptdrop import log
from promptdrop.intake.intake import Survey
from promptdrop.loop import Loop, reason_of
from promptdrop.pool.pool import Pool
from promptdrop.troubles import Stuck


class Gate:
    """Knows whether images and engines may begin."""

    def __init__(self, loop: Loop, pool: Pool) -> None:
        self.paused: str | None = None  # why no image is begun, and how to go on
        self.trouble: str | None = None  # with a folder or its disk
        self.stop_at: float | None = None  # when a stop waits no longer, monotonic seconds
        self.exit_status: int | None = None  # set: the daemon ends
        self.ending: str | None = None  # why the daemon ends; None: it was asked to
        self._loop, self._pool = loop, pool
        self._is_open = False

    def open(self) -> None:
        """Let images begin from now on, as far as nothing holds them.

        Before, disks, a pause and the jobs that were cancelled while no daemon ran are not known.
        """
        self._is_open = True

    @property
    def lets_images_begin(self) -> bool:
        """Whether a new image may begin."""
        is_held = self.paused or self.trouble or self.stop_at is not None
        return self._is_open and not is_held

    @property
    def lets_engines_begin(self) -> bool:
        """Whether a new engine may be started."""
        return self.exit_status is None and self.stop_at is None

    def stuck(self) -> Iterator[Stuck]:
        """Yield the files that wait for trouble of their own, while others go on."""
        return self._loop.troubles.own()

    def why_held(self) -> str | None:
        """Say why work does not go on; None if it does."""
        return self.paused or self._pool.trouble or self.trouble or self._loop.troubles.everybodys()

    def reason(self, now: float) -> str | None:
        """Text for Status.reason: why work is held, else which thread is slow."""
        return self.why_held() or self._loop.slow(now)

    def surveyed(self, survey: Survey) -> bool:
        """Take in what a look found. Returns whether a pause began or ended."""
        if survey.trouble != self.trouble:
            self.trouble = survey.trouble
            if survey.trouble:
                log.get().warning("disk.trouble", reason=survey.trouble)
            else:
                log.get().info("disk.cured")
                self._loop.try_again()
        if survey.paused == self.paused:
            return False
        self.paused = survey.paused
        event = "daemon.paused" if survey.paused else "daemon.resumed"
        log.get().info(event, reason=survey.paused)
        return True

    def disk_failed(self, error: OSError) -> None:
        """Hold new images until the next look finds no trouble with the disks."""
        self.trouble = reason_of(error)
        log.get().warning("disk.trouble", reason=self.trouble)

    def end(self, exit_status: int, reason: str | None = None) -> None:
        """End the daemon after this turn. reason: None if it was asked to end."""
        self.exit_status, self.ending = exit_status, reason
        if reason:
            log.get().error("daemon.ending", exit_status=exit_status, reason=reason)
