"""Which parked job's file lies where in failed/, in memory.

Thread: clerk, all of it.
"""


class Parked:
    """The ids of parked jobs, and of those on their way there, by the paths of their files below failed/.

    Filled by recovery, and kept up to date as files are moved to failed/ and back.
    """

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def add(self, target: str, job_id: str) -> None:
        """Note that the file of a job goes to failed/`target`, or lies there."""
        self._ids[target] = job_id

    def forget(self, target: str) -> None:
        """Note that failed/`target` is the file of no parked job any more."""
        self._ids.pop(target, None)

    def clear(self) -> None:
        """Forget all, before a recovery finds them."""
        self._ids.clear()

    def id_of(self, target: str) -> str | None:
        """Return the id of the job whose file is failed/`target`."""
        return self._ids.get(target)

    def targets(self) -> list[str]:
        """List all the paths, folder by folder."""
        return sorted(self._ids, key=lambda target: (target.rpartition("/")[0], target))
