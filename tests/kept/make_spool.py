"""Make spool-0.1.0.tar.gz: the spool that test_kept_spool.py goes on with. Run once, with 0.1.0:

    PYTHONPATH=/CHECKOUT_OF_0.1.0/daemon:/CHECKOUT_OF_0.1.0/tests python tests/kept/make_spool.py

Every life of a daemon has a spool of its own here, because a next life would complete what the one
before it has left. Most lives are ended just before a change to the disk (crash_at.py), and the spools
that they leave are put together in one tree. Ids and times are those of the day it was made; the
machine's name and boot are taken out of the records, owners and times out of the archive.
"""

import gzip
import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import promptdrop
from harness import Daemon, until
from promptdrop import clock

# Long on purpose: what_is_half_done is a list of moments, one call each, with nothing between them.
MADE_BY = "0.1.0"
ARCHIVE = Path(__file__).with_name(f"spool-{MADE_BY}.tar.gz")
# No value is a default, and each differs from the configuration in test_kept_spool.py.
SETTINGS: dict[str, Any] = {
    "watch": {"settle_seconds": 0.02, "rescan_seconds": 0.1, "give_up_seconds": 0.05},
    "engine": {"warmup": [], "max_attempts": 2, "image_timeout_seconds": 55},
    "prompt": {
        "max_tokens": 16,
        "overflow": "keep_tail",
    },  # eight words, and eight tokens of the template
    "defaults": {"width": 80, "height": 64, "steps": 3},
    "output": {
        "format": "webp",
        "quality": 80,
        "name": "{job}-{seed}-{image}",
        "mode": "0640",
        "directory_mode": "2750",
    },
}
ONE_ATTEMPT = {"engine": {**SETTINGS["engine"], "max_attempts": 1}}
PARTLY = "prompts: [first, '!once-raise {0}.flag second', third]\nseed: {1}\n"
SLOWLY = (
    "prompts: [first, '!slow 0.1 second', '!slow 0.1 third']\nseed: {0}\n"  # one after the other
)

Build = Callable[[Daemon], None]
Wanted = Callable[[Daemon], Any]


