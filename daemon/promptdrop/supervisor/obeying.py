"""Keep a command from being carried out twice, although a look may list one that is removed."""

from collections.abc import Iterable


class Obeying:
    """Knows the files of commands that must not be begun again when a look lists them.

    The clerk removes a file while the scanner may be looking. A look that began before the removal
    may still list the file; looks come one after another, so the look after that one cannot.
    """

    def __init__(self) -> None:
        self._under_way: set[str] = set()
        self._removed: set[str] = set()  # since the result of the last look came

    def __contains__(self, file: str) -> bool:
        return file in self._under_way or file in self._removed

    def __bool__(self) -> bool:
        """Whether a command is under way."""
        return bool(self._under_way)

    def begin(self, files: Iterable[str]) -> None:
        """Note that these are being carried out."""
        self._under_way.update(files)

    def leave(self, files: Iterable[str]) -> None:
        """Note that nothing was done about these: the next look brings them again."""
        self._under_way.difference_update(files)

    def done(self, file: str) -> None:
        """Note that a command was carried out and its file removed."""
        self._under_way.discard(file)
        self._removed.add(file)

    def looked(self) -> None:
        """Forget the removed files: the look that was just dealt with was the last that may list them."""
        self._removed.clear()
