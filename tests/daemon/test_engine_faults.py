"""What an engine may do wrong, and who pays for it: the image in hand, nobody else."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

import disks
from harness import Daemon, alive, until

MakeDaemon = Callable[..., Daemon]

QUICK = {"image_timeout_seconds": 0.3, "kill_grace_seconds": 0.3, "max_attempts": 2}
ONE_STEP = {"defaults": {"steps": 1}}  # what comes next is not prepared after the last step


def jsonl(*prompts: str) -> str:
    """A job of one image per prompt, as JSON lines."""
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


def test_a_timeout_in_python_leaves_the_engine_alive(make_daemon: MakeDaemon) -> None:
    """SIGALRM at image_timeout_seconds ends the image, charges it, and keeps the engine."""
    daemon = make_daemon({"engine": QUICK})
    daemon.drop("a.jsonl", jsonl("!hang", "fine"))
    done = daemon.drain()
    job = daemon.job("a")

    assert done.returncode == 0
    assert job["outcome"] == "partial"
    assert [i["outcome"] for i in job["images"]] == ["failed", "rendered"]
    assert "0.3 s (timeout_seconds)" in job["images"][0]["error"]
    assert "attempt 2 of 2" in job["images"][0]["error"]
    assert [e["attempt"] for e in daemon.log("image.failed")] == [1, 2]
    assert len(daemon.log("engine.starting")) == 1


def test_timeout_seconds_of_a_job_overrules_the_configuration(make_daemon: MakeDaemon) -> None:
    """`timeout_seconds` in the job file is the image's own limit."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.yaml", 'prompt: "!hang"\ntimeout_seconds: 0.2\n')
    daemon.drain()

    assert "longer than 0.2 s" in daemon.job("a")["images"][0]["error"]


def test_a_hang_that_holds_the_gil_costs_the_engine_and_only_that_image(
    make_daemon: MakeDaemon,
) -> None:
    """SIGKILL kill_grace_seconds after the timeout; a new engine; the prefetched image is not charged."""
    daemon = make_daemon({"engine": QUICK})
    daemon.drop("a.jsonl", jsonl("!hang-gil", "second", "third"))
    done = daemon.drain()
    job = daemon.job("a")

    assert done.returncode == 0
    assert job["outcome"] == "partial"
    assert [i["outcome"] for i in job["images"]] == ["failed", "rendered", "rendered"]
    assert "kill_grace_seconds" in job["images"][0]["error"]
    assert [(s["job"]["image"], s["job"]["attempt"]) for s in daemon.sidecars("a")] == [
        (2, 1),
        (3, 1),
    ]
    assert len(daemon.log("engine.killed")) == 2
    assert len(daemon.log("engine.starting")) == 3
    record = daemon.error("a.jsonl")
    assert (record["outcome"], record["missing"]) == ("partial", [1])
    assert (record["id"], record["folder"]) == (job["id"], "a")
    assert (daemon.failed / "a.jsonl").read_text() == jsonl("!hang-gil", "second", "third")


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


def test_a_stopped_engine_is_silent_for_stall_seconds_and_killed(make_daemon: MakeDaemon) -> None:
    """Silence for stall_seconds counts as death, long before the image's own timeout."""
    daemon = make_daemon({"engine": {"stall_seconds": 0.5, "max_attempts": 1}})
    daemon.drop("a.jsonl", jsonl("!stop", "fine"))
    began = time.monotonic()
    daemon.drain()

    assert time.monotonic() - began < 20  # not the 60 s of image_timeout_seconds
    assert "stall_seconds" in daemon.job("a")["images"][0]["error"]
    assert [s["job"]["image"] for s in daemon.sidecars("a")] == [2]


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