class Maker:
    """Makes a spool for each life of a daemon, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lives: list[Daemon] = []  # the first one's version, status and lock are kept
        crash_at = importlib.util.find_spec("crash_at")
        assert crash_at
        assert crash_at.origin
        self._server = subprocess.Popen(
            [sys.executable, crash_at.origin],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def life(self, name: str, changes: dict[str, Any] | None = None) -> Daemon:
        """A daemon on a new spool that is kept."""
        self.lives.append(self._daemon(name, changes))
        return self.lives[-1]

    def cut_short(
        self, name: str, build: Build, wanted: Wanted, changes: dict[str, Any] | None = None
    ) -> None:
        """Let daemons die before their n-th change to the disk, n = 1, 2 ..., until a spool is as wanted."""
        template = self._daemon(f"{name}-template", changes)
        build(template)
        n = 0
        while True:
            n += 1
            daemon = self._daemon(f"{name}-{n}", changes, template.root)
            status = self._drain(daemon, n)
            if wanted(daemon):
                break
            assert status == 137, f"{name}: never as wanted"
        self.lives.append(daemon)
        print(f"{name}: dead before change {n}")

    def close(self) -> None:
        """End the process that forks the daemons."""
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()

    def _daemon(
        self, name: str, changes: dict[str, Any] | None, template: Path | None = None
    ) -> Daemon:
        home = self.folder / name
        home.mkdir()
        if template:
            shutil.copytree(template, home / "spool")
        return Daemon(home, {**SETTINGS, **(changes or {})})

    def _drain(self, daemon: Daemon, n: int) -> int:
        assert self._server.stdin
        assert self._server.stdout
        arguments = ["run", "--drain", "--config", str(daemon.config)]
        request = {"n": n, "arguments": arguments, "home": str(daemon.home), "count": "count"}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())


def what_ended(maker: Maker) -> None:
    """Make jobs that are done, refused, partial, failed, cancelled; a drop and a retry no daemon has seen."""
    daemon = maker.life("ended", ONE_ATTEMPT)
    daemon.drop("finished.txt", '--prompt "a finished one" --seed 100\n')
    daemon.drop("refused.yaml", "promt: nobody knows this field\n")
    daemon.drop("sub/partly.yaml", PARTLY.format("partly", 110))
    daemon.drop("told.yaml", "prompts: ['!once-raise told.flag once more']\nseed: 120\n")
    daemon.start()
    daemon.job("finished")
    for name in ("refused.yaml", "sub/partly.yaml", "told.yaml"):
        daemon.error(name)
    until(lambda: not daemon.unfinished(), "the end of all")
    daemon.drop("stopped.yaml", "prompts: [first, '!once-slow stopped.flag 9 x', third]\n")
    daemon.until_begun(2)
    asked(daemon, "cancel", "stopped.yaml")
    daemon.job("stopped")
    daemon.stop()
    asked(daemon, "retry", "told.yaml")
    daemon.drop("later.txt", '--prompt "nobody has taken this" --seed 130\n')


def what_waits(maker: Maker) -> None:
    """Make jobs that were claimed and resolved while paused; the next life is to cancel one of them."""
    daemon = maker.life("waits")
    waits_and_dies(
        daemon,
        {
            "waiting.jsonl": "".join(
                f"{json.dumps(image)}\n"
                for image in (
                    {"prompt": "all by default", "priority": 7},
                    {"prompt": "a seed", "seed": 2**63 - 1, "meta": {"shot": 2}},
                    {"prompt": "its own", "width": 128, "height": 80, "steps": 4, "format": "png"},
                    {"prompt": "two of it", "negative_prompt": "no", "count": 2},
                    {"prompt": "!once-raise waiting.flag two attempts are recorded", "seed": 5},
                    {"prompt": "one two three four five six seven eight nine ten", "seed": 6},
                )
            ),
            "sub/unwanted.txt": '--prompt "cancelled by a command" --seed 140\n',
        },
    )
    asked(daemon, "cancel", "sub/unwanted.txt")


def what_is_in_hand(maker: Maker) -> None:
    """Make a job with one image published, one failed once, one in hand and one not begun."""
    daemon = maker.life("in-hand")
    second, third = "!once-raise charged.flag second", "!once-slow inhand.flag 60 third"
    daemon.drop("inhand.yaml", f"prompts: [first, '{second}', '{third}', fourth]\nseed: 150\n")
    daemon.start()
    daemon.until_log("image.published", image=1)
    daemon.until_begun(3)
    (charged,) = own(daemon, "active/*/0002.begun")
    until(lambda: json.loads(charged.read_bytes()) == {"attempts": 1, "deaths": 0}, "the charge")
    daemon.kill()


def what_is_half_done(maker: Maker) -> None:
    """Make jobs of daemons that died between two changes to the disk that belong together."""

    def drops(name: str, content: str) -> Build:
        def build(daemon: Daemon) -> None:
            daemon.drop(name, content)

        return build

    def is_being_published(daemon: Daemon) -> bool:
        return bool(
            own(daemon, "active/*/0001.published") and own(daemon, "active/*/0002.publishing")
        )

    def is_withdrawn(daemon: Daemon) -> None:
        waits_and_dies(daemon, {"withdrawn.txt": '--prompt "withdrawn" --seed 230\n'})
        asked(daemon, "cancel", "withdrawn.txt")

    def is_to_return(daemon: Daemon) -> None:
        daemon.drop("returning.yaml", PARTLY.format("returning", 250))
        daemon.drain()
        asked(daemon, "retry", "returning.yaml")

    maker.cut_short(
        "claimed",
        drops("claimed.txt", '--prompt "claimed and no more"\n'),
        lambda daemon: (
            own(daemon, "pending/*/drop/claimed.txt") and not own(daemon, "pending/*/request.json")
        ),
    )
    maker.cut_short(
        "unnamed",  # the image has no name yet
        drops("unnamed.yaml", SLOWLY.format(200)),
        lambda daemon: (
            is_being_published(daemon)
            and list(daemon.outbox.glob("unnamed/.promptdrop-*"))
            and not list(daemon.outbox.glob("unnamed/*-2.webp"))
        ),
    )
    maker.cut_short(
        "bare",  # the image has its name and no sidecar
        drops("sub/bare.yaml", SLOWLY.format(210)),
        lambda daemon: (
            is_being_published(daemon)
            and list(daemon.outbox.glob("sub/bare/*-2.webp"))
            and not list(daemon.outbox.glob("sub/bare/*-2.json"))
        ),
    )
    maker.cut_short(
        "unsummed",  # the request is in the outbox, job.json is not
        drops("unsummed.txt", '--prompt "all of it" --seed 220\n'),
        lambda daemon: (
            (daemon.outbox / "unsummed/request.txt").exists()
            and not (daemon.outbox / "unsummed/job.json").exists()
        ),
    )
    maker.cut_short(
        "withdrawn",  # its cancel is recorded, and not carried out
        is_withdrawn,
        lambda daemon: own(daemon, "pending/*/cancelled"),
    )
    maker.cut_short(
        "failing",  # the file is in failed/, its reason is not
        drops("failing.yaml", PARTLY.format("failing", 240)),
        lambda daemon: (
            own(daemon, "active/*/failing.json")
            and (daemon.failed / "failing.yaml").exists()
            and not (daemon.failed / "failing.yaml.error.json").exists()
        ),
        ONE_ATTEMPT,
    )
    maker.cut_short(
        "refusing",  # its place in failed/ is recorded, nothing else done
        drops("refusing.yaml", "prompts: 7\n"),
        lambda daemon: (
            own(daemon, "pending/*/failing.json") and own(daemon, "pending/*/drop/refusing.yaml")
        ),
    )
    maker.cut_short(
        "returning",  # a retry has moved the file back, and the job is parked still
        is_to_return,
        lambda daemon: own(daemon, "parked/*/drop/returning.yaml"),
        ONE_ATTEMPT,
    )


def own(daemon: Daemon, pattern: str) -> list[Path]:
    """Return the files and folders in the daemon's state folder that match a pattern."""
    return list(daemon.own.glob(pattern))


