"""Say whose turn a job waits for: lanes take turns within their owner, and owners among each other."""

from typing import NamedTuple

GENERATE = "generate-"  # begins the names under which `promptdrop generate` drops its jobs


class Lane(NamedTuple):
    """One lane of one owner; its jobs go by arrival."""

    owner: int  # uid of the dropped files
    name: str  # a top-level sub-folder of the inbox; "" for its root, "/generate" for `generate`


def lane_of(owner: int, sub: str, file: str) -> Lane:
    """Return the lane of the file SUB/FILE, which belongs to the uid `owner`.

    Anybody may give a file at the root a name of `generate`; it is only one more lane of his own.

    Thread: any.
    """
    is_generated = not sub and file.startswith(GENERATE)
    return Lane(owner, "/generate" if is_generated else sub.partition("/")[0])
