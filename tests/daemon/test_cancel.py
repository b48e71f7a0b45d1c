"""`cancel`: a job that waits, one in hand, one that is measured; names that fit several."""

import json

import pytest

from harness import Daemon, MakeDaemon, jsonl, until


@pytest.mark.parametrize("by", ["id", "SUB/FILE", "SUB/JOB"])
def test_a_pending_job_is_cancelled(daemon: Daemon, by: str) -> None:
    """Any of its names will do; job.json says cancelled, and the file lies in failed/ with the reason."""
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
    """Its published images stay, and the engine goes on with the next job."""
    half_a_minute = json.dumps({"prompt": "!slow 0.3", "steps": 100}) + "\n"
    daemon.drop("a.jsonl", jsonl("first") + half_a_minute + jsonl("third"))
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
    """The exit status is 2 and the jobs are listed; an id is unambiguous. An unknown name is 2, too."""
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
    go = daemon.home / "go"
    daemon.drop("a.txt", f"!wait {go}\n")
    daemon.start()
    daemon.until_begun()
    daemon.drop("b.txt", "a dog\n")
    daemon.until_log("job.claimed", times=2)
    daemon.run("cancel", "b.txt")

    assert daemon.job("b")["outcome"] == "cancelled"
    go.touch()
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("b") == []
    assert daemon.stop() == 0