def asked(daemon: Daemon, *arguments: str) -> None:
    """Run a command that must work."""
    done = daemon.run(*arguments)
    assert done.returncode == 0, done.stderr


def waits_and_dies(daemon: Daemon, drops: dict[str, str]) -> None:
    """Drop jobs that a paused daemon claims and resolves; then the daemon is killed."""
    asked(daemon, "pause")
    for name, content in drops.items():
        daemon.drop(name, content)
    daemon.start()
    until(lambda: len(daemon.log("job.claimed")) == len(drops), "the claims")
    daemon.kill()
    asked(daemon, "resume")


def put_together(lives: list[Daemon], spool: Path) -> None:
    """Put all spools together in one tree; files of which there can be only one are the first life's."""
    once = {"cache", "lock", "version", "status.json", ".promptdrop-status.json.tmp"}
    for n, daemon in enumerate(lives):
        here = {path.name for path in spool.rglob("*")}
        jobs = {path.name for path in daemon.root.glob(".promptdrop/*/2*")}
        assert not jobs & here, "an id came twice"
        ignored = shutil.ignore_patterns(*(once if n else ()))
        shutil.copytree(daemon.root, spool, dirs_exist_ok=True, ignore=ignored)
    name, boot = f'"{socket.gethostname()}"'.encode(), clock.boot_id().encode()
    for path in spool.rglob("*.*"):
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(data.replace(name, b'"kept"').replace(boot, b"the boot of then"))


def pack(spool: Path, archive: Path) -> None:
    """Pack a tree with modes, but without owners and times: the same tree gives the same archive."""

    def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(spool.rglob("*")):
            tar.add(path, str(path.relative_to(spool)), recursive=False, filter=without_owner)
    with archive.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped:
        zipped.write(packed.getvalue())


def main() -> None:
    """Make the archive anew."""
    assert promptdrop.__version__ == MADE_BY, f"this is promptdrop {promptdrop.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        try:
            for make in (what_ended, what_waits, what_is_in_hand, what_is_half_done):
                make(maker)
        finally:
            maker.close()
        spool = Path(folder) / "kept"
        put_together(maker.lives, spool)
        for path in spool.rglob("*"):
            assert not path.is_file() or folder.encode() not in path.read_bytes(), path
        pack(spool, ARCHIVE)
    print(f"{ARCHIVE.name}: {ARCHIVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