def test_on_timeout_placeholder_publishes_a_marked_picture(make_daemon: MakeDaemon) -> None:
    """After the last attempt a placeholder stands in the outbox; the image still counts as failed."""
    daemon = make_daemon({"engine": {**QUICK, "on_timeout": "placeholder"}})
    daemon.drop("a.jsonl", jsonl("!hang", "fine"))
    daemon.drop("b.txt", "!hang-gil\n")
    done = daemon.drain()
    a, b = daemon.job("a"), daemon.job("b")
    placeholder, rendered = daemon.sidecars("a")

    assert done.returncode == 0
    assert (a["outcome"], b["outcome"]) == ("partial", "failed")
    assert [i["outcome"] for i in a["images"]] == ["placeholder", "rendered"]
    assert (placeholder["outcome"], rendered["outcome"]) == ("placeholder", "rendered")
    assert placeholder["latency_ms"]["render"] is None
    assert (daemon.outbox / "a" / placeholder["image"]["file"]).stat().st_size > 0
    assert a["totals"]["failed"] == 1
    assert daemon.error("a.jsonl")["missing"] == [1]
    assert daemon.error("b.txt")["outcome"] == "failed"


def test_on_timeout_placeholder_is_for_timeouts_only(make_daemon: MakeDaemon) -> None:
    """An image that failed for another reason gets no picture."""
    daemon = make_daemon({"engine": {"max_attempts": 1, "on_timeout": "placeholder"}})
    daemon.drop("a.txt", "!raise\n")
    daemon.drain()

    assert daemon.job("a")["images"][0]["outcome"] == "failed"
    assert daemon.sidecars("a") == []


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("!load-raise", 1, "scripted by !load-raise"),
        ("!load-crash", 1, "exit status 3"),
        ("!load-hang", 1, "engine.load_timeout_seconds"),
    ],
)
def test_an_engine_that_cannot_load_ends_the_daemon(
    make_daemon: MakeDaemon, fault: str, status: int, said: str
) -> None:
    """The exit status and the reason come at once, and the jobs stay where they are."""
    limit = 1 if fault == "!load-hang" else 60
    daemon = make_daemon({"model": {"revision": fault}, "engine": {"load_timeout_seconds": limit}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    assert daemon.process

    assert daemon.process.wait(30) == status
    ending = daemon.log("daemon.ending")[-1]
    assert said in ending["reason"]
    assert ending["exit_status"] == status
    assert daemon.published() == []
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1
    assert not alive(daemon.engine_pid())


def test_an_engine_killed_between_images_is_replaced_and_nobody_is_charged(
    daemon: Daemon,
) -> None:
    """A death without an image in hand costs a restart and nothing else."""
    daemon.start().until_ready()
    first = daemon.engine_pid()
    os.kill(first, signal.SIGKILL)
    daemon.until_log("engine.ready", times=2)
    daemon.drop("a.txt", "a cat\n")

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    assert daemon.engine_pid() != first
    assert daemon.log("engine.died")[0]["how"] == "killed by SIGKILL"
    assert daemon.stop() == 0


def test_an_engine_killed_with_an_image_in_hand_charges_that_image(
    make_daemon: MakeDaemon,
) -> None:
    """SIGKILL from outside while rendering is a failed attempt; the next one succeeds."""
    daemon = make_daemon(ONE_STEP)
    daemon.drop("a.jsonl", jsonl("!slow 0.9", "!slow 0.01"))
    daemon.start()
    daemon.until_begun()
    os.kill(daemon.engine_pid(), signal.SIGKILL)

    assert daemon.job("a")["outcome"] == "done"
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [2, 1]
    assert daemon.stop() == 0


def test_an_engine_that_keeps_dying_idle_ends_the_daemon(daemon: Daemon) -> None:
    """Five deaths in a row without an image begun: something else kills it, and the daemon says so."""
    daemon.start()
    for life in range(1, 6):
        daemon.until_log("engine.ready", times=life)
        os.kill(daemon.engine_pid(), signal.SIGKILL)
    assert daemon.process

    assert daemon.process.wait(30) == 1
    assert "died 5 times in a row" in daemon.log("daemon.ending")[-1]["reason"]


@pytest.mark.parametrize("prompt", ["!slow 5", "!hang-gil", "!hang"])
def test_no_engine_outlives_a_killed_daemon(daemon: Daemon, prompt: str) -> None:
    """PR_SET_PDEATHSIG: SIGKILL of the daemon alone ends the engine, whatever it is doing."""
    daemon.drop("a.txt", f"{prompt}\n")
    daemon.start()
    daemon.until_begun()
    engine = daemon.engine_pid()
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait(10)

    until(lambda: not alive(engine), "the end of the engine", 10)


def test_no_engine_outlives_a_daemon_killed_while_it_loads(make_daemon: MakeDaemon) -> None:
    """The same while the weights are being read."""
    daemon = make_daemon({"model": {"revision": "!load-hang"}})
    daemon.start()
    daemon.until_log("engine.stage", stage="loading weights")
    engine = daemon.engine_pid()
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait(10)

    until(lambda: not alive(engine), "the end of the engine", 10)


def test_a_death_while_prompts_are_measured_measures_them_again(make_daemon: MakeDaemon) -> None:
    """A job whose prompts wait to be counted is not lost with the engine."""
    daemon = make_daemon({"prompt": {"overflow": "refuse"}, "engine": {"max_attempts": 1}})
    daemon.drop("a.txt", "!slow 0.2\n")
    daemon.start()
    daemon.until_begun()
    daemon.drop("b.txt", "a dog\n")
    daemon.until_log("job.claimed", times=2)
    os.kill(daemon.engine_pid(), signal.SIGKILL)

    assert daemon.job("a")["outcome"] == "failed"
    assert daemon.job("b")["outcome"] == "done"
    assert daemon.stop() == 0


@pytest.mark.parametrize("fault", ["half", "huge", "garbage", "nonsense", "close", "spin"])
def test_an_engine_that_talks_nonsense_or_nothing_is_replaced(
    make_daemon: MakeDaemon, fault: str
) -> None:
    """Half an answer, an endless one, no pickle, no answer, a closed pipe, a loop that swallows the
    alarm: its image pays, all others are rendered, and the daemon answers all the while."""
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


def test_an_engine_stopped_while_idle_does_not_begin_and_charges_nobody(
    make_daemon: MakeDaemon,
) -> None:
    """It reads nothing, however much it is sent: killed after stall_seconds, nothing is charged."""
    daemon = make_daemon(
        {"engine": {"stall_seconds": 1, "max_attempts": 1}, "prompt": {"overflow": "refuse"}}
    )
    daemon.start().until_ready()
    os.kill(daemon.engine_pid(), signal.SIGSTOP)
    long = [f"{n} " + "\U0001f98a" * 19000 for n in range(10)]  # 760 kB, more than a pipe holds
    daemon.drop("a.txt", "\n".join(long))
    killed = daemon.until_log("engine.killed")
    job = daemon.job("a")

    assert "stall_seconds" in killed["reason"]
    assert job["outcome"] == "done"
    assert {s["job"]["attempt"] for s in daemon.sidecars("a")} == {1}
    assert len(daemon.log("engine.starting")) == 2
    assert daemon.stop() == 0


def test_a_stopped_engine_with_a_prefetched_image_charges_only_the_one_in_hand(
    make_daemon: MakeDaemon,
) -> None:
    """SIGSTOP from outside in the middle of an image."""
    daemon = make_daemon({"engine": {"stall_seconds": 1.5}, **ONE_STEP})
    daemon.drop("a.jsonl", jsonl("!slow 0.9 x", "second"))
    daemon.start()
    daemon.until_begun()
    os.kill(daemon.engine_pid(), signal.SIGSTOP)

    assert daemon.job("a")["outcome"] == "done"
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [2, 1]
    assert daemon.stop() == 0


def test_a_charged_image_is_tried_again_after_the_others_of_its_job(
    make_daemon: MakeDaemon,
) -> None:
    """What kills engines does not come next, and costs max_attempts lives, then only itself."""
    daemon = make_daemon({"engine": {"max_attempts": 3}})
    daemon.drop("a.jsonl", jsonl("!segfault", "second", "third", "fourth"))
    daemon.drain()
    failed = [e["timestamp"][:23] for e in daemon.log("image.failed")]
    started = [s["time"]["started"][:23] for s in daemon.sidecars("a")]

    assert [e["image"] for e in daemon.log("image.failed")] == [1, 1, 1]
    assert len(started) == 3
    assert failed[0] < min(started) <= max(started) < failed[1]
    assert len(daemon.log("engine.starting")) == 4
    assert daemon.job("a")["outcome"] == "partial"


@pytest.mark.parametrize("fault", ["crash", "unknown", "hang", "hang-gil"])
def test_a_text_that_ends_the_engine_beside_another_image_charges_its_own(
    make_daemon: MakeDaemon, fault: str
) -> None:
    """The next image's text is encoded while one is in hand: when that ends or hangs the engine, nobody
    is charged, the one in hand is rendered alone, and the other, found out, beside nobody any more."""
    daemon = make_daemon({"engine": {**QUICK, "image_timeout_seconds": 1}})
    daemon.drop("a.jsonl", jsonl("first", f"!text-{fault}", "!slow 0.1 third"))
    daemon.drain()
    job = daemon.job("a")

    assert [e["image"] for e in daemon.log("image.alone")] == [1]
    assert [e["image"] for e in daemon.log("image.failed")] == [2, 2]
    assert [i["outcome"] for i in job["images"]] == ["rendered", "failed", "rendered"]
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1, 1]
    assert len(daemon.log("engine.starting")) == (1 if fault == "hang" else 4)


def test_an_image_that_ends_the_engine_beside_anothers_text_is_charged_in_the_end(
    make_daemon: MakeDaemon,
) -> None:
    """Whose fault that was nobody knows: not charged at first, it is rendered with nothing beside it,
    and then it pays."""
    daemon = make_daemon({"engine": {"max_attempts": 2}})
    daemon.drop("a.jsonl", jsonl("!late-crash 0.2", "second", "third", "fourth", "fifth"))
    daemon.drain()

    assert [e["image"] for e in daemon.log("image.alone")] == [1]
    assert [e["attempt"] for e in daemon.log("image.failed")] == [1, 2]
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1, 1, 1, 1]
    assert len(daemon.log("engine.starting")) == 4


