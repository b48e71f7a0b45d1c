"""One of the soak's people, in a process of that user: crowd.py ROLE NAME HOME SEED LIFE [WITHOUT,...].

A dropper drops as many images as each line of its standard input says, and answers with a line. A
reader takes and deletes until its standard input ends. Whatever people take, also what they delete,
lies afterwards in HOME/archive/NAME (the outbox's file system), HOME/other/NAME (another one) or
HOME/people/NAME (deleted), a folder for each time; `accounts.py` counts it all. HOME/people/NAME.jsonl
is the person's ledger: what was dropped, and what was done.
"""

import json
import os
import random
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from promptdrop import fs, names, untrusted

JOB_IMAGES = 40  # at most
LIFE_SEEDS, DROPPER_SEEDS = 10**12, 10**9  # each image has a seed of its own, by which it is known
SHARED = 0o2775  # mode of a folder that the daemon may move files out of

Doing = Callable[[], None]


@dataclass
class Person:
    """What droppers and readers have in common."""

    name: str
    home: Path
    random: random.Random
    life: int
    without: frozenset[str]  # doings to leave out

    def __post_init__(self) -> None:
        self.inbox, self.outbox, self.failed = (
            self.home / "spool" / n for n in ("inbox", "outbox", "failed")
        )
        self.archive, self.other, self.trash = (
            self.home / n / self.name for n in ("archive", "other", "people")
        )
        for folder in (self.archive, self.other, self.trash):
            folder.mkdir(exist_ok=True)
        self._ledger = (self.home / "people" / f"{self.name}.jsonl").open("a")
        self._taken = 0

    def note(self, doing: str, **more: Any) -> None:
        """Write a line into the ledger."""
        self._ledger.write(json.dumps({"time": time.time(), "doing": doing, **more}) + "\n")
        self._ledger.flush()

    def do_one(self, doings: list[tuple[int, Doing]]) -> None:
        """Do one thing at random, each by its weight."""
        left = [one for one in doings if one[1].__name__ not in self.without]
        weights, actions = zip(*left, strict=True)
        action = self.random.choices(actions, weights)[0]
        try:
            action()
        except OSError as e:  # somebody was faster, or has put something into the way
            self.note(f"could not {action.__name__}", error=str(e))

    def place(self, below: Path) -> Path:
        """Return a new path for what is taken now."""
        self._taken += 1
        return below / f"{self.life}-{self._taken:05d}"

    def take_pair(self, folder: Path, sidecar: str, below: Path) -> bool:
        """Take an image whose sidecar is there, and the sidecar; one whom another has taken is his."""
        data = (folder / sidecar).read_bytes()
        image = json.loads(data)["image"]["file"]
        target = self.place(below)
        target.mkdir()
        try:
            (target / sidecar).write_bytes(data)
            shutil.move(folder / image, target / image)
        except FileNotFoundError:
            shutil.rmtree(target)
            return False
        fs.remove_file(folder / sidecar)
        return True


