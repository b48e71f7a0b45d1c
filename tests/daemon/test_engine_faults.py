"""Faults of an engine with an image in hand are charged to that image and to no other."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import Daemon, MakeDaemon, alive, jsonl, until

QUICK = {"image_timeout_seconds": 0.3, "kill_grace_seconds": 0.3, "max_attempts": 2}


def test_a_fault_fails_its_image_and_no_other(make_daemon: MakeDaemon) -> None:
    """However an image ends the engine, all others of its job are rendered and the reason is named."""
    faults = {
        "segfault": "SIGSEGV",
        "crash": "exit status 3",
        "unknown": "exit status 1",
        "raise": "scripted by !raise",
        "constant": "same colour",
    }
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    for fault in faults:
        daemon.drop(f"{fault}.jsonl", jsonl("first", f"!{fault}", "third"))
    done = daemon.drain()
    jobs = {fault: daemon.job(fault) for fault in faults}

    assert done.returncode == 0
    for fault, said in faults.items():
        job = jobs[fault]
        assert [i["outcome"] for i in job["images"]] == ["rendered", "failed", "rendered"]
        assert said in job["images"][1]["error"]
        assert said in daemon.error(f"{fault}.jsonl")["error"]
        assert {s["job"]["attempt"] for s in daemon.sidecars(fault)} == {1}
        assert job["totals"] | {"seconds": 0} == {
            "images": 3, "rendered": 2, "failed": 1, "cancelled": 0, "seconds": 0,
        }  # fmt: skip


def test_a_fault_that_happens_once_is_made_good(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """The second attempt renders the image, with the seed of the first; its neighbour is not charged."""
    faults = ("raise", "crash", "unknown", "hang")
    daemon = make_daemon({"engine": QUICK})
    for fault in faults:
        daemon.drop(f"{fault}.jsonl", jsonl(f"!once-{fault} {tmp_path}/{fault} a cat", "a dog"))
    daemon.drain()

    for fault in faults:
        job, (cat, dog) = daemon.job(fault), daemon.sidecars(fault)
        assert job["outcome"] == "done"
        assert (cat["job"]["attempt"], dog["job"]["attempt"]) == (2, 1)
        assert cat["request"]["seed"] == job["images"][0]["seed"]
        assert (tmp_path / fault).exists()


def test_a_retried_image_has_the_pixels_of_an_undisturbed_one(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """An attempt leaves no trace in the image: same prompt and seed, same file."""
    daemon = make_daemon()
    prompt = f"!once-crash {tmp_path}/flag a cat"
    daemon.drop("a.yaml", f'prompt: "{prompt}"\nseed: 5\n')
    daemon.drain()
    daemon.drop("b.yaml", f'prompt: "{prompt}"\nseed: 5\n')
    daemon.drain()
    (a,), (b,) = daemon.sidecars("a"), daemon.sidecars("b")

    assert (a["job"]["attempt"], b["job"]["attempt"]) == (2, 1)
    assert a["image"]["sha256"] == b["image"]["sha256"]


@pytest.mark.parametrize("fault", ["half", "huge", "garbage", "nonsense", "close", "spin"])
def test_an_engine_that_talks_nonsense_or_nothing_is_replaced(
    make_daemon: MakeDaemon, fault: str
) -> None:
    """Such an engine sends half an answer, an endless one, no pickle or nothing, closes the pipe or
    swallows the alarm. Its image is charged, all others are rendered, and the daemon stays responsive."""
    daemon = make_daemon({"engine": {**QUICK, "max_attempts": 1}})
    daemon.drop("a.jsonl", jsonl(f"!{fault}", "second"))
    daemon.start()
    daemon.until_log("image.failed")
    daemon.drop("b.txt", "a dog\n")
    b, a = daemon.job("b"), daemon.job("a")

    assert [i["outcome"] for i in a["images"]] == ["failed", "rendered"]
    assert b["outcome"] == "done"
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1]
    assert not alive(daemon.log("engine.starting")[0]["pid"])
    assert daemon.stop() == 0


def test_the_daemon_goes_on_while_an_engine_is_in_the_middle_of_an_answer(daemon: Daemon) -> None:
    """Half a message on the pipe blocks nobody: files are claimed and refused meanwhile."""
    daemon.drop("a.txt", "!half\n")
    daemon.start()
    daemon.until_begun()
    daemon.drop("b.txt", "a dog\n")
    daemon.drop("bad.yaml", "promt: x\n")
    daemon.until_log("job.claimed", file="b.txt")

    assert daemon.error("bad.yaml")["outcome"] == "refused"
    assert daemon.log("engine.killed") == []
    assert daemon.stop() == 0


def test_an_engine_killed_for_memory_is_replaced(daemon: Daemon) -> None:
    """If the kernel's OOM killer ends it, in a memory cgroup, its image is charged; others are rendered."""
    daemon.write_config({"engine": {"max_attempts": 1}})
    daemon.start().until_ready()
    with memory_limit(daemon.engine_pid(), 300 << 20):
        daemon.drop("a.jsonl", jsonl("!oom", "second"))
        job = daemon.job("a")

    assert [i["outcome"] for i in job["images"]] == ["failed", "rendered"]
    assert "killed by SIGKILL" in job["images"][0]["error"]
    assert daemon.stop() == 0


@contextmanager
def memory_limit(pid: int, limit: int) -> Iterator[None]:
    """Put a process into a memory cgroup (v1) of its own, and wait for its end afterwards."""
    group = Path(f"/sys/fs/cgroup/memory/promptdrop-test-{pid}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as e:
        pytest.skip(f"no memory cgroup can be made here: {e}")
    try:
        yield
    finally:
        until(lambda: not alive(pid), "the end of the limited process")
        until(lambda: not (group / "cgroup.procs").read_text(), "an empty cgroup")
        group.rmdir()
