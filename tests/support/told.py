"""What a status tells, and what a lane of the outbox holds."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptdrop import fs


def sayings(status: Any) -> Iterator[str]:
    """Yield every text of a status; those of one mapping together, as a file and its reason are."""
    if isinstance(status, dict):
        yield " ".join(value for value in status.values() if isinstance(value, str))
        for value in status.values():
            yield from sayings(value)
    elif isinstance(status, list):
        for value in status:
            yield from sayings(value)


def tells(status: dict[str, Any], *words: str) -> bool:
    """Whether one thing that a status says has all these words."""
    return any(all(word in text for word in words) for text in sayings(status))


def pairs(*folders: Path) -> Counter[tuple[str, int]]:
    """Count the images whose sidecar lies beside them, anywhere below some folders: (job's id, number)."""
    found: Counter[tuple[str, int]] = Counter()
    for path in (path for folder in folders for path in _files(folder)):
        if path.suffix == ".json" and not path.name.startswith("."):
            document = json.loads(path.read_bytes())
            is_sidecar = document.get("schema") == "promptdrop.image/1"
            if is_sidecar and (path.parent / document["image"]["file"]).exists():
                found[document["job"]["id"], document["job"]["image"]] += 1
    return found


def summaries(*folders: Path) -> dict[str, dict[str, Any]]:
    """Read every job.json below some folders, by the folder that it lies in, from there."""
    return {
        str(path.parent.relative_to(folder)): json.loads(path.read_bytes())
        for folder in folders
        for path in _files(folder)
        if path.name == "job.json"
    }


def hidden(*folders: Path) -> list[Path]:
    """List the temporaries below some folders, but not the state folder itself."""
    found = (path for folder in folders for path in _files(folder))
    return [
        path for path in found if path.name.startswith(fs.TEMPORARY) and "status" not in path.name
    ]


def lone(*folders: Path) -> list[Path]:
    """List the pictures below some folders that no sidecar stands beside."""
    pictures = (p for folder in folders for p in _files(folder) if p.suffix == ".png")
    return [path for path in pictures if not path.with_suffix(".json").exists()]


def _files(folder: Path) -> Iterator[Path]:
    for sub, entries in fs.walk(folder):
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield folder / sub / entry.name
