"""What an operator does to a running daemon: stop, reload, pause, cancel, retry, submit, look."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Daemon, alive, merged, until

MakeDaemon = Callable[..., Daemon]

SIDECAR: dict[str, Any] = {
    "schema": None, "outcome": None,
    "job": {"id", "name", "file", "image", "images", "attempt"},
    "image": {"file", "format", "width", "height", "bytes", "sha256"},
    "request": {"prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance_scale", "scheduler", "meta"},
    "prompt": {"text", "tokens", "truncated"},
    "model": {"id", "revision", "dtype", "quantization", "compiled"},
    "evaluations": None, "batch": None,
    "latency_ms": {"queued", "encode", "denoise", "decode", "transfer", "render", "save", "total"},
    "steps_ms": None,
    "window": {"images", "p50_ms", "p95_ms", "p99_ms", "images_per_second", "utilization_percent"},
    "device": {"name", "utilization_percent", "memory_allocated_mib", "memory_reserved_mib", "memory_peak_mib"},
    "time": {"claimed", "started", "published"},
    "host": None, "version": None,
}  # fmt: skip


def jsonl(*prompts: str) -> str:
    """A job of one image per prompt, as JSON lines."""
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


def until_claimed(daemon: Daemon, jobs: int) -> None:
    """Wait until so many jobs are the daemon's."""
    until(lambda: len(daemon.log("job.claimed")) >= jobs, f"{jobs} claims")


