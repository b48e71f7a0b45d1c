"""Wherever the daemon dies, nothing is lost, done twice or visible half.

Each case builds a spool once, runs it to the end undisturbed for reference, then once for every
change to the disk with a daemon that dies before that change and is restarted, and compares the two.
Seeds are in the files, so every image must have the very bytes of the reference.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import disks
from campaign import MEMORY_MIB, SETTINGS, Campaign
from crowded import crowded
from harness import REPOSITORY, Daemon, alive, until

CRASH_AT = str(REPOSITORY / "tests" / "support" / "crash_at.py")
QUICK: dict[str, Any] = {
    "watch": {"settle_seconds": 0.02, "rescan_seconds": 0.1, "give_up_seconds": 0.05},
    "engine": {"warmup": [], "max_attempts": 1},
    "defaults": {"steps": 1},
}
Make = Callable[..., Daemon]
Drain = Callable[[Daemon, int], int]


@pytest.fixture(scope="module")
def drain() -> Iterator[Drain]:
    """`drain(daemon, n)` runs `run --drain`, dead before its n-th change; returns the exit status."""
    with subprocess.Popen(
        [sys.executable, CRASH_AT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin
        assert server.stdout

        def drain(daemon: Daemon, n: int) -> int:
            assert server.stdin
            assert server.stdout
            arguments = ["run", "--drain", "--config", str(daemon.config)]
            count = str(daemon.home / "count")
            request = {"n": n, "arguments": arguments, "home": str(daemon.home), "count": count}
            print(json.dumps(request), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield drain
        server.stdin.close()


def visible(daemon: Daemon) -> dict[str, bytes]:
    """Every file that a reader sees in outbox and failed, except the outbox's status, by its path."""
    folders = {"outbox": daemon.outbox, "failed": daemon.failed}
    return {
        f"{name}/{path.relative_to(folder)}": path.read_bytes()
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != "status.json"
    }


def lasting(path: str, data: bytes) -> Any:
    """The content that a file must have in every run: all but times, ids and the machine's figures."""
    if not path.endswith(".json"):
        return hashlib.sha256(data).hexdigest()
    document = json.loads(data)
    if document.get("schema") == "promptdrop.image/1":
        job = {key: document["job"][key] for key in ("name", "file", "image", "images")}
        return job, document["image"], document["request"]
    if document.get("schema") == "promptdrop.job/1":
        return document["outcome"], document["images"], document["folder"]
    if document.get("schema") == "promptdrop.error/1":
        return document["outcome"], document["missing"], document["folder"]
    return document


def whole(files: dict[str, bytes], *references: dict[str, bytes]) -> None:
    """Assert that each visible file is one of the references', complete."""
    for path, data in files.items():
        known = [lasting(path, other[path]) for other in references if path in other]
        assert lasting(path, data) in known, path


def hidden_leftovers(daemon: Daemon) -> list[str]:
    """Temporaries and unfinished jobs, of which none may stay."""
    temporaries = [
        str(path)
        for folder in (daemon.root, daemon.outbox, daemon.failed)
        for path in folder.rglob(".promptdrop-*")
    ]
    return [*temporaries, *daemon.unfinished(), *map(str, (daemon.own / "finished").glob("*"))]


def crash_everywhere(
    make: Make, drain: Drain, build: Callable[[Daemon], None], changes: Any = None
) -> int:
    """Run the case with a crash at every change to the disk; returns how many there were."""
    template = make(_settings(changes, make, "template"), home="template")
    build(template)
    before = visible(template)
    reference = _copy(make, template, "reference", changes)
    assert drain(reference, 0) == 0
    count = int((reference.home / "count").read_text())
    expected = visible(reference)
    assert hidden_leftovers(reference) == []
    for n in range(1, count + 1):
        daemon = _copy(make, template, "crash", changes)
        drain(daemon, n)
        seen = visible(daemon)
        whole(seen, expected, before)
        images = {p: d for p, d in seen.items() if _is_sidecar(p, d)}
        status = drain(daemon, 0)
        after = visible(daemon)

        assert status == 0, f"crash at {n}:\n{daemon.log_file.read_text()[-3000:]}"
        assert sorted(after) == sorted(expected), f"crash at {n}"
        whole(after, expected)
        assert {p: after[p] for p in images} == images, f"crash at {n}: rendered again"
        assert hidden_leftovers(daemon) == [], f"crash at {n}"
        for folder in (daemon.home, daemon.outbox, daemon.failed):
            shutil.rmtree(folder, ignore_errors=True)
    return count


