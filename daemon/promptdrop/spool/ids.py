"""Ids of jobs: they sort by arrival, and no two daemons make the same one."""

import re
import secrets
import time

_ID = re.compile(r"\d{8}T\d{12}-[0-9a-f]{6}\Z")  # date, time with microseconds, six random digits


def is_job_id(name: str) -> bool:
    """Whether `name` is an id; a folder with another name among our jobs is a stranger's."""
    return _ID.match(name) is not None


class Ids:
    """Makes ids. `last` is the date and time of the newest one.

    Thread: clerk.
    """

    def __init__(self) -> None:
        self.last = ""

    def new(self) -> str:
        """Return an id greater than all before it, even if the wall clock was set back meanwhile."""
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        stamp = max(f"{moment}{time.time_ns() // 1000 % 1_000_000:06d}", self.last)
        if stamp == self.last:
            head, digits = stamp[:9], int(stamp[9:]) + 1
            stamp = f"{head}{digits:012d}"
        self.last = stamp
        return f"{stamp}-{secrets.token_hex(3)}"