def free_port() -> int:
    """A TCP port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_image_in_hand(daemon: Daemon, number: int) -> None:
    """The rest is rendered by the next start, and nothing twice."""
    daemon.drop("a.jsonl", jsonl("!slow 0.2", "second", "third"))
    daemon.start()
    daemon.until_begun()
    status = daemon.stop(number)
    images_then = [s["job"]["image"] for s in daemon.sidecars("a")]
    daemon.drain()

    assert status == 0
    assert images_then == [1]
    assert daemon.job("a")["outcome"] == "done"
    assert sorted(image for _, image in daemon.published()) == [1, 2, 3]
    assert {s["job"]["attempt"] for s in daemon.sidecars("a")} == {1}
    assert daemon.unfinished() == []


def test_a_stop_abandons_an_image_that_takes_longer_than_stop_seconds(
    make_daemon: MakeDaemon,
) -> None:
    """It is put back, uncharged, with its seed."""
    daemon = make_daemon({"engine": {"stop_seconds": 0.3}})
    daemon.drop("a.txt", "!slow 0.5\n")
    daemon.start()
    daemon.until_begun()
    (home,) = (daemon.own / "active").iterdir()
    seed = json.loads((home / "request.json").read_bytes())["images"][0]["seed"]
    status = daemon.stop()
    before = daemon.published()
    daemon.drain()
    (sidecar,) = daemon.sidecars("a")

    assert status == 0
    assert before == []
    assert (sidecar["job"]["attempt"], sidecar["request"]["seed"]) == (1, seed)


def test_a_second_signal_stops_at_once(make_daemon: MakeDaemon) -> None:
    """Whatever stop_seconds says; exit 0, no engine left."""
    daemon = make_daemon({"engine": {"stop_seconds": 600}})
    daemon.drop("a.txt", "!slow 100\n")
    daemon.start()
    daemon.until_begun()
    assert daemon.process
    daemon.process.send_signal(signal.SIGTERM)
    daemon.until_log("daemon.stopping")
    still_running = daemon.process.poll() is None

    assert still_running
    assert daemon.stop() == 0
    assert not alive(daemon.engine_pid())
    assert len(daemon.unfinished()) == 1


def test_a_stop_while_loading_is_immediate(make_daemon: MakeDaemon) -> None:
    """There is no image in hand to wait for."""
    daemon = make_daemon({"model": {"revision": "!load-slow 100"}, "engine": {"stop_seconds": 600}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    until_claimed(daemon, 1)

    assert daemon.stop() == 0
    assert not alive(daemon.engine_pid())
    assert len(daemon.unfinished()) == 1


def test_a_second_daemon_exits_75(daemon: Daemon) -> None:
    """It names the first one, which goes on."""
    daemon.start().until_ready()
    assert daemon.process
    second = daemon.run("run")

    assert second.returncode == 75
    assert str(daemon.process.pid) in second.stderr
    daemon.drop("a.txt", "a cat\n")
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_second_daemon_exits_75_with_metrics_too(make_daemon: MakeDaemon) -> None:
    """The port that the first one listens on is no reason of its own: 78 would say the file is wrong."""
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{free_port()}"}})
    daemon.start().until_ready()
    second = daemon.run("run")

    assert second.returncode == 75, second.stderr
    assert daemon.stop() == 0


# --- reloading ----------------------------------------------------------------------------------


def test_sighup_applies_to_jobs_claimed_from_then_on(daemon: Daemon) -> None:
    """defaults, limits, watch apply; other changed keys are named; the engine stays warm."""
    daemon.start().until_ready()
    daemon.drop("a.txt", "a cat\n")
    daemon.job("a")
    daemon.write_config(
        {
            "defaults": {"width": 128, "steps": 2},
            "limits": {"images_per_job": 2},
            "watch": {"settle_seconds": 0.1},
            "model": {"revision": "other"},
            "metrics": {"window": 7},
            "inbox": {"recursive": False},
        }
    )
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    reloaded = daemon.until_log("config.reloaded")
    daemon.drop("b.txt", "a dog\n")
    daemon.drop("c.txt", "one\ntwo\nthree\n")
    daemon.job("b")
    refused = daemon.error("c.txt")
    (a,), (b,) = daemon.sidecars("a"), daemon.sidecars("b")

    assert sorted(reloaded["needs_restart"]) == [
        "inbox.recursive",
        "metrics.window",
        "model.revision",
    ]
    assert (a["request"]["width"], a["request"]["steps"]) == (64, 3)
    assert (b["request"]["width"], b["request"]["steps"]) == (128, 2)
    assert b["model"]["revision"] is None
    assert "images_per_job" in refused["error"]
    assert len(daemon.log("engine.starting")) == 1
    assert daemon.stop() == 0


def test_sighup_does_not_change_a_claimed_job(daemon: Daemon) -> None:
    """A job is resolved once, when it is claimed."""
    daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    until_claimed(daemon, 1)
    daemon.write_config({"defaults": {"width": 128}, "output": {"format": "jpeg"}})
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until_log("config.reloaded")
    daemon.run("resume")
    daemon.job("a")
    (sidecar,) = daemon.sidecars("a")

    assert (sidecar["image"]["width"], sidecar["image"]["file"]) == (64, "a-0001.png")
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    "wrong", ["defaults: {width: 63}\n", "nonsense: [\n", "modle: {id: gradient}\n", ""]
)
def test_a_wrong_file_changes_nothing(daemon: Daemon, wrong: str) -> None:
    """SIGHUP on it is logged, and the daemon goes on as before."""
    daemon.start().until_ready()
    daemon.config.write_text(wrong)
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    refused = daemon.until_log("config.refused")
    daemon.drop("a.txt", "a cat\n")

    assert str(daemon.config) in refused["error"]
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["image"]["width"] == 64
    assert daemon.stop() == 0


# --- pausing ------------------------------------------------------------------------------------


def test_pause_survives_a_restart(daemon: Daemon) -> None:
    """Claiming goes on, rendering does not, until `resume`."""
    paused = daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    daemon.start().until_ready()
    until_claimed(daemon, 1)
    daemon.until_status("paused", lambda s: s["state"] == "paused" and "resume" in s["reason"])
    assert daemon.stop() == 0
    daemon.start()
    daemon.until_log("engine.ready", times=2)
    status = daemon.until_status("paused", lambda s: s["state"] == "paused")
    shown = daemon.run("status")
    before = daemon.published()
    resumed = daemon.run("resume")

    assert (paused.returncode, resumed.returncode) == (0, 0)
    assert "promptdrop resume" in status["reason"]
    assert "paused" in shown.stdout
    assert before == []
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.run("resume").stdout == "was not paused\n"
    assert daemon.stop() == 0


def test_pause_holds_back_the_prefetched_image_too(daemon: Daemon) -> None:
    """The image in hand is finished; no new one begins, though the engine has it already."""
    daemon.drop("a.jsonl", jsonl("!slow 0.5", "!slow 0.3", "third"))
    daemon.start()
    daemon.until_begun()
    daemon.run("pause")
    daemon.until_log("daemon.paused")
    daemon.until_log("image.published", image=1)
    daemon.until_status("nothing in hand", lambda s: s["images_published"] and not s["current"])
    rendered = [image for _, image in daemon.published()]
    daemon.run("resume")

    assert rendered == [1]
    assert daemon.job("a")["outcome"] == "done"
    assert {s["job"]["attempt"] for s in daemon.sidecars("a")} == {1}
    assert daemon.stop() == 0


def test_pause_holds_from_the_first_moment_of_a_start(make_daemon: MakeDaemon) -> None:
    """Also when the disks come late: jobs left from before are not begun while paused."""
    daemon = make_daemon({"paths": {"outbox": "out"}})
    out = daemon.home / "out"
    out.mkdir()
    daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    until_claimed(daemon, 1)
    assert daemon.stop() == 0
    out.rename(daemon.home / "away")
    daemon.start()
    daemon.until_log("engine.ready", times=1)
    until(lambda: len(daemon.log("disk.trouble")) >= 1, "disk.trouble")
    daemon.until_status("the engine ready", lambda s: s["engine"]["state"] == "ready")
    (daemon.home / "away").rename(out)
    daemon.until_log("spool.recovered")
    daemon.until_status("paused", lambda s: s["state"] == "paused")
    current = daemon.status()["current"]
    stopped = daemon.stop()

    assert (current, daemon.published(), stopped) == (None, [], 0)


def test_a_drain_while_paused_exits_1(daemon: Daemon) -> None:
    """It says why it cannot finish, and the job stays."""
    daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain()

    assert done.returncode == 1
    assert "paused" in daemon.log("daemon.ending")[-1]["reason"]
    assert daemon.published() == []
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1


# --- cancelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["id", "SUB/FILE", "SUB/JOB"])
def test_a_pending_job_is_cancelled(daemon: Daemon, by: str) -> None:
    """By any of its names; job.json says cancelled, the file lies in failed/ with the reason."""
    daemon.run("pause")
    daemon.drop("sub/A cat.txt", "one\ntwo\n")
    daemon.start()
    claimed = daemon.until_log("job.claimed")
    names = {"id": claimed["job"], "SUB/FILE": "sub/A cat.txt", "SUB/JOB": "sub/A_cat"}
    command = daemon.run("cancel", names[by])
    job = daemon.job("sub/A_cat")
    record = daemon.error("sub/A cat.txt")

    assert command.returncode == 0, command.stderr
    assert job["outcome"] == "cancelled"
    assert [i["outcome"] for i in job["images"]] == ["cancelled", "cancelled"]
    assert (record["outcome"], record["id"], record["missing"]) == (
        "cancelled",
        claimed["job"],
        [1, 2],
    )
    assert (daemon.failed / "sub/A cat.txt").read_text() == "one\ntwo\n"
    assert daemon.stop() == 0


def test_an_active_job_is_stopped_at_its_next_step(daemon: Daemon) -> None:
    """What was published stays; the engine goes on with the next job."""
    daemon.drop("a.jsonl", jsonl("first", "!slow 1", "third"))
    daemon.start()
    daemon.until_begun(2)
    daemon.drop("b.txt", "a dog\n")
    daemon.run("cancel", "a.jsonl")
    job = daemon.job("a")

    assert job["outcome"] == "cancelled"
    assert [i["outcome"] for i in job["images"]] == ["rendered", "cancelled", "cancelled"]
    assert daemon.error("a.jsonl")["missing"] == [2, 3]
    assert daemon.job("b")["outcome"] == "done"
    assert len(daemon.log("engine.starting")) == 1
    assert daemon.stop() == 0


def test_a_cancelled_job_can_be_resumed(daemon: Daemon) -> None:
    """`retry` renders what the cancel left out."""
    daemon.run("pause")
    daemon.drop("a.txt", "one\ntwo\n")
    daemon.start()
    daemon.until_log("job.claimed")
    daemon.run("cancel", "a.txt")
    first = daemon.job("a")
    daemon.error("a.txt")
    until(lambda: not daemon.unfinished(), "the end of the job")
    daemon.run("resume")
    daemon.run("retry", "a.txt")
    until(lambda: daemon.job("a")["outcome"] == "done", "the job done")
    second = daemon.job("a")

    assert second["id"] == first["id"]
    assert [i["seed"] for i in second["images"]] == [i["seed"] for i in first["images"]]
    assert daemon.stop() == 0


def test_an_ambiguous_name_does_nothing(daemon: Daemon) -> None:
    """Exit 2, the jobs are listed, an id decides; an unknown name is exit 2 as well."""
    daemon.run("pause")
    daemon.start()
    daemon.drop("a.txt", "one\n")
    daemon.until_log("job.claimed", times=1)
    daemon.drop("a.txt", "two\n")
    second = daemon.until_log("job.claimed", times=2)
    ambiguous = daemon.run("cancel", "a.txt")
    unknown = daemon.run("cancel", "b.txt")
    by_id = daemon.run("cancel", second["job"])
    cancelled = daemon.job(second["folder"])

    assert (ambiguous.returncode, unknown.returncode, by_id.returncode) == (2, 2, 0)
    assert all(e["job"] in ambiguous.stderr for e in daemon.log("job.claimed"))
    assert (second["folder"], cancelled["outcome"]) == ("a~2", "cancelled")
    assert not (daemon.outbox / "a" / "job.json").exists()
    assert daemon.stop() == 0


def test_a_job_that_is_measured_can_be_cancelled(make_daemon: MakeDaemon) -> None:
    """A job whose prompts wait to be counted is withdrawn, and its count harms nobody."""
    daemon = make_daemon({"prompt": {"overflow": "refuse"}})
    daemon.drop("a.txt", "!slow 0.6\n")
    daemon.start()
    daemon.until_begun()
    daemon.drop("b.txt", "a dog\n")
    until_claimed(daemon, 2)
    daemon.run("cancel", "b.txt")

    assert daemon.job("b")["outcome"] == "cancelled"
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("b") == []
    assert daemon.stop() == 0


# --- retrying -----------------------------------------------------------------------------------


def test_retry_renders_what_is_missing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """Same id, folder and seeds; published images stay as they are; failed/ is clean in the end."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    content = jsonl("first", f"!once-raise {tmp_path}/flag a cat", "third")
    daemon.drop("sub/a.jsonl", content)
    daemon.start()
    first = daemon.job("sub/a")
    until(lambda: not daemon.unfinished(), "the end of the job")
    image = daemon.outbox / "sub/a/a-0001.png"
    before = image.stat()
    retried = daemon.run("retry", first["id"])
    until(lambda: daemon.job("sub/a")["outcome"] == "done", "the job done")
    second = daemon.job("sub/a")
    until(lambda: not daemon.unfinished(), "the end of the job")

    assert retried.returncode == 0
    assert (first["outcome"], second["id"]) == ("partial", first["id"])
    assert [i["seed"] for i in second["images"]] == [i["seed"] for i in first["images"]]
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert Counter(image for _, image in daemon.published()) == {1: 1, 2: 1, 3: 1}
    assert (daemon.outbox / "sub/a/request.jsonl").read_text() == content
    assert [p for p in daemon.failed.rglob("*") if p.is_file()] == []
    assert daemon.stop() == 0