class Dropper(Person):
    """Drops files of all formats, some to be refused, and changes his mind about some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number = int(sha256(self.name.encode()).hexdigest(), 16) % 1000
        self._seed = self.life * LIFE_SEEDS + number * DROPPER_SEEDS
        self._dropped: list[str] = []
        own = self.name
        self._folders = [
            "",
            "common",
            own,
            f"{own}/deep",
            f"{own}/ein größerer Ordner",
            f"{own}/猫",
        ]
        self._make_folders()
        self._old: list[Path] = []  # folders that were moved away

    def run(self) -> None:
        """Obey the driver's lines to their end."""
        for line in sys.stdin:
            left = int(line)
            while left > 0:
                left -= self._drop(min(left, self.random.randint(1, JOB_IMAGES)))
                self.do_one(
                    [
                        (12, self.nothing),
                        (2, self.take_back),
                        (2, self.withdraw),
                        (1, self.replace_folder),
                        (1, self.swap_folder),
                    ]
                )
            print("dropped", flush=True)

    def nothing(self) -> None:
        """Just drop on."""

    def take_back(self) -> None:
        """Take a file out of the inbox that was not claimed yet."""
        path = self.inbox / self._some_drop()
        target = self.place(self.trash)
        target.mkdir()
        os.rename(path, target / path.name)
        self.note("took back", path=str(path))

    def withdraw(self) -> None:
        """Drop NAME.cancel for a file of the last ones."""
        path = self.inbox / f"{self._some_drop()}{names.CANCEL_SUFFIX}"
        path.touch()
        self.note("withdrew", path=str(path))

    def replace_folder(self) -> None:
        """Move a folder of the inbox away, and make a new one of its name."""
        folder = self._some_folder()
        self._old.append(folder.with_name(f"{folder.name} old {self.place(self.trash).name}"))
        folder.rename(self._old[-1])
        self._make_folders()
        self.note("replaced", path=str(folder))
        self._tidy()

    def swap_folder(self) -> None:
        """For a moment a file, or a link that leads to itself, has the name of a folder."""
        folder = self._some_folder()
        hidden = folder.with_name(f".{folder.name}")
        folder.rename(hidden)
        if self.random.random() < 0.5:
            folder.touch()
        else:
            folder.symlink_to(folder.name)
        time.sleep(self.random.uniform(0, 0.3))
        folder.unlink()
        hidden.rename(folder)
        self.note("swapped", path=str(folder))

    def _make_folders(self) -> None:
        for folder in filter(None, self._folders):
            fs.make_directories(self.inbox, folder, SHARED)

    def _tidy(self) -> None:
        for path in self._old:
            with suppress(OSError):  # not empty yet, or gone
                path.rmdir()

    def _some_folder(self) -> Path:
        return self.inbox / self.random.choice(
            [f for f in self._folders if f.startswith(self.name)]
        )

    def _some_drop(self) -> str:
        return self.random.choice(self._dropped[-5:])

    def _drop(self, images: int) -> int:
        """Drop a file of so many images, whole, under a free name. Returns the images that it asks for."""
        seeds = list(range(self._seed + 1, self._seed + 1 + images))
        self._seed += images
        is_refused = self.random.random() < 0.08
        suffix, text = self._text(seeds, is_refused)
        stem = self.random.choice(["{}-{}", "{} with spaces {}", "{}-été-{}", "猫 {} {}", "twin"])
        name = stem.format(self.name, self._seed) + suffix
        folder = self.random.choice(self._folders)
        hidden = self.inbox / folder / f".{self.name}-{self._seed}"
        hidden.write_text(text)
        digest = sha256(text.encode()).hexdigest()
        self.note(
            "dropped", path=f"{folder}/{name}", sha256=digest, seeds=[] if is_refused else seeds
        )
        try:
            fs.rename(hidden, hidden.with_name(name))
        except FileExistsError:  # the twin before it is not claimed yet
            name = f"{self.name}-{self._seed}{suffix}"
            fs.rename(hidden, hidden.with_name(name))
        self._dropped.append(f"{folder}/{name}" if folder else name)
        return 0 if is_refused else images

    def _text(self, seeds: list[int], is_refused: bool) -> tuple[str, str]:
        """Return a format's ending and the text of a job of these seeds."""
        prompt, first = f"{self.name} {seeds[0]}", seeds[0]
        flag = self.home / "flags" / str(first)  # which the engine makes
        fault = self.random.choice(["", "", "", "", f"!once-crash {flag} ", f"!once-raise {flag} "])
        key = "sede" if is_refused else "seed"
        if fault and not is_refused:
            return ".yaml", f"prompt: '{fault}{prompt}'\n{key}: {seeds}\n"
        formats: dict[str, Callable[[], str]] = {
            ".txt": lambda: "".join(f'--prompt "{prompt}" --{key} {s}\n' for s in seeds),
            ".yaml": lambda: f"prompt: {prompt}\n{key}: {seeds}\n",
            ".json": lambda: json.dumps({"prompt": prompt, key: seeds}),
            ".jsonl": lambda: "".join(json.dumps({"prompt": prompt, key: s}) + "\n" for s in seeds),
            ".csv": lambda: f"prompt,{key}\n" + "".join(f"{prompt},{s}\n" for s in seeds),
        }
        suffix = self.random.choice(list(formats))
        return suffix, formats[suffix]()


