"""The errors that promptdrop raises on purpose; the class decides what happens next.

Any other error is a bug: in the daemon's own process it ends the daemon with a traceback, in an
engine process it ends that process.
"""

from collections.abc import Iterable
from dataclasses import dataclass


class PromptdropError(Exception):
    """Ends a command with `exit_status`; its lines go to stderr."""

    exit_status = 1

    def __init__(
        self, text: str, exit_status: int | None = None, more_lines: Iterable[str] = ()
    ) -> None:
        self.lines = (
            text,
            *more_lines,
        )  # a line break in one of them is somebody's, and is escaped
        super().__init__("\n".join(self.lines))
        if exit_status:
            self.exit_status = exit_status


class UsageError(PromptdropError):
    """The command line names something that does not exist, or that is ambiguous."""

    exit_status = 2


class ConfigError(PromptdropError):
    """The configuration cannot work. systemd must not restart on it (78 is EX_CONFIG, sysexits.h)."""

    exit_status = 78


class ModelError(ConfigError):
    """The model's files are missing or incomplete; the text names each and the command that helps."""


class SpoolBusy(PromptdropError):
    """Another daemon owns this spool (75 is EX_TEMPFAIL, sysexits.h)."""

    exit_status = 75


class DiskTrouble(PromptdropError):
    """A folder or disk cannot be used now. Its work waits and is tried again; no job is charged."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a job file is refused. `line` counts from 1; it is None if the whole file is meant."""

    message: str
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


class RequestError(PromptdropError):
    """A job file is refused as a whole; nothing of it is rendered."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = (
            (Problem(problems),) if isinstance(problems, str) else tuple(problems)
        )  # never empty
        super().__init__("; ".join(str(problem) for problem in self.problems))


class EngineError(PromptdropError):
    """This image failed; the engine is still good. One attempt is charged to the image."""


class EngineStartError(PromptdropError):
    """The engine could not load or warm up. The daemon ends with this reason."""


class ImageTimeout(BaseException):
    """The image has taken too long: raised in the engine's main thread by SIGALRM or at a step.

    Not an Exception, so that no `except Exception` of a library catches it.
    """


class ImageCancelled(BaseException):
    """The image is not wanted any more: raised in the engine's main thread at its next step."""