def test_retry_of_a_refused_file_parses_it_afresh(daemon: Daemon) -> None:
    """A file that was corrected in failed/ becomes a job; its error goes."""
    daemon.start()
    daemon.drop("sub/a.yaml", "promt: a cat\n")
    record = daemon.error("sub/a.yaml")
    (daemon.failed / "sub/a.yaml").write_text("prompt: a cat\n")
    done = daemon.run("retry", "sub/a.yaml")
    job = daemon.job("sub/a")

    assert (record["outcome"], record["id"], done.returncode) == ("refused", None, 0)
    assert "prompt" in record["error"]
    assert job["outcome"] == "done"
    assert [p for p in daemon.failed.rglob("*") if p.is_file()] == []
    assert daemon.stop() == 0


def test_retry_all(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """Every file of failed/ is tried again, refused and failed ones alike."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.txt", f"!once-raise {tmp_path}/flag a cat\n")
    daemon.drop("b.yaml", "promt: a cat\n")
    daemon.start()
    daemon.error("a.txt")
    daemon.error("b.yaml")
    until(lambda: not daemon.unfinished(), "the end of both")
    (daemon.failed / "b.yaml").write_text("prompt: a cat\n")
    done = daemon.run("retry", "--all")
    until(lambda: daemon.job("a")["outcome"] == "done", "a done")

    assert done.returncode == 0
    assert daemon.job("b")["outcome"] == "done"
    assert "nothing" in daemon.run("retry", "--all").stdout
    assert daemon.run("retry").returncode == 2
    assert daemon.run("retry", "no-such").returncode == 2
    assert daemon.stop() == 0


def test_retry_without_a_daemon_is_done_by_the_next_one(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """The command says so, and waits in the control folder."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.txt", f"!once-raise {tmp_path}/flag a cat\n")
    daemon.drain()
    assert daemon.job("a")["outcome"] == "failed"
    said = daemon.run("retry", "a.txt")
    daemon.drain()

    assert "no daemon" in said.stderr
    assert daemon.job("a")["outcome"] == "done"