class Reader(Person):
    """Takes and deletes what is in the outbox, published or not, and clears failed/ at times."""

    def run(self) -> None:
        """Go on until the driver closes standard input."""
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
        while not ended.wait(self.random.uniform(0, 0.2)):
            self.do_one(
                [
                    (5, self.take_folder),
                    (3, self.take_elsewhere),
                    (5, self.take_images),
                    (5, self.delete_images),
                    (3, self.delete_folder),
                    (1, self.take_lane),
                    (1, self.replace_folder),
                    (1, self.clear_failed),
                ]
            )

    def take_folder(self) -> None:
        """Move a job's folder away, whatever happens in it just now."""
        folder, target = self._some_folder(), self.place(self.archive)
        self._move(folder, target)

    def take_lane(self) -> None:
        """Move a folder of the outbox away with all jobs in it."""
        folder = self._some_folder()
        if folder.parent != self.outbox:
            self._move(folder.parent, self.place(self.archive))

    def replace_folder(self) -> None:
        """Move a job's folder away and put something into its place that the daemon cannot use."""
        folder, target = self._some_folder(), self.place(self.archive)
        self._move(folder, target)
        kind = self.random.choice(["folder", "file", "link"])
        if kind == "folder":
            folder.mkdir(mode=0o755)
        elif kind == "file":
            folder.touch()
        else:
            folder.symlink_to("nowhere")
        self.note("replaced", path=str(folder), kind=kind)

    def take_elsewhere(self) -> None:
        """Move what is published of a job to another file system, as `mv` does: copy, then unlink."""
        path = self._some_folder()
        with self._held(path) as folder:
            for entry in fs.entries(folder):
                if _is_sidecar(entry.name):
                    self.take_pair(folder, entry.name, self.other)
            self.note("took elsewhere", path=str(path))
            self._take_finished(folder, self.other)
        path.rmdir()

    def take_images(self) -> None:
        """Move some images and their sidecars."""
        self._take_some(self.archive)

    def delete_images(self) -> None:
        """Delete some images and their sidecars, having seen both."""
        self._take_some(self.trash)

    def delete_folder(self) -> None:
        """Delete all that is in a job's folder, seen or not, and the folder: rm -r."""
        folder, target = self._some_folder(), self.place(self.trash)
        target.mkdir()
        with self._held(folder) as held:
            for entry in fs.entries(held):
                with suppress(FileNotFoundError):
                    os.rename(entry.path, target / entry.name)
        self.note("deleted", path=str(folder), target=str(target))
        with suppress(OSError):  # something came meanwhile
            folder.rmdir()

    def clear_failed(self) -> None:
        """Delete a file in failed/ and its reason."""
        found = [
            self.failed / sub / entry.name
            for sub, listed in fs.walk(self.failed)
            for entry in listed
            if entry.is_file()
        ]
        reasons = [path for path in found if path.name.endswith(".error.json")]
        if not reasons or self.random.random() < 0.8:  # seldom: the images of such a file are gone
            return
        reason = self.random.choice(reasons)
        target = self.place(self.trash)
        target.mkdir()
        name = reason.name.removesuffix(".error.json")
        os.rename(reason.with_name(name), target / name)
        os.rename(reason, target / reason.name)
        self.note("cleared", path=str(reason), target=str(target))

    def _held(self, folder: Path) -> AbstractContextManager[Path]:
        """Hold a folder of the outbox, whatever becomes of its name."""
        return untrusted.below(self.outbox, os.path.relpath(folder, self.outbox))

    def _move(self, folder: Path, target: Path) -> None:
        os.rename(folder, target)
        self.note("moved", path=str(folder), target=str(target))

    def _take_some(self, below: Path) -> None:
        path = self._some_folder()
        with self._held(path) as folder:
            found = [e.name for e in fs.entries(folder) if _is_sidecar(e.name)]
            for sidecar in self.random.sample(found, min(len(found), self.random.randint(1, 8))):
                if self.take_pair(folder, sidecar, below):
                    self.note("took", path=str(path / sidecar), below=str(below))

    def _take_finished(self, folder: Path, below: Path) -> None:
        """Take job.json and the dropped file of a job that is done."""
        summary = folder / "job.json"
        if json.loads(summary.read_bytes())["outcome"] != "done":
            return
        target = self.place(below)
        target.mkdir()
        for entry in fs.entries(folder):
            if entry.name == "job.json" or entry.name.startswith("request."):
                shutil.move(entry.path, target / entry.name)

    def _some_folder(self) -> Path:
        """Choose a folder in the outbox that has files."""
        found = [
            self.outbox / sub
            for sub, listed in fs.walk(self.outbox)
            if sub and any(entry.is_file() for entry in listed)
        ]
        if not found:
            raise FileNotFoundError
        return self.random.choice(sorted(found))


def _is_sidecar(name: str) -> bool:
    return name.endswith(".json") and name != "job.json" and not name.startswith((".", "request."))


def main() -> None:
    """Be one person."""
    role, name, home, seed, life, without = sys.argv[1:]
    os.umask(0o022)
    kinds: dict[str, type[Dropper] | type[Reader]] = {"dropper": Dropper, "reader": Reader}
    chance = random.Random(f"{seed} {life} {name}")
    person = kinds[role](name, Path(home), chance, int(life), frozenset(without.split(",")))
    assert stat.S_ISDIR(os.stat(person.inbox).st_mode)
    person.run()


if __name__ == "__main__":
    main()
