"""Decide which file names are jobs, and make names that every client can store."""

import difflib
import os
import unicodedata
from collections.abc import Iterable

JOB_SUFFIXES = (".txt", ".prompt", ".yaml", ".yml", ".json", ".jsonl", ".csv")
CANCEL_SUFFIX = ".cancel"  # NAME.cancel in the inbox withdraws the job of NAME
PAUSE = "PAUSE"  # at the top of the inbox: no new image is begun
PATH_CHARACTERS = 4096  # PATH_MAX of limits.h; no system call takes a longer path
NAME_BYTES = 80  # of a job's folder name, so that suffixes and temporaries still fit into 255

IGNORED_ENDINGS = (
    "~",
    ".tmp",
    ".temp",
    ".part",
    ".partial",
    ".filepart",
    ".crdownload",
    ".download",
    ".aria2",
    ".swp",
    ".swx",
    ".lock",
    ".bak",
    ".done",
)
IGNORED_FILES = frozenset({"thumbs.db", "desktop.ini"})
IGNORED_FOLDERS = frozenset(
    name.casefold()
    for name in (
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "__MACOSX",
        "lost+found",
    )
)
# https://learn.microsoft.com/en-us/windows/win32/fileio/naming-a-file
WINDOWS_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{device}{n}" for device in ("com", "lpt") for n in range(10)}
)


def is_job_name(name: str) -> bool:
    """Whether a file of this name in the inbox is a job, once it is complete."""
    lower = name.casefold()
    return (
        not lower.startswith((".", "~$"))
        and lower.endswith(JOB_SUFFIXES)
        and not lower.endswith(IGNORED_ENDINGS)
        and lower not in IGNORED_FILES
    )


def is_cancel(name: str) -> bool:
    """Whether a file of this name in the inbox withdraws a job: `NAME.cancel`."""
    lower = name.casefold()
    return lower.endswith(CANCEL_SUFFIX) and not lower.startswith((".", "~$"))


def is_ignored_folder(name: str) -> bool:
    """Whether a sub-folder of this name is another program's own, and so never entered."""
    return name.startswith(".") or name.casefold() in IGNORED_FOLDERS


def printable(name: str) -> str:
    r"""Return `name` for people and for JSON: undecodable bytes as \xNN, control characters escaped."""
    try:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        text = name  # half a surrogate pair, from a command line: no file has such a name
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else ascii(c)[1:-1]
        for c in text
    )


def split(name: str) -> tuple[str, str]:
    """Split `cat.txt` into (`cat`, `.txt`)."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix


def safe(stem: str) -> str:
    """Turn a stem into a folder name that is legal on Linux, Windows and macOS.

    It has at most 80 bytes of UTF-8, in NFC. Unicode letters, marks, digits and `._-` stay, the rest
    becomes `_`; if nothing is left, it is `job`.
    """
    text = unicodedata.normalize("NFC", stem)
    text = "".join(
        c if c in "._-" or unicodedata.category(c)[0] in "LM" or c.isdecimal() else "_"
        for c in text
    )
    text = text.lstrip(".-")
    text = unicodedata.normalize("NFC", _cut(text, NAME_BYTES)).rstrip(".")
    head, dot, rest = text.partition(".")
    if head.casefold() in WINDOWS_RESERVED:
        text = _cut(f"{head}_{dot}{rest}", NAME_BYTES).rstrip(".")
    return text or "job"


def numbered(stem: str, suffix: str, n: int, limit: int = 255) -> str:
    """Return `cat.txt` for n = 1, `cat~2.txt` for n = 2; the stem is cut to fit into `limit` bytes."""
    tail = f"~{n}{suffix}" if n > 1 else suffix
    return cut(stem, limit - len(os.fsencode(tail))) + tail


def fold(name: str) -> str:
    """Return a form of `name` that is the same for all names a client without case cannot tell apart."""
    return unicodedata.normalize("NFC", name.casefold())


def is_stem(name: str) -> bool:
    """Whether `safe` would leave the name as it is."""
    return safe(name) == name


def is_plain(name: str) -> bool:
    """Whether a folder can have an entry of this name: not empty, no path, no `..`, no NUL, not too long."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(name if name.isascii() else os.fsencode(name)) <= 255
    except UnicodeEncodeError:
        return False  # half a surrogate pair


def is_below(path: str) -> bool:
    """Whether a relative path names something below its folder, each part being plain."""
    if "/" not in path:
        return is_plain(path)
    return len(path) < PATH_CHARACTERS and all(map(is_plain, path.split("/")))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean NAME?` with the nearest known name; an empty string if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def cut(text: str, limit: int) -> str:
    """Cut a text to at most `limit` bytes, as the file system counts them, never inside a character."""
    while len(os.fsencode(text)) > limit:
        text = text[:-1]
    return text


def _cut(text: str, limit: int) -> str:
    return text.encode("utf-8")[:limit].decode("utf-8", "ignore")