def test_a_retry_never_leaves_failed(daemon: Daemon) -> None:
    """Whoever may write to control/ cannot make the daemon move files from elsewhere."""
    secret = daemon.home / "secret.txt"
    secret.write_text("not yours\n")
    targets = [str(secret), f"../../../{secret.name}", "../inbox/a.txt"]
    daemon.start().until_ready()
    command = daemon.own / "control/.x"
    command.write_text(json.dumps({"command": "retry", "targets": targets}))
    command.rename(daemon.own / "control/retry-1.json")
    daemon.until_log("job.not_retried", times=3)

    assert secret.read_text() == "not yours\n"
    assert daemon.stop() == 0


# --- whose turn ---------------------------------------------------------------------------------


def rendered_in_order(daemon: Daemon) -> list[str]:
    """The jobs' folders, one for each image, in the order the images were begun."""
    sidecars = [
        json.loads(p.read_bytes()) for p in daemon.outbox.rglob("*-[0-9][0-9][0-9][0-9].json")
    ]
    return [s["job"]["name"] for s in sorted(sidecars, key=lambda s: s["time"]["started"])]


def render_paused_drops(daemon: Daemon, drops: list[tuple[str, str]]) -> list[str]:
    """Claim these files one after the other while paused, then render them all."""
    daemon.run("pause")
    daemon.start()
    for n, (name, content) in enumerate(drops, 1):
        daemon.drop(name, content)
        until_claimed(daemon, n)
    daemon.run("resume")
    until(lambda: len(daemon.log("job.done")) == len(drops), "all jobs done")
    assert daemon.stop() == 0
    return rendered_in_order(daemon)


