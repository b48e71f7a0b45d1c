"""Count what a soak with people has left, wherever they took it, and compare it with what was dropped.

An image is known by its seed, which no other has. It counts as delivered where it lies together with a
sidecar that names it, in the outbox or in what a reader took or deleted.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from promptdrop import fs
from promptdrop.loop import PUBLISHERS

SEED = re.compile(rb"Seed: (\d+)")  # in the picture's `parameters`


@dataclass(frozen=True)
class Delivered:
    """An image with its sidecar beside it."""

    job: str
    number: int
    sha256: str
    published: float = field(compare=False)  # seconds since 1970
    path: Path = field(compare=False)


@dataclass
class Accounts:
    """What lies in the folders of people and daemon."""

    home: Path
    delivered: defaultdict[int, list[Delivered]] = field(
        default_factory=lambda: defaultdict(list)
    )  # by seed, once for each place
    lone: defaultdict[int, list[Path]] = field(
        default_factory=lambda: defaultdict(list)
    )  # seed -> pictures without their sidecar
    lone_sidecars: set[int] = field(default_factory=set)
    places: defaultdict[str, list[Path]] = field(
        default_factory=lambda: defaultdict(list)
    )  # SHA-256 of a file that is no image and no record -> where it lies
    done: set[int] = field(
        default_factory=set
    )  # the first seed of each job that a job.json calls done
    temporaries: Counter[str] = field(default_factory=Counter)  # HOME/NAME -> how many
    wrong: list[str] = field(default_factory=list)  # what nobody's doing explains

    def __post_init__(self) -> None:
        for name in ("spool", "archive", "other", "people"):
            for sub, entries in fs.walk(self.home / name):
                self._look(self.home / name / sub, {e.name for e in entries if e.is_file()}, name)

    def _look(self, folder: Path, files: set[str], place: str) -> None:
        hidden = {name for name in files if name.startswith(fs.TEMPORARY)}
        self.temporaries[place] += len(hidden)
        if folder in (self.home / "people", self.home / "spool/outbox"):
            files -= {name for name in files if name.endswith(".jsonl") or name == "status.json"}
        if ".promptdrop" in folder.parts:
            files = files if "drop" in folder.parts else set()
        paired = set()
        for name, document in _documents(folder, files - hidden):
            if document["schema"] == "promptdrop.image/1":
                paired |= self._look_at_pair(folder, document, files)
            elif document["outcome"] == "done":
                self.done.add(document["images"][0]["seed"])
            hidden.add(name)
        for name in files - hidden - paired:
            data = (folder / name).read_bytes()
            if name.endswith(".png") and (found := SEED.search(data)):
                self.lone[int(found[1])].append(folder / name)
            else:
                self.places[hashlib.sha256(data).hexdigest()].append(folder / name)

    def _look_at_pair(self, folder: Path, sidecar: dict[str, Any], files: set[str]) -> set[str]:
        seed, image = sidecar["request"]["seed"], sidecar["image"]
        if image["file"] not in files:
            self.lone_sidecars.add(seed)
            return set()
        digest = hashlib.sha256((folder / image["file"]).read_bytes()).hexdigest()
        if digest != image["sha256"]:
            self.wrong.append(f"{folder / image['file']} is not what its sidecar says")
        job = sidecar["job"]
        self.delivered[seed].append(
            Delivered(
                job["id"],
                job["image"],
                digest,
                published=datetime.fromisoformat(sidecar["time"]["published"]).timestamp(),
                path=folder / image["file"],
            )
        )
        return {image["file"]}


def _documents(folder: Path, files: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the sidecars and summaries of a folder."""
    for name in files:
        if name.endswith(".json"):
            document = json.loads((folder / name).read_bytes())
            schema = document.get("schema") if isinstance(document, dict) else None
            if schema in ("promptdrop.image/1", "promptdrop.job/1"):
                yield name, document


@dataclass(frozen=True)
class Drop:
    """A file that somebody dropped, as his ledger has it."""

    path: str
    sha256: str
    seeds: list[int]  # none if it is to be refused


def drops(home: Path) -> list[Drop]:
    """Read every drop from the ledgers."""
    return [
        Drop(line["path"], line["sha256"], line["seeds"])
        for line in ledger(home)
        if line["doing"] == "dropped"
    ]


