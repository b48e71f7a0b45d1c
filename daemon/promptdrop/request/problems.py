"""Collect the problems of a job file, and show its values in messages."""

from promptdrop.errors import Problem, RequestError
from promptdrop.yaml12 import Mapping, Node, Sequence

MAX_PROBLEMS = 20
MAX_MET = 1000


class Problems:
    """The problems of a job file, as far as it is read: at most MAX_PROBLEMS, each of them once.

    After MAX_MET, repeated ones included, the rest of the file is not read.
    """

    def __init__(self) -> None:
        self._found: list[Problem] = []
        self._met = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, message: str, line: int | None = None, field: str | None = None) -> None:
        """Add a problem. Raises RequestError: MAX_PROBLEMS or MAX_MET is reached."""
        problem = Problem(message, line, field)
        self._met += 1
        if problem not in self._found:
            self._found.append(problem)
        if len(self._found) >= MAX_PROBLEMS or self._met >= MAX_MET:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise RequestError if there is a problem."""
        if self._found:
            raise RequestError(sorted(self._found, key=lambda problem: problem.line or 0))


def short(text: str, limit: int = 60) -> str:
    """Return the text in quotes, escaped and cut to `limit` characters, for one line of a message."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def show(node: Node) -> str:
    """Return a value for one line of a message: as written, in quotes if it is text, cut."""
    if isinstance(node, Mapping):
        return "{...}" if node.items else "{}"
    if isinstance(node, Sequence):
        return "[...]" if node.items else "[]"
    if node.plain and not isinstance(node.value, str):
        return node.text[:60] or "null"
    return short(node.text)