IMAGE = "!slow 0.01\n"  # long enough for the order of beginnings to be told
FOLDERS = [("big/a.txt", IMAGE * 4), ("small/b.txt", IMAGE * 2), ("c.txt", IMAGE), ("d.txt", IMAGE)]


def test_fair_takes_turns_between_sub_folders(make_daemon: MakeDaemon) -> None:
    """One image in turn from each sub-folder with work, each job at the root being a lane."""
    order = render_paused_drops(make_daemon({"queue": {"policy": "fair"}}), FOLDERS)

    assert order == ["a", "b", "c", "d", "a", "b", "a", "a"]


def test_fifo_goes_by_arrival(make_daemon: MakeDaemon) -> None:
    """A job is finished before the next one begins."""
    order = render_paused_drops(make_daemon({"queue": {"policy": "fifo"}}), FOLDERS)

    assert order == ["a"] * 4 + ["b"] * 2 + ["c", "d"]


def test_priority_goes_first(daemon: Daemon) -> None:
    """Before any turn-taking, higher before lower."""
    two = 'prompts: ["!slow 0.01 a", "!slow 0.01 b"]\n'
    drops = [
        ("low.yaml", f"{two}priority: -5\n"),
        ("plain.yaml", two),
        ("high.yaml", f"{two}priority: 10\n"),
    ]

    assert render_paused_drops(daemon, drops) == ["high", "high", "plain", "plain", "low", "low"]


# --- submit and generate ------------------------------------------------------------------------


