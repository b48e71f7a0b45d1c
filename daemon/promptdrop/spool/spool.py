"""The queue on disk. The directory is the state, every transition is one rename.

    inbox/SUB/FILE -> pending/ID/drop/SUB/FILE     claim.claim
        pending/ID/request.json, outbox/SUB/JOB/   claim.resolve
    pending/ID -> active/ID                        claim.take
        active/ID/NNNN.begun ...                   record, outbox/publish.py
    active/ID -> finished/ID, removed              ending.finish, ending.refuse
    active/ID -> parked/ID, kept                   ending.finish: the file lies in failed/
    parked/ID -> pending/ID                        retry.retry
    what a crash left                              recovery.recover

A job's folder holds the dropped file, its resolved request and one record per image, so a crash
anywhere leaves a folder that says what is left. An OSError that escapes is trouble with a disk,
never a job's fault. Almost all of this runs in the loop's rooms, since a disk may not answer; each
function says where. On the loop itself run only `claim.take`, `record.begin_image` and
`record.end_attempt`, and what starts and ends the daemon.
"""

from promptdrop import clock
from promptdrop.config import Config
from promptdrop.spool.control import CommandFiles
from promptdrop.spool.duplicates import Duplicates
from promptdrop.spool.folders import Folders
from promptdrop.spool.ids import Ids
from promptdrop.spool.lock import Lock
from promptdrop.spool.outbox import Outbox
from promptdrop.spool.parked import Parked
from promptdrop.spool.paths import Paths


class Spool:
    """The queue of one configuration. `lock.acquire` first: one daemon per spool."""

    def __init__(self, config: Config) -> None:
        self.config = config  # replaced when the configuration is read again
        self.paths = Paths.of(config)
        self.lock = Lock(self.paths, config.output.record_mode)
        self.folders = Folders(config, self.paths, self.lock)
        self.outbox = Outbox(self.paths)
        self.duplicates = Duplicates(self.paths)
        self.parked = Parked()
        self.commands = CommandFiles(self.paths.control)
        self.ids = Ids()
        self.boot = clock.boot_id()

    @property
    def job_file_bytes(self) -> int:
        """The size limit of a job file."""
        return self.config.limits.job_file_kib * 1024