def test_a_text_that_fails_beside_another_image_costs_nothing_there(
    make_daemon: MakeDaemon,
) -> None:
    """What is wrong with a text only its own image is told."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.jsonl", jsonl("first", "!text-raise", "third"))
    daemon.drain()

    assert daemon.log("image.alone") == []
    assert [e["image"] for e in daemon.log("image.failed")] == [2]
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1, 1]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("!warm-crash", "while loading weights: the engine died: exit status 3"),
        ("!warm-raise", "warm-up failed: scripted by !raise"),
        ("!warm-segfault", "SIGSEGV"),
        ("!warm-hang-gil", "engine.load_timeout_seconds"),
        ("!warm-garbage", "cannot be read"),
    ],
)
def test_an_engine_that_cannot_warm_up_ends_the_daemon(
    make_daemon: MakeDaemon, fault: str, said: str
) -> None:
    """Exit 1 with the reason; the job stays."""
    limit = 1 if fault == "!warm-hang-gil" else 60
    daemon = make_daemon({"model": {"revision": fault}, "engine": {"load_timeout_seconds": limit}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    assert daemon.process

    assert daemon.process.wait(30) == 1
    assert said in daemon.log("daemon.ending")[-1]["reason"]
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1
    assert not alive(daemon.engine_pid())


def test_a_daemon_whose_engine_cannot_load_does_not_wait_for_its_end(
    make_daemon: MakeDaemon,
) -> None:
    """It ends when it knows the reason, though the engine process would linger for ever."""
    daemon = make_daemon({"model": {"revision": "!load-linger"}})
    daemon.start()
    assert daemon.process
    assert daemon.process.wait(30) == 1
    loading, ending = daemon.log("engine.stage")[0], daemon.log("daemon.ending")[0]
    known_after = datetime.fromisoformat(ending["timestamp"]) - datetime.fromisoformat(
        loading["timestamp"]
    )
    stopped = daemon.log("daemon.stopped")[0]
    ended_after = datetime.fromisoformat(stopped["timestamp"]) - datetime.fromisoformat(
        ending["timestamp"]
    )

    assert "scripted by !load-linger" in ending["reason"]
    assert known_after.total_seconds() < 1
    assert ended_after.total_seconds() < 1
    assert not alive(daemon.engine_pid())


def test_an_engine_killed_for_memory_is_replaced(daemon: Daemon) -> None:
    """The kernel's own OOM killer, in a memory cgroup: its image pays, the others are rendered."""
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
    """Put a process into a memory cgroup of its own (v1); it has ended afterwards."""
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