def test_submit_wait_exits_with_the_outcome(make_daemon: MakeDaemon) -> None:
    """0 for done; 1 for failed, partial and refused, with the reason. Each --prompt is a job."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.start().until_ready()
    done = daemon.run("submit", "--wait", "--prompt", "a cat", "--count", "2", "--seed", "7")
    failed = daemon.run("submit", "--wait", "--prompt", "!raise")
    refused = daemon.run("submit", "--wait", "--prompt", "a cat", "--width", "65")
    two = daemon.run("submit", "--wait", "--prompt", "a dog", "--prompt", "a fox")
    usage = daemon.run("submit", "--wait")

    assert two.returncode == 0
    assert two.stdout.count("done ") == 2
    assert (done.returncode, failed.returncode, refused.returncode) == (0, 1, 1)
    assert usage.returncode == 2
    assert "scripted by !raise" in failed.stdout
    assert "width" in refused.stdout
    (home,) = {p.parent for p in daemon.outbox.rglob("*-0002.png")}
    assert [s["request"]["seed"] for s in daemon.sidecars(home.name)] == [7, 8]
    assert daemon.stop() == 0


def test_submit_waits_for_a_daemon_to_come(daemon: Daemon, tmp_path: Path) -> None:
    """It says that none runs, and ends when one has rendered the job."""
    job = tmp_path / "cats.txt"
    job.write_text("a cat\n")
    with subprocess.Popen(
        daemon.command("submit", "--wait", "--folder", "sub", str(job)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=daemon.home,
    ) as waiting:
        assert waiting.stderr
        said = waiting.stderr.readline()
        daemon.start()
        out, _ = waiting.communicate(timeout=60)

    assert "no daemon" in said
    assert waiting.returncode == 0
    assert "done sub/cats.txt" in out
    assert daemon.job("sub/cats")["outcome"] == "done"
    assert job.exists()
    assert daemon.stop() == 0


def test_submit_wait_is_not_fooled_by_an_earlier_job(daemon: Daemon, tmp_path: Path) -> None:
    """Same file name, perhaps the same inode number again: what ended before is not the answer."""
    job = tmp_path / "a.txt"
    job.write_text("a cat\n")
    daemon.start().until_ready()
    first = daemon.run("submit", "--wait", str(job))
    request = daemon.outbox / "a/request.txt"
    link = daemon.home / "kept"
    os.link(request, link)  # the first job's inode, to be dropped again under its old name
    daemon.run("pause")
    daemon.until_log("daemon.paused")
    inode = link.stat().st_ino
    link.rename(daemon.inbox / "a.txt")
    program = (
        "import os, sys; from pathlib import Path; from promptdrop.cli import client; from promptdrop import clock; from promptdrop import config;"
        "from promptdrop.spool.spool import Spool;"
        "spool = Spool(config.load(Path(sys.argv[1])));"
        "dropped = client.Dropped('a.txt', int(sys.argv[2]), clock.timestamp());"
        "client.wait(spool, [dropped], lambda status, drops: os._exit(9))"
    )
    again = subprocess.run(
        [sys.executable, "-c", program, str(daemon.config), str(inode)],
        timeout=60,
        check=False,
    )

    assert first.returncode == 0
    assert again.returncode == 9  # it waits: the second job has not ended
    assert daemon.stop() == 0


def test_submit_wait_of_more_files_than_the_status_lists(daemon: Daemon, tmp_path: Path) -> None:
    """However many jobs end meanwhile, each one's outcome is known."""
    files = [tmp_path / f"job{n:03d}.yaml" for n in range(120)]
    for n, path in enumerate(files):
        path.write_text(
            f"prompt: a cat\npriority: {min(n, 100)}\n" if n else "prompt: a\npriority: -100\n"
        )
    daemon.write_config({"watch": {"settle_seconds": 0}, "defaults": {"steps": 1}})
    daemon.run("pause")
    daemon.start().until_ready()
    with subprocess.Popen(
        daemon.command("submit", "--wait", *map(str, files)), stdout=subprocess.PIPE, text=True
    ) as waiting:
        until_claimed(daemon, 120)
        daemon.run("resume")
        out, _ = waiting.communicate(timeout=60)

    assert waiting.returncode == 0, out[-500:]
    assert len([line for line in out.splitlines() if line.startswith("done ")]) == 120
    assert daemon.stop() == 0


