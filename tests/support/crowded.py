"""A campaign among people: real users who drop, take, move and delete, and an administrator's commands."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

import accounts
import disks
from campaign import MEMORY_MIB, SETTINGS, Campaign
from gauges import Gauges
from harness import Daemon, merged, until
from people import (
    ALICE,
    BOB,
    CAROL,
    DAEMON,
    DAVE,
    ERIN,
    give_to_group,
    open_home,
    promptdrop_as,
    python,
)
from promptdrop import fs
from promptdrop.spool import control
from promptdrop.spool.failed import failures
from promptdrop.spool.ids import is_job_id

CROWD = str(Path(__file__).with_name("crowd.py"))
DROPPERS, READERS = {"alice": ALICE, "bob": BOB, "carol": CAROL}, {"dave": DAVE, "erin": ERIN}
COMMANDS_AT_ONCE = 3
STILL_SECONDS = 90.0  # without a line in the log: it has come to a halt


@dataclass
class Crowd:
    """The people of one spool, each a process of its own user; of ours where we may not become them."""

    daemon: Daemon
    seed: int
    are_users: bool
    without: str = ""  # doings that they leave out, with commas between them
    life: int = 0  # how often they came

    def __post_init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def come(self) -> None:
        """Begin to take and delete, and be ready to drop."""
        self.life += 1
        for role, people in (("dropper", DROPPERS), ("reader", READERS)):
            for name, person in people.items():
                interpreter = python() if self.are_users else [sys.executable]
                words = [*interpreter, CROWD, role, name, str(self.daemon.home)]
                words += [str(self.seed), str(self.life), self.without]
                self._processes[name] = subprocess.Popen(
                    [*(person.prefix() if self.are_users else []), *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )

    def drop(self, name: str, images: int) -> None:
        """Let one of the droppers drop files of so many images."""
        process = self._processes[name]
        assert process.stdin
        assert process.stdout
        print(images, file=process.stdin, flush=True)
        assert process.stdout.readline() == "dropped\n", f"{name} has ended"

    def leave(self) -> None:
        """Let all people end what they do, and go."""
        for name, process in self._processes.items():
            process.communicate(timeout=60)
            assert process.returncode == 0, f"{name} has ended with {process.returncode}"
        self._processes.clear()

    def kill(self) -> None:
        """End those who are still there, after a failure."""
        for process in self._processes.values():
            process.kill()
            process.communicate()


@dataclass
class CrowdedCampaign(Campaign):
    """A campaign whose jobs come from people and whose images they take away meanwhile."""

    crowd: Crowd = field(kw_only=True)
    figures: dict[str, int] = field(default_factory=dict)  # of the last count
    lives: dict[int, list[Gauges]] = field(default_factory=dict)  # by the daemon's pid
    _asked: int = 0  # images
    _commands: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self) -> None:
        """Do it all with people around."""
        self.crowd.come()
        super().run()

    def images_asked(self) -> int:
        """The number of images that the drops so far ask for, and a few more."""
        return self._asked

    def quiet_life(self, images: int) -> tuple[Gauges, Gauges]:
        """Render images in one life without kills. Returns its gauges when idle, after a third and at its end."""
        self._start()
        self.crowd.come()
        self._serve(images // 3)
        before = self._idle_gauges()
        self._serve(images - images // 3)
        after = self._idle_gauges()
        self._finish()
        self._count()
        return before, after

    # --- what happens ---

    def _start(self) -> None:
        wrapper = promptdrop_as(DAEMON) if self.crowd.are_users else None
        self.daemon.start(wrapper=wrapper)

    def _drop_some(self) -> None:
        images = self.random.randint(20, 120)
        self._asked += images
        self.crowd.drop(self.random.choice(list(DROPPERS)), images)

    def _let_it_work(self) -> None:
        super()._let_it_work()
        self._sample()

    def _disturb(self) -> None:
        for _ in range(self.random.randint(0, 2)):
            self._command()
        super()._disturb()

    def _pause_or_resume(self) -> None:
        self._say(self.random.choice(["pause", "resume"]))
        self._say("resume")

    def _command(self) -> None:
        """Let the administrator start a command, without waiting for its end."""
        words: list[list[str]] = [
            ["status"], ["status", "--json"], ["doctor"], ["retry", "--all"], *self._about_a_job(),
        ]  # fmt: skip
        self._say(*self.random.choice(words))

    def _about_a_job(self) -> Iterator[list[str]]:
        if jobs := self.daemon.status().get("jobs"):
            yield ["cancel", self.random.choice(jobs)["id"]]
        if found := [target for target, _ in failures(self.daemon.failed)]:
            yield ["retry", self.random.choice(found)]

    def _say(self, *words: str) -> None:
        while len(self._commands) >= COMMANDS_AT_ONCE:
            self._heard(self._commands.pop(0))
        self.done[f"promptdrop {words[0]}"] += 1
        _, *rest = self.daemon.command(*words)
        who = [*DAEMON.prefix(), *python()] if self.crowd.are_users else [sys.executable]
        command = [*who, *rest]
        self._commands.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
            )
        )

    def _heard(self, command: subprocess.Popen[str]) -> None:
        said, _ = command.communicate(timeout=120)
        assert "Traceback" not in said, f"{command.args}: {said}"
        usual = (0, 1, 2)  # 2: no job has this name by now
        assert command.returncode in usual, f"{command.args}: {command.returncode}, {said}"

    def _sample(self) -> None:
        assert self.daemon.process
        try:
            now = self._gauges()
        except OSError:
            return  # it has ended
        self.lives.setdefault(self.daemon.process.pid, []).append(now)

    def _serve(self, images: int) -> None:
        """Let people drop as fast as they are served, while the administrator goes on."""
        wanted = self._asked + images
        while self._asked < wanted:
            self._drop_some()
            self._command()
            self._let_it_work()

    # --- what comes out ---

    def _look(self) -> None:
        pass  # the people have their own ledgers

    def _published(self) -> int:
        return len(self.daemon.log("image.published"))

    def _finish(self) -> None:
        self.crowd.leave()
        while self._commands:
            self._heard(self._commands.pop(0))
        super()._finish()

    def _until_ended(self) -> None:
        """Wait as long as anything goes on."""
        seen, since = 0, time.monotonic()
        while not self._is_done_or_retried():
            if (lines := len(self.daemon.log())) > seen:
                seen, since = lines, time.monotonic()
            left = [*self._in_hand(), *self._left_in_failed()]
            assert time.monotonic() < since + STILL_SECONDS, f"nothing goes on; left: {left[:20]}"
        until(self._agrees, "parked jobs whose files are in failed/, and no others", 30)

    def _agrees(self) -> bool:
        """Whether parked/ and failed/ speak of the same jobs."""
        told = {str(record.id) for _, record in failures(self.daemon.failed) if record}
        parked = {path.name for path in (self.daemon.own / "parked").iterdir()}
        return parked == {job for job in told if is_job_id(job)}

    def _retry(self) -> None:
        targets = tuple(self._left_in_failed())
        if targets:
            self.done["retry"] += 1
            control.send(self.daemon.own / "control", control.Retry(targets))

    def _left_in_failed(self) -> list[str]:
        """The files in failed/ that a retry can help."""
        return [
            target
            for target, record in failures(self.daemon.failed)
            if record and record.outcome != "refused" and not target.endswith(".cancel")
        ]

    def _is_done_or_retried(self) -> bool:
        self._start_again()
        if not list((self.daemon.own / "control").glob("*.json")):
            self._retry()
        time.sleep(0.2)
        return not self._left_in_failed() and not self._in_hand()

    def _in_hand(self) -> list[str]:
        files = [e.name for _, listed in fs.walk(self.daemon.inbox) for e in listed if e.is_file()]
        return [*files, *self.daemon.unfinished()]

    def _is_idle(self) -> bool:
        status = self.daemon.status()
        is_at_rest = bool(status) and self._is_its_own(status) and not status["queue"]["jobs"]
        return is_at_rest and not status["waiting"] and not self._in_hand()

    def _idle_gauges(self) -> Gauges:
        """Read the gauges once nothing is left to do; watches without those of the inbox's folders."""
        control.resume(self.daemon.own / "control")
        while self._commands:
            self._heard(self._commands.pop(0))
        control.resume(self.daemon.own / "control")
        until(self._is_idle, "an idle daemon", 300)
        time.sleep(2)  # its rooms and pipes come to rest
        now = self._gauges()
        folders = len(list(fs.walk(self.daemon.inbox)))
        return Gauges(now.rss_mib, now.descriptors, now.threads, now.watches - folders)

    def _count(self) -> None:
        """Assert that each image is there once or was taken away, and that the spool is in order."""
        self.figures = accounts.count(self.daemon.home, self.deaths)
        own = self.daemon.own
        assert [str(p) for s in ("pending", "active") for p in (own / s).iterdir()] == []
        assert list((own / "finished").iterdir()) == []
        lines = self.daemon.log_file.read_text().splitlines()
        assert [line for line in lines if not _is_json(line)][:5] == []


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def crowded(
    seed: int, images: int, kills: int, changes: dict[str, Any], without: str = ""
) -> Iterator[CrowdedCampaign]:
    """A campaign among people in a home of its own; whatever runs is killed at the end."""
    with ExitStack() as stack:
        home = stack.enter_context(open_home())
        daemon = Daemon(home, merged(SETTINGS, changes))
        are_users = _can_become_users()
        for name in ("archive", "people", "flags", "other"):
            (home / name).mkdir()
            (home / name).chmod(0o777)
        if are_users:
            give_to_group(daemon)
            try:
                stack.enter_context(disks.tmpfs(home / "other", "1g"))
                (home / "other").chmod(0o777)
            except pytest.skip.Exception:
                pass  # then all people have one file system
        crowd = Crowd(daemon, seed, are_users, without)
        stack.callback(_end, daemon, crowd)
        yield CrowdedCampaign(daemon, seed, images, kills, crowd=crowd)


def _can_become_users() -> bool:
    try:
        promptdrop_as(DAEMON)
    except pytest.skip.Exception:
        return False
    return True


def _end(daemon: Daemon, crowd: Crowd) -> None:
    crowd.kill()
    if daemon.process and daemon.process.poll() is None:
        daemon.kill()


def is_flat(before: Gauges, after: Gauges) -> bool:
    """Whether a life has kept nothing of the machine but a few MiB."""
    grown = after.rss_mib - before.rss_mib
    same = asdict(before) | {"rss_mib": 0} == asdict(after) | {"rss_mib": 0}
    return same and grown <= MEMORY_MIB
