"""Publish images: the way from an engine's memory to the outbox."""

from collections.abc import Callable
from functools import partial

from promptdrop import log
from promptdrop.loop import Loop, Owner
from promptdrop.outbox.publish import Publication
from promptdrop.spool.outbox import FolderLost
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.holding import Holding
from promptdrop.supervisor.work import Running

LOSSES = 5  # of a job's folder in a row, after which its next loss is trouble to be waited out


class Publishing:
    """Sends publications to the publishers and counts them."""

    def __init__(
        self,
        loop: Loop,
        spool: Spool,
        holding: Holding,
        image_ended: Callable[[Running], None],
    ) -> None:
        self.under_way = 0  # those that wait for a disk of their own are not counted
        self.stalled = 0  # ... but here
        self.published = 0  # since the daemon started
        self._loop, self._spool, self._holding = loop, spool, holding
        self._image_ended = image_ended

    @property
    def is_saving(self) -> bool:
        """Whether images are under way and no trouble with a disk holds them up."""
        return self.under_way > 0 and not self._loop.troubles.everybodys()

    @property
    def set_aside(self) -> int:
        """Count the images that do not begin, because others of their job or lane cannot be saved."""
        return self._holding.images

    def publish(self, running: Running, publication: Publication) -> None:
        """Make an image visible in the outbox; `running.busy` counts it already."""
        self.under_way += 1
        self._start(running, publication)

    def _start(self, running: Running, publication: Publication) -> None:
        work = partial(self._publish, publication)
        then = partial(self._publish_done, running, publication)
        self._loop.off("publisher", work, then, owner=self._owner(running))

    def _owner(self, running: Running) -> Owner:
        stalled = partial(self._stalled, running)
        return Owner(running.job.shown, running.job.lane, stalled)

    def _stalled(self, running: Running, begins: bool) -> None:
        """Give the place of an image that waits for a disk of its own to others, or take one again."""
        self.under_way += -1 if begins else 1
        self.stalled += 1 if begins else -1
        self._holding.stalled(running, begins)

    def _publish(self, publication: Publication) -> str | FolderLost:
        """Encode and save. Returns the image's file name.

        Thread: publisher.
        """
        self._spool.folders.require()
        self._spool.folders.require_inner("outbox", publication.job.folder)
        try:
            return publication.run(self._spool.outbox)
        except FolderLost as e:
            publication.losses += 1
            if publication.losses % LOSSES == 0:
                raise
            return e

    def _publish_done(
        self, running: Running, publication: Publication, result: str | FolderLost
    ) -> None:
        if isinstance(result, FolderLost):
            renew = partial(self._renew, publication)
            then = partial(self._renew_done, running, publication)
            self._loop.off("clerk", renew, then, owner=self._owner(running))
            return
        self.under_way -= 1
        self.published += 1
        publication.close()
        spec, rendering = publication.spec, publication.rendering
        log.get().info(
            "image.published",
            job=running.job.id,
            image=spec.image,
            file=f"{running.job.folder}/{result}",
            seed=spec.seed,
            render_ms=round(rendering.latency_ms.render, 1) if rendering else None,
        )
        self._image_ended(running)

    def _renew(self, publication: Publication) -> None:
        """Give a job whose folder was taken away another.

        Thread: clerk.
        """
        self._spool.folders.require()
        self._spool.folders.require_inner("outbox", publication.job.folder)
        self._spool.outbox.renew(publication.job)

    def _renew_done(self, running: Running, publication: Publication, _: None) -> None:
        job = running.job
        log.get().info("image.again", job=job.id, image=publication.spec.image, folder=job.folder)
        self._start(running, publication)