def ledger(home: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of all ledgers."""
    for path in sorted((home / "people").glob("*.jsonl")):
        with path.open() as file:
            yield from map(json.loads, file)


def count(home: Path, deaths: Sequence[float]) -> dict[str, int]:
    """Compare all that is there with all that was dropped. Returns the figures.

    deaths: when the daemon was killed, seconds since 1970.

    Raises AssertionError: something is lost, there twice, torn, or lies about, and no death explains it.
    """
    there, dropped = Accounts(home), drops(home)
    wrong, gone = there.wrong, 0
    for drop in dropped:
        lies = there.places[drop.sha256]
        trashed = any(home / "people" in path.parents for path in lies)
        is_failed = any(home / "spool/failed" in path.parents for path in lies)
        wrong += _file_trouble(drop, lies)
        if not drop.seeds:
            if not is_failed and not trashed:
                wrong.append(f"{drop.path} was not refused")
            continue
        missing = [seed for seed in drop.seeds if not _is_accounted(there, seed)]
        if any(path.name.startswith("request.") for path in lies):
            trashed = False  # of a job that was done
        if trashed:
            gone += len(missing)  # taken back, or cleared from failed/
            continue
        if missing:
            wrong.append(
                f"{drop.path}: {len(missing)} of {len(drop.seeds)} images are lost: {missing[:5]}"
            )
        if drop.seeds[0] not in there.done:
            wrong.append(f"{drop.path}: no job.json says that it is done")
    figures = _figures(there, dropped, gone)
    wrong += _image_trouble(there, dropped)
    wrong += _unexplained_twins(there, deaths)
    in_spool = there.temporaries["spool"]
    wrong += [f"{in_spool} temporaries are left in the spool"] * bool(in_spool)
    for what in ("temporaries_taken", "lone_images_taken"):
        if figures[what] > PUBLISHERS * len(deaths):
            wrong.append(f"{figures[what]} {what}, more than {len(deaths)} deaths explain")
    assert wrong == [], "\n".join([f"{len(wrong)} wrong, {figures}", *wrong[:40]])
    return figures


def _file_trouble(drop: Drop, lies: list[Path]) -> list[str]:
    return [] if len(lies) == 1 else [f"{drop.path} is in {len(lies)} places: {lies}"]


def _is_accounted(there: Accounts, seed: int) -> bool:
    """Whether an image was delivered, or came apart from its sidecar in a reader's hands."""
    return bool(there.delivered[seed]) or (seed in there.lone_sidecars and bool(there.lone[seed]))


def _unexplained_twins(there: Accounts, deaths: Sequence[float]) -> Iterator[str]:
    """Name the images that were published again though the daemon did not die in between."""
    for places in there.delivered.values():
        for one, other in pairwise(sorted(places, key=lambda place: place.published)):
            if not any(one.published <= death <= other.published for death in deaths):
                yield f"twice, and no death in between: {one.path} and {other.path}"


def _image_trouble(there: Accounts, dropped: list[Drop]) -> Iterator[str]:
    """Say of each image that is there whether it is the one that was asked for."""
    numbers = {seed: n for drop in dropped for n, seed in enumerate(drop.seeds, 1)}
    for seed, places in there.delivered.items():
        if len(set(places)) > 1:
            yield f"seed {seed} is there as different images: {set(places)}"
        if places and places[0].number != numbers.get(seed):
            yield f"seed {seed} is image {places[0].number} instead of {numbers.get(seed)}"
    outbox = there.home / "spool/outbox"
    for seed, paths in there.lone.items():
        if any(outbox in path.parents for path in paths):
            yield f"seed {seed} is in the outbox without a sidecar"


def _figures(there: Accounts, dropped: list[Drop], gone: int) -> dict[str, int]:
    lone = [path for paths in there.lone.values() for path in paths]
    people = there.home / "people"
    return {
        "files": len(dropped),
        "refused": sum(not drop.seeds for drop in dropped),
        "images": sum(len(drop.seeds) for drop in dropped),
        "delivered": sum(bool(places) for places in there.delivered.values()),
        "gone_with_their_file": gone,
        "duplicates": sum(max(0, len(places) - 1) for places in there.delivered.values()),
        "lone_images_taken": sum(people not in path.parents for path in lone),
        "lone_images_deleted": sum(people in path.parents for path in lone),
        "temporaries_taken": there.temporaries["archive"] + there.temporaries["other"],
        "temporaries_deleted": there.temporaries["people"],
    }
