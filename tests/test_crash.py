"""Nothing lost, nothing twice, nothing half-visible, wherever the daemon dies.

Each case builds a spool once, runs it to the end undisturbed for reference, then once for every
change to the disk with the daemon dead before that change, restarted, and compared. Seeds are in
the files, so every image must come out with the reference's very bytes.
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

from harness import Daemon, until

CRASH_AT = str(Path(__file__).with_name("crash_at.py"))
QUICK: dict[str, Any] = {
    "watch": {"settle_seconds": 0.02, "rescan_seconds": 0.1, "give_up_seconds": 0.05},
    "engine": {"warmup": [], "max_attempts": 1},
    "defaults": {"steps": 1},
}
Make = Callable[..., Daemon]
Drain = Callable[[Daemon, int], int]


@pytest.fixture(scope="module")
def drain() -> Iterator[Drain]:
    """`drain(daemon, n)`: `run --drain`, dead before its n-th change; returns the exit status."""
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
    """Every file a reader sees in outbox and failed, by its path; but the outbox's status."""
    folders = {"outbox": daemon.outbox, "failed": daemon.failed}
    return {
        f"{name}/{path.relative_to(folder)}": path.read_bytes()
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != "status.json"
    }


def lasting(path: str, data: bytes) -> Any:
    """What of a file must be the same in every run: all but times, ids and the machine's figures."""
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
    daemon.drop("never.txt", '--prompt "never" --seed 7\n')
    daemon.until_log("job.claimed", file="never.txt")
    daemon.stop()
    assert daemon.run("cancel", "never.txt").returncode == 0
    assert daemon.run("retry", "--all").returncode == 0
    assert daemon.run("resume").returncode == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "build",
    [a_job_in_a_sub_folder, a_partly_failed_job_and_a_refused_file, a_retry_and_a_cancel],
    ids=lambda build: build.__name__,
)
def test_a_crash_at_any_change_loses_nothing(make_daemon: Make, drain: Drain, build: Any) -> None:
    """Dead before the n-th rename, mkdir, fsync ... for every n: the same files come out, once."""
    assert crash_everywhere(make_daemon, drain, build) > 20


@pytest.mark.timeout(900)
def test_a_crash_with_the_outbox_on_another_file_system(
    make_daemon: Make, drain: Drain, tmp_path: Path
) -> None:
    """The same where moves into outbox and failed are copies."""
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


@pytest.mark.timeout(300)
def test_twenty_kills_during_forty_images(make_daemon: Make) -> None:
    """SIGKILL of daemon and engine at random moments: every image once, whole, with its seed."""
    moments = random.Random(20)
    daemon = make_daemon({**QUICK, "defaults": {"steps": 2}})
    for n in range(4):
        daemon.drop(f"job{n}.yaml", f"prompt: '!slow 0.01 x'\ncount: 10\nseed: {n * 100}\n")
    for _ in range(20):
        before = len(list(daemon.outbox.rglob("*-00*.json")))
        wanted = before + moments.choice((0, 1, 1, 2, 3))
        daemon.start()
        until(
            lambda wanted=wanted: (
                len(list(daemon.outbox.rglob("*-00*.json"))) >= wanted or daemon.unfinished() == []
            ),
            "more images",
        )
        _kill_group(daemon)
    done = daemon.drain()

    assert done.returncode == 0
    for n in range(4):
        sidecars = daemon.sidecars(f"job{n}")
        assert [s["request"]["seed"] for s in sidecars] == list(range(n * 100, n * 100 + 10))
        assert daemon.job(f"job{n}")["outcome"] == "done"
        for sidecar in sidecars:
            data = (daemon.outbox / f"job{n}" / sidecar["image"]["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == sidecar["image"]["sha256"]
    assert len([p for p in daemon.tree() if p.endswith(".png")]) == 40
    assert hidden_leftovers(daemon) == []


def _kill_group(daemon: Daemon) -> None:
    """The daemon dies first; its engine follows at once (PR_SET_PDEATHSIG)."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait(30)
