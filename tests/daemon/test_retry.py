"""`retry` renders missing images and reads refused files again, with or without a daemon."""

import json
from collections import Counter
from pathlib import Path

from harness import Daemon, MakeDaemon, jsonl, until


def test_retry_renders_what_is_missing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """Id, folder and seeds stay the same, published images stay as they are, failed/ is clean in the end."""
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
    """Somebody who may write to control/ cannot make the daemon move files from elsewhere."""
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
