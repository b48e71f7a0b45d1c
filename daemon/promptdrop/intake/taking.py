"""Take one file: read it, claim it, resolve it. Each step runs in a room, again after disk trouble."""

import errno
import time

from promptdrop import fs, names, untrusted
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.intake.inbox import Offer
from promptdrop.intake.reading import read_job_file
from promptdrop.nouns import Request
from promptdrop.request.parse import with_seeds
from promptdrop.spool import claim as claims
from promptdrop.spool.detail import ClaimedSettings, Settled
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.permissions import describe_permissions, why_not_moved
from promptdrop.spool.spool import Spool


def read(spool: Spool, offer: Offer) -> Request | RequestError | None:
    """Read an offered file; None if it has changed since it was offered. Raises OSError.

    Thread: reader.
    """
    settings = spool.config.in_folder(offer.sub)
    try:
        with untrusted.below(spool.paths.inbox, offer.sub) as folder:
            return read_job_file(folder / offer.file, offer.file, settings, offer.signature)
    except (FileNotFoundError, untrusted.NotPlain):
        return None  # its folder was taken away, or swapped for something else


def claim(spool: Spool, offer: Offer) -> Unresolved | str | None:
    """Move an offered file out of the inbox.

    Returns None if it was withdrawn, or a text that says why it cannot be moved.

    Thread: clerk.
    """
    spool.folders.require()
    source = spool.paths.inbox / offer.sub / offer.file
    try:
        return claims.claim(spool, offer.sub, offer.file)
    except untrusted.NotPlain:
        return None
    except FileNotFoundError:
        if fs.exists(source):
            raise
        return None
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        why = why_not_moved(source.parent) or describe_permissions(source.parent)
        return f"cannot be moved out of the inbox: {e.strerror}: {why}"


def resolve(
    spool: Spool, claimed: Unresolved, offer: Offer | None, asked: Request | None
) -> Job | tuple[Unresolved, RequestError]:
    """Record what a claimed file asks for, or return why it is refused.

    offer, asked: None for a file that was claimed before a crash. It is read where it lies now, as
    is one that has changed since it was offered: a writer may still have it open.

    Thread: clerk.
    """
    spool.folders.require()
    if offer is None or asked is None or not _is_as_offered(claimed, offer):
        settings = spool.config.in_folder(claimed.sub)
        result = read_job_file(claimed.drop, claimed.file, settings, None)
        if not isinstance(result, Request):
            return claimed, result or RequestError("changed while it was claimed")
        asked = result
    if spool.config.inbox.duplicates == "refuse" and (twin := _twin(spool, claimed)):
        return claimed, RequestError(
            f"has the same bytes as {names.printable(twin)}, which was taken before"
            " (inbox.duplicates: refuse); change it, if it is meant to be rendered again"
        )
    settled = Settled(offer.settled if offer else time.monotonic(), spool.boot)
    request = with_seeds(asked, claimed.id)
    return claims.resolve(spool, claimed, request, settled, settings_of(spool.config))


def settings_of(config: Config) -> ClaimedSettings:
    """Return the part of the configuration that a job keeps from its claim on.

    Thread: any.
    """
    section = config.engine
    return ClaimedSettings(config.prompt, config.output, section.max_attempts, section.on_timeout)


def _twin(spool: Spool, claimed: Unresolved) -> str | None:
    """Return SUB/FILE of a job that was taken before and has the same bytes.

    Thread: clerk.
    """
    return spool.duplicates.find_or_remember(claimed, spool.job_file_bytes)


def _is_as_offered(claimed: Unresolved, offer: Offer) -> bool:
    """Whether inode, size and mtime are as they were; ctime was changed by the rename itself.

    Thread: clerk.
    """
    now = untrusted.signature_of(claimed.drop)
    return now is not None and now[:3] == offer.signature[:3]
