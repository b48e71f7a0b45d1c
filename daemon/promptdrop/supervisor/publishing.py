"""Publish images: the way from an engine's memory to the outbox."""

from collections.abc import Callable
from functools import partial

from promptdrop import log
from promptdrop.loop import Loop
from promptdrop.outbox.publish import Publication
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.work import Running


class Publishing:
    """Sends publications to the publishers and counts them."""

    def __init__(self, loop: Loop, spool: Spool, image_ended: Callable[[Running], None]) -> None:
        self.under_way = 0
        self.published = 0  # since the daemon started
        self._loop, self._spool, self._image_ended = loop, spool, image_ended

    @property
    def is_saving(self) -> bool:
        """Whether images are under way and no trouble with a disk holds them up."""
        return self.under_way > 0 and not self._loop.trouble

    def publish(self, running: Running, publication: Publication) -> None:
        """Make an image visible in the outbox; `running.busy` counts it already."""
        self.under_way += 1
        work = partial(self._publish, publication)
        self._loop.off("publisher", work, partial(self._publish_done, running, publication))

    def _publish(self, publication: Publication) -> str:
        """Encode and save. Returns the image's file name.

        Thread: publisher.
        """
        self._spool.folders.require()
        return publication.run()

    def _publish_done(self, running: Running, publication: Publication, file: str) -> None:
        self.under_way -= 1
        self.published += 1
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
        self._image_ended(running)