def test_submit_takes_files_with_any_name(daemon: Daemon, tmp_path: Path) -> None:
    """A name that is not UTF-8 is submitted and shown escaped."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("a cat\n")
    done = subprocess.run(
        [*map(os.fsencode, daemon.command("submit")), path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=60,
        check=False,
    )
    checked = subprocess.run(
        [*map(os.fsencode, daemon.command("check")), path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr.decode()[-300:]
    assert rb"caf\xe9.txt" in done.stdout
    assert checked.returncode == 0, checked.stderr.decode()[-300:]
    assert os.listdir(os.fsencode(daemon.inbox)) == [b"caf\xe9.txt"]


def test_generate_goes_through_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """Where a daemon runs its engine renders the image, and a copy stands where it was asked for."""
    daemon.start().until_ready()
    one = daemon.run("generate", "a fox", "-o", str(tmp_path / "fox.jpg"), "--seed", "7")
    failed = daemon.run("generate", "a fox", "-o", str(tmp_path / "no.png"), "--width", "65")
    several = daemon.run("generate", "--prompts", "cat;dog", "--output", str(tmp_path / "pets"))

    assert (one.returncode, several.returncode) == (0, 0)
    assert (tmp_path / "fox.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    assert str(tmp_path / "fox.jpg") in one.stdout
    assert len(list((tmp_path / "pets").iterdir())) == 2
    assert failed.returncode == 2
    assert "width" in failed.stderr
    assert not (tmp_path / "no.png").exists()
    assert len(daemon.published()) == 3
    assert daemon.stop() == 0


def test_generate_with_an_engine_of_its_own(daemon: Daemon, tmp_path: Path) -> None:
    """--own-engine leaves daemon and spool alone; same seed, same picture."""
    daemon.start().until_ready()
    theirs, own = tmp_path / "theirs.png", tmp_path / "own.png"
    arguments = ("--seed", "7", "--size", "64x64")
    through = daemon.run("generate", "a fox", "-o", str(theirs), *arguments)
    alone = daemon.run("generate", "a fox", "-o", str(own), "--own-engine", *arguments)

    assert (through.returncode, alone.returncode) == (0, 0)
    assert theirs.read_bytes() == own.read_bytes()
    assert len(daemon.published()) == 1
    assert daemon.stop() == 0


def test_prompt_overflow_refuse(make_daemon: MakeDaemon) -> None:
    """A prompt too long refuses the whole file before its first image; no folder is left."""
    daemon = make_daemon({"prompt": {"overflow": "refuse", "max_tokens": 20}})
    daemon.drop("long.txt", "short\n" + "word " * 30 + "\n")
    daemon.drop("short.txt", "a cat\n")
    done = daemon.drain()
    record = daemon.error("long.txt")

    assert done.returncode == 0
    assert record["outcome"] == "refused"
    assert "image 2" in record["error"]
    assert "max_tokens" in record["error"]
    assert daemon.job("short")["outcome"] == "done"
    assert not (daemon.outbox / "long").exists()
    assert [file for file, _ in daemon.published()] == ["short/short-0001.png"]


# --- what it says -------------------------------------------------------------------------------


def test_status_json_is_what_the_schema_says(daemon: Daemon) -> None:
    """Every required key is there, none that is unknown; without a daemon: exit 1 and a sentence."""
    daemon.drop("a.jsonl", jsonl("first", "!slow 0.9"))
    daemon.start()
    daemon.until_status("image 2 in hand", lambda s: s["current"] and s["current"]["image"] == 2)
    shown = daemon.run("status", "--json")
    people = daemon.run("status")
    printed = subprocess.run(
        [sys.executable, "-m", "promptdrop", "schema", "status"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    schema = json.loads(printed.stdout)
    document = json.loads(shown.stdout)
    daemon.stop()
    alone = daemon.run("status")

    assert (shown.returncode, people.returncode) == (0, 0)
    assert set(schema["required"]) <= set(document) <= set(schema["properties"])
    assert document["schema"] == "promptdrop.status/1"
    assert document["current"]["file"] == "a.jsonl"
    for key in ("engine", "queue", "window"):
        name = schema["properties"][key]["$ref"].rpartition("/")[2]
        assert set(document[key]) == set(schema["$defs"][name]["properties"])
    assert "a.jsonl 2/2" in people.stdout
    assert alone.returncode == 1
    assert "no daemon" in alone.stderr


def test_sidecar_and_summary_have_the_contract_s_keys(daemon: Daemon) -> None:
    """Sections 2 and 4 of the contract, to the letter."""
    daemon.drop(
        "a.yaml", 'prompt: "a cat"\nmeta: {who: me, n: 3}\nnegative_prompt: dull\ncount: 2\n'
    )
    daemon.drain()
    job = daemon.job("a")
    first, second = daemon.sidecars("a")
    names = sorted(p.name for p in (daemon.outbox / "a").iterdir())

    for sidecar in (first, second):
        assert set(SIDECAR) <= set(sidecar)
        for key, keys in SIDECAR.items():
            assert keys is None or keys <= set(sidecar[key]), key
    assert names == [
        "a-0001.json", "a-0001.png", "a-0002.json", "a-0002.png", "job.json", "request.yaml",
    ]  # fmt: skip
    assert first["request"]["meta"] == {"who": "me", "n": 3}
    assert first["job"] == {
        "id": job["id"], "name": "a", "file": "a.yaml", "image": 1, "images": 2, "attempt": 1,
    }  # fmt: skip
    assert first["latency_ms"]["total"] >= first["latency_ms"]["render"]
    assert len(first["steps_ms"]) == first["evaluations"] == 3
    assert first["device"]["memory_peak_mib"] is None
    assert job["schema"] == "promptdrop.job/1"
    assert [i["file"] for i in job["images"]] == ["a-0001.png", "a-0002.png"]
    assert {"image", "file", "seed", "outcome", "error"} <= set(job["images"][0])


def test_drain_prints_a_row_for_each_image(make_daemon: MakeDaemon) -> None:
    """And a line for each job that did not end well."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.txt", "one\ntwo\n")
    daemon.drop("b.txt", "!raise\n")
    daemon.drop("c.yaml", "promt: x\n")
    done = daemon.drain()
    rows = done.stdout.splitlines()

    assert done.returncode == 0
    assert rows[0].split("\t") == ["image", "seed", "latency", "file"]
    assert [row.split("\t")[0] for row in rows[1:3]] == ["a.txt 1/2", "a.txt 2/2"]
    assert any(row.startswith("failed: b.txt: ") and "!raise" in row for row in rows)
    assert any(row.startswith("refused: c.yaml: ") and "promt" in row for row in rows)