@pytest.mark.parametrize("at_the_end", ["cured", "stopped"])
def test_an_engine_in_uninterruptible_sleep_is_reported_and_waited_for(
    make_daemon: MakeDaemon, tmp_path: Path, at_the_end: str
) -> None:
    """Writing to a frozen file system it ignores even SIGKILL: status, log and STATUS= say so, the
    watchdog is fed no more, a stop is bounded, and once it has ended the work goes on."""
    daemon = make_daemon({"engine": {**QUICK, "stop_seconds": 1}})
    with Notified(tmp_path / "notify") as systemd, disks.block(tmp_path / "block") as disk:
        daemon.start(env=systemd.environment)
        daemon.until_ready()
        disk.freeze()
        daemon.drop("a.jsonl", jsonl(f"!once-write {tmp_path}/flag {disk.path}/file", "second"))
        daemon.until_log("engine.unkillable")
        status = daemon.until_status("the reason", lambda s: "does not end" in (s["reason"] or ""))
        reported = systemd.first("does not end")
        engine = daemon.engine_pid()
        state = Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[0]
        with pytest.raises(AssertionError):
            until(lambda: "WATCHDOG=1" in systemd.heard[reported:], "food for the watchdog", 1)
        if at_the_end == "stopped":
            assert daemon.stop() == 0
            disk.thaw()
            until(lambda: not alive(engine), "its end")
        else:
            disk.thaw()
            job = daemon.job("a")
            until(lambda: "WATCHDOG=1" in systemd.heard[reported:], "food for the watchdog")
            assert daemon.stop() == 0

    assert (state, status["state"]) == ("D", "waiting")
    if at_the_end == "cured":
        assert job["outcome"] == "done"
    else:
        assert len(daemon.unfinished()) == 1