def _is_sidecar(path: str, data: bytes) -> bool:
    return path.endswith(".json") and b'"promptdrop.image/1"' in data


def _settings(changes: Any, make: Make, home: str) -> dict[str, Any]:
    given = changes(home) if callable(changes) else (changes or {})
    return {**QUICK, **given}


def _copy(make: Make, template: Daemon, home: str, changes: Any) -> Daemon:
    target = template.home.parent / home
    target.mkdir(exist_ok=True)
    shutil.copytree(template.root, target / "spool", symlinks=True)
    daemon = make(_settings(changes, make, home), home=home)
    if callable(changes):
        for name in ("outbox", "failed"):
            source = Path(template.settings["paths"][name])
            copy = Path(daemon.settings["paths"][name])
            shutil.copytree(source, copy, dirs_exist_ok=True)
            setattr(daemon, name, copy)
    return daemon


def a_job_in_a_sub_folder(daemon: Daemon) -> None:
    daemon.drop("sub/cat.txt", '--prompt "a cat" --seed 1\n--prompt "two" --seed 2 --format jpeg\n')


def a_partly_failed_job_and_a_refused_file(daemon: Daemon) -> None:
    daemon.drop("part.yaml", "prompts: [fine, '!raise boom']\nseed: 4\n")
    daemon.drop("bad.yaml", "promt: x\n")


def a_retry_and_a_cancel(daemon: Daemon) -> None:
    flag = daemon.home / "flag"
    daemon.drop("again.yaml", f"prompts: [fine, '!once-raise {flag} now']\nseed: 5\n")
    daemon.drop("wrong.txt", '--prompt "x" --seed 6 --wdith 64\n')
    daemon.drain()
    (daemon.failed / "wrong.txt").write_text('--prompt "x" --seed 6 --width 64\n')
    assert daemon.run("pause").returncode == 0
    daemon.start()
    # Keeps the engine busy until the cancel has been carried out.
    daemon.drop("hold.txt", '--prompt "!wait spool/failed/never.txt.error.json" --seed 9\n')
    daemon.until_log("job.claimed", file="hold.txt")
    daemon.drop("never.txt", '--prompt "never" --seed 7\n')
    daemon.until_log("job.claimed", file="never.txt")
    daemon.stop()
    assert daemon.run("cancel", "never.txt").returncode == 0
    assert daemon.run("retry", "--all").returncode == 0
    assert daemon.run("resume").returncode == 0


def a_cancel_of_a_job_in_hand(daemon: Daemon) -> None:
    daemon.drop("half.yaml", "prompts: [fine, '!slow 60 x', never]\nseed: 8\n")
    daemon.start()
    daemon.until_log("image.published")
    daemon.until_begun(2)
    daemon.kill()
    assert daemon.run("cancel", "half.yaml").returncode == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "build",
    [
        a_job_in_a_sub_folder,
        a_partly_failed_job_and_a_refused_file,
        a_retry_and_a_cancel,
        a_cancel_of_a_job_in_hand,
    ],
    ids=lambda build: build.__name__,
)
def test_a_crash_at_any_change_loses_nothing(make_daemon: Make, drain: Drain, build: Any) -> None:
    """If the daemon dies before the n-th rename, mkdir, fsync ..., for every n, the same files come out once."""
    assert crash_everywhere(make_daemon, drain, build) > 20