def test_bench_times_the_configuration(daemon: Daemon) -> None:
    """What was rendered and how, the rate, and quantiles of each part; nothing goes to the spool."""
    done = daemon.run("bench", "--images", "5", "--size", "128x64")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    table = {name: figures for name, *figures in rows}

    assert done.returncode == 0, done.stderr
    assert (table["size"], table["images"], table["evaluations"]) == (["128x64"], ["5"], ["3"])
    assert float(table["images/s"][0]) > 0
    assert table["ms"] == ["p50", "p95", "p99"]
    for part in ("encode", "denoise", "one evaluation", "decode", "transfer", "render"):
        p50, p95, p99 = map(float, table[part])
        assert 0 <= p50 <= p95 <= p99
    assert daemon.tree() == []


@pytest.mark.parametrize(("images", "size"), [("0", "64x64"), ("1", "65x64"), ("1", "64")])
def test_bench_refuses_what_no_job_may_ask_for(daemon: Daemon, images: str, size: str) -> None:
    """Wrong usage, before anything is loaded."""
    done = daemon.run("bench", "--images", images, "--size", size)

    assert done.returncode == 2
    assert (images if images == "0" else size) in done.stderr


def test_metrics_are_served_as_prometheus_text(make_daemon: MakeDaemon) -> None:
    """`metrics.listen`: also while images are being rendered."""
    port = free_port()
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{port}"}})
    daemon.start().until_ready()
    daemon.drop("a.txt", "one\ntwo\nthree\n" * 20)

    def body() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.status == 200
            return str(answer.read().decode())

    while not daemon.log("job.done"):
        body()
    until(lambda: "promptdrop_images_published 60.0" in body(), "the last image in the metrics")
    last = body()

    assert "promptdrop_engine_ready 1.0" in last
    for figure in ("render_p50_seconds", "render_p95_seconds", "render_p99_seconds"):
        assert f"# TYPE promptdrop_{figure} gauge" in last
    assert "promptdrop_images_per_second " in last
    assert "promptdrop_window_images 50.0" in last
    assert daemon.stop() == 0


def test_a_port_that_is_taken_is_exit_78(make_daemon: MakeDaemon) -> None:
    """The key and the reason are named, and no engine is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{taken.getsockname()[1]}"}})
        done = daemon.run("run")

    assert done.returncode == 78
    assert "metrics.listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_names_what_is_wrong(make_daemon: MakeDaemon) -> None:
    """One line each, exit 1 if any is bad."""
    daemon = make_daemon()
    daemon.run("init", str(daemon.home))
    daemon.drain()
    (daemon.inbox / "link.txt").symlink_to("/etc/hostname")
    well = daemon.run("doctor")
    daemon.write_config(merged({}, {"limits": {"min_free_disk_mib": 10**9}}))
    ill = daemon.run("doctor")

    assert well.returncode == 0, well.stdout
    assert "link.txt" in well.stdout
    assert ill.returncode == 1
    assert "min_free_disk_mib" in ill.stdout