class Notified:
    """What systemd would hear, with a watchdog of 0.4 s."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._listener = threading.Thread(target=self._listen)

    def __enter__(self) -> "Notified":
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._socket.close()

    def _listen(self) -> None:
        while said := self._socket.recv(4096):
            self.heard.append(said.decode())

    def first(self, text: str) -> int:
        """When a text was first heard; waits for it."""
        until(lambda: any(text in said for said in self.heard), text)
        return next(n for n, said in enumerate(self.heard) if text in said)


def test_an_image_that_daemons_die_of_goes_behind_and_then_fails(make_daemon: MakeDaemon) -> None:
    """Nobody is charged for a daemon's death, but 3 in a row with the same image in hand put it
    behind all other work, and 10 fail it with that reason."""
    daemon = make_daemon({"engine": {"warmup": []}, "queue": {"policy": "fifo"}})
    daemon.drop("a.txt", "!slow 60 x\n")
    for death in range(1, 11):
        daemon.start()
        if death == 4:
            assert daemon.job("b")["outcome"] == "done"
        counted = f'"deaths": {death}}}'
        until(lambda counted=counted: counted in _begun(daemon), counted)
        if death == 3:  # known to the next life before its engine is ready
            daemon.drop("b.txt", "a dog\n")
            until(lambda: len(daemon.log("job.claimed")) == 2, "b.txt is claimed")
        assert daemon.process
        daemon.process.kill()
        daemon.process.wait(10)
    daemon.drain()
    job = daemon.job("a")

    assert job["outcome"] == "failed"
    assert "daemon died 10 times" in job["images"][0]["error"]
    assert daemon.log("image.failed") == []


def _begun(daemon: Daemon) -> str:
    return "".join(path.read_text() for path in daemon.own.glob("active/*/0001.begun"))