@pytest.mark.timeout(900)
def test_a_crash_with_the_outbox_on_another_file_system(
    make_daemon: Make, drain: Drain, tmp_path: Path
) -> None:
    """A crash at any change loses nothing also where moves into outbox and failed are copies."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no second file system here")
    base = shared / f"promptdrop-test-{os.getpid()}"

    def elsewhere(home: str) -> dict[str, Any]:
        paths = {name: str(base / home / name) for name in ("outbox", "failed")}
        for path in paths.values():
            Path(path).mkdir(parents=True, exist_ok=True)
        return {"paths": paths}

    def build(daemon: Daemon) -> None:
        daemon.drop("cat.txt", '--prompt "a cat" --seed 1\n')
        daemon.drop("part.txt", '--prompt "!raise" --seed 2\n')

    try:
        assert crash_everywhere(make_daemon, drain, build, elsewhere) > 20
    finally:
        shutil.rmtree(base)


@pytest.mark.timeout(900)
def test_a_crash_in_the_recovery_from_a_crash(make_daemon: Make, drain: Drain) -> None:
    """If the daemon dies before its n-th change and, restarted, before its m-th, the third completes all."""
    template = make_daemon(QUICK, home="template")
    a_partly_failed_job_and_a_refused_file(template)
    reference = _copy(make_daemon, template, "reference", None)
    drain(reference, 0)
    count = int((reference.home / "count").read_text())
    expected = visible(reference)
    moments = random.Random(1)
    for _ in range(12):
        n, m = moments.randint(count // 4, count), moments.randint(1, 40)
        daemon = _copy(make_daemon, template, "crash", None)
        drain(daemon, n)
        images = {p: d for p, d in visible(daemon).items() if _is_sidecar(p, d)}
        drain(daemon, m)
        whole(visible(daemon), expected, visible(template))
        status = drain(daemon, 0)
        after = visible(daemon)

        assert (status, sorted(after)) == (0, sorted(expected)), f"crashes at {n} and {m}"
        assert {p: after[p] for p in images} == images, f"crashes at {n} and {m}: rendered again"
        assert hidden_leftovers(daemon) == [], f"crashes at {n} and {m}"
        shutil.rmtree(daemon.home)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_after_each_image(make_daemon: Make, tmp_path: Path, kind: str) -> None:
    """Images that were published before it are there afterwards, and whole; each sidecar has its image;
    the rest is rendered, and nothing twice."""
    with disks.block(tmp_path / "block", kind) as disk:
        daemon = make_daemon({**QUICK, "root": str(disk.path / "spool")})
        daemon.drop("cat.yaml", "prompt: '!slow 0.1 a cat'\ncount: 6\nseed: 1\n")
        os.sync()
        known: dict[str, bytes] = {}
        for cut in range(1, 7):
            daemon.start()
            until(lambda cut=cut: len(daemon.sidecars("cat")) >= cut, f"image {cut}")
            published = {f"outbox/{file}" for file, _ in daemon.published()}
            disk.cut_power()
            _kill_group(daemon)
            until(lambda: not alive(daemon.engine_pid()), "the end of the engine")
            disk.unmount()
            disk.mount()
            seen = visible(daemon)
            sidecars = {p: d for p, d in seen.items() if _is_sidecar(p, d)}

            assert published <= set(seen), f"power cut after image {cut}"
            for path, data in sidecars.items():
                image = json.loads(data)["image"]
                pixels = seen[f"{path.rpartition('/')[0]}/{image['file']}"]
                assert hashlib.sha256(pixels).hexdigest() == image["sha256"]
            assert {p: sidecars[p] for p in known} == known, f"power cut after image {cut}"
            known = sidecars
        assert daemon.drain().returncode == 0
        assert [s["request"]["seed"] for s in daemon.sidecars("cat")] == [1, 2, 3, 4, 5, 6]
        assert daemon.job("cat")["outcome"] == "done"
        assert hidden_leftovers(daemon) == []


def _kill_group(daemon: Daemon) -> None:
    """Kill the daemon; its engine follows at once (PR_SET_PDEATHSIG)."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait(30)


@pytest.mark.timeout(600)
def test_a_short_night_of_kills(make_daemon: Make) -> None:
    """After SIGKILL of daemon, engine or both, SIGTERM, SIGHUP, pause, cancel and retry at random moments
    every image is there once, whole, with its seed. `make soak` does the same for longer."""
    campaign = Campaign(make_daemon(SETTINGS), seed=20, images=150, kills=12)
    campaign.run()

    assert sum(map(len, campaign.asked.values())) >= 150
    assert sum(n for what, n in campaign.done.items() if what.startswith("SIGKILL")) >= 12


@pytest.mark.timeout(600)
def test_a_short_night_among_people() -> None:
    """While people drop, withdraw, take, move and delete at any moment, and an administrator gives commands, every
    image is delivered once or gone with its file, and nothing lies about. `make soak` does it for longer."""
    with crowded(seed=20, images=150, kills=10, changes={"engine": {"workers": 2}}) as campaign:
        campaign.run()

    assert campaign.figures["images"] >= 150
    assert campaign.killed() >= 10


@pytest.mark.timeout(600)
def test_the_memory_of_the_daemon_is_flat(make_daemon: Make) -> None:
    """The daemon's memory does not grow with the number of images that it has published."""
    assert Campaign(make_daemon(SETTINGS), seed=1, images=0, kills=0).growth_mib(400) <= MEMORY_MIB
