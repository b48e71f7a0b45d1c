"""Which files of the inbox a disk does not give, so that status and log say why they wait."""

from collections.abc import Container, Iterable
from pathlib import Path

from promptdrop import names
from promptdrop.troubles import Troubles


class Sick:
    """Notes trouble of one file, which holds up nobody else."""

    def __init__(self, inbox: Path, troubles: Troubles) -> None:
        self._inbox, self._troubles = inbox, troubles
        self._known: set[str] = set()  # SUB/FILE

    def note(self, path: str, reason: str) -> None:
        """Note why SUB/FILE cannot be read or taken. reason: names the file."""
        self._known.add(path)
        self._troubles.note(("inbox", path), reason, names.printable(path))

    def end(self, path: str) -> None:
        """Note that SUB/FILE was taken, or is gone."""
        self._known.discard(path)
        self._troubles.end(("inbox", path))

    def looked(self, sick: Iterable[tuple[str, str]], *left: Container[str]) -> None:
        """Take in what a look found.

        sick: SUB/FILE, and why it cannot even be looked at. left: what is in the inbox.
        """
        for path, why in sick:
            self.note(path, f"{names.printable(str(self._inbox / path))}: {why}")
        for path in list(self._known):
            if not any(path in some for some in left):
                self.end(path)
