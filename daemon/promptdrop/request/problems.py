"""Why a job file is refused: its problems, collected, and values as messages show them."""

from promptdrop.errors import Problem, RequestError
from promptdrop.yaml12 import Mapping, Node, Sequence

MAX_PROBLEMS = 20
MAX_MET = 1000


class Problems:
    """Why a job file is refused, as far as it has been read.

    At 20 the rest is not looked at, nor after the same one was met a thousand times.
    """

    def __init__(self) -> None:
        self._found: list[Problem] = []
        self._met = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, message: str, line: int | None = None, field: str | None = None) -> None:
        """Note one problem, once. Raises RequestError: it was the last one to look for."""
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
    """The text in quotes, escaped, and cut to `limit` characters: fit for one line of a message."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def show(node: Node) -> str:
    """A value for a message: as written, quoted if it is text, cut to one line."""
    if isinstance(node, Mapping):
        return "{...}" if node.items else "{}"
    if isinstance(node, Sequence):
        return "[...]" if node.items else "[]"
    if node.plain and not isinstance(node.value, str):
        return node.text[:60] or "null"
    return short(node.text)
