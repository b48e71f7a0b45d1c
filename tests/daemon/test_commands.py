"""Commands of the spool's group: whatever somebody leaves in control/ or takes out of failed/ holds nobody up."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import disks
from disks import Faulty
from harness import Daemon, until, works
from people import ALICE, BOB, DAEMON, give_to_group, open_home, promptdrop_as
from promptdrop.spool import control

Make = Callable[..., Daemon]


@pytest.fixture
def shared() -> Iterator[Daemon]:
    """A daemon that runs as its own user on a spool of its group."""
    command = promptdrop_as(DAEMON)
    with open_home() as home:
        daemon = Daemon(home)
        give_to_group(daemon)
        daemon.start(wrapper=command).until_ready()
        yield daemon
        daemon.kill()


def leave(folder: Path, name: str, command: Any) -> None:
    """Put a command into the control folder in one step."""
    new = folder / f".{name}"
    new.write_text(json.dumps(command))
    new.rename(folder / f"{name}.json")


def parked(daemon: Daemon) -> list[str]:
    """The ids of parked jobs."""
    return os.listdir(daemon.own / "parked")


def fail(daemon: Daemon, *paths: str) -> None:
    """Drop files that fail, and wait until they are parked."""
    before = len(parked(daemon))
    for path in paths:
        daemon.drop(path, "!raise\n")
    until(lambda: len(parked(daemon)) == before + len(paths), "parked jobs")
    for path in paths:
        daemon.error(path)


def test_what_bob_leaves_in_control_is_answered(shared: Daemon) -> None:
    """Fifty thousand names, 8 GiB of nothing, links, pipes and files that only he can read are named in
    the log, with what was expected, and removed; a folder is named once. Alice is served meanwhile."""
    names = json.dumps({"command": "retry", "targets": [f"{n}.txt" for n in range(50_000)]})
    (shared.home / "many").write_text(names)
    BOB.sh(
        "for n in $(seq 20); do cp ../../../many .m; mv .m many$n.json; done;"
        " truncate -s 8G .s; mv .s sparse.json; ln -s /etc/passwd link.json; mkfifo pipe.json;"
        " mkdir folder.json; touch mine.json; chmod 600 mine.json; echo '{\"id\": []}' > .x; mv .x odd.json",
        shared.own / "control",
    )
    (shared.home / "a").write_text("a cat\n")
    ALICE.sh("cp ../../a .a; mv .a a.txt", shared.inbox)
    job = shared.job("a")
    shared.until_log("command.refused", times=26)
    works(shared)

    assert job["outcome"] == "done"
    assert os.listdir(shared.own / "control") == ["folder.json"]
    refused = {line["file"]: line for line in shared.log("command.refused")}
    assert len(refused) == len(shared.log("command.refused")) == 26
    assert refused["many7.json"]["command"] == "retry"
    assert refused["many7.json"]["reason"].startswith("50000 targets; expected a file of at most")
    assert "Permission denied" in refused["mine.json"]["reason"]
    assert shared.stop() == 0


def test_a_reason_that_bob_has_written_is_not_read(shared: Daemon) -> None:
    """A sparse 8 GiB a.txt.error.json, or a folder of that name, costs no memory at a retry or a start."""
    fail(shared, "a.txt", "b.txt")
    BOB.sh(
        "for f in a b; do rm -f $f.txt.error.json; done; truncate -s 8G a.txt.error.json;"
        " mkdir b.txt.error.json",
        shared.failed,
    )
    (shared.home / "retry.json").write_text('{"command": "retry", "targets": ["a.txt", "b.txt"]}')
    BOB.sh("cp ../../../retry.json .r; mv .r r.json", shared.own / "control")
    shared.until_log("job.retried", times=2)
    shared.until_log("job.failed", times=4)

    assert len(parked(shared)) == 2
    assert shared.stop() == 0
    shared.start(wrapper=promptdrop_as(DAEMON)).until_ready()
    works(shared)
    assert shared.stop() == 0


def test_links_of_bob_lead_a_retry_nowhere(shared: Daemon) -> None:
    """A link in the place of the file, its folder, its marker or the folder in the inbox is not followed."""
    shared.write_config({"watch": {"ready_suffix": ".done"}})
    assert shared.process
    shared.process.send_signal(signal.SIGHUP)
    shared.until_log("config.reloaded")
    aim = shared.home / "aim"
    aim.mkdir(mode=0o777)
    aim.chmod(0o777)
    for folder in ("in", "gone"):
        (shared.inbox / folder).mkdir()
        (shared.inbox / folder).chmod(0o777)
    for path in ("a.txt", "in/b.txt", "gone/c.txt"):
        shared.drop(path, "")
        (shared.inbox / f"{path}.done").touch()
        shared.error(path)
    (shared.home / "retry.json").write_text(
        '{"command": "retry", "targets": ["a.txt", "in/b.txt", "gone/c.txt"]}'
    )
    BOB.sh(f"ln -s {aim}/marker a.txt.done; rm -rf in; ln -s {aim} in", shared.inbox)
    BOB.sh(f"rm -rf gone; ln -s {aim} gone; touch {aim}/c.txt", shared.failed)
    BOB.sh("cp ../../../retry.json .r; mv .r r.json", shared.own / "control")
    shared.until_log("job.not_retried", times=2)
    until(lambda: not list((shared.own / "control").glob("*.json")), "the end of the command")

    assert os.listdir(aim) == ["c.txt"]
    assert (shared.inbox / "a.txt").exists()
    assert sorted(line["reason"].split(":")[0] for line in shared.log("job.not_retried")) == [
        "cannot retry gone/c.txt",
        "cannot retry in/b.txt",
    ]
    assert shared.stop() == 0


def test_a_sick_folder_in_failed_holds_its_own_targets_only(sick: Daemon, disk: Faulty) -> None:
    """The other targets of the command and other commands are done; the sick one follows its cure."""
    sick.start().until_ready()
    fail(sick, "alice/a.txt", "b.txt", "c.txt")
    disk.fail("getattr", match="/failed/alice")
    control.send(sick.own / "control", control.Retry(("alice/a.txt", "b.txt")))
    sick.until_log("job.retried", file="b.txt")
    control.send(sick.own / "control", control.Retry(("c.txt",)))
    sick.until_log("job.retried", file="c.txt")
    early = [line["file"] for line in sick.log("job.retried")]
    left = list((disk.behind / "spool/.promptdrop/control").glob("*.json"))
    disk.heal()
    sick.until_log("job.retried", file="alice/a.txt")
    until(lambda: not list((sick.own / "control").glob("*.json")), "the end of the command")

    assert early == ["b.txt", "c.txt"]
    assert len(left) == 1
    assert len(sick.log("job.retried")) == 3
    assert sick.stop() == 0


def test_a_sick_command_holds_no_look_up(sick: Daemon, disk: Faulty) -> None:
    """While the disk does not give one command, files are taken and other commands obeyed."""
    sick.start().until_ready()
    disk.fail("open", match="/control/retry-sick")
    leave(
        disk.behind / "spool/.promptdrop/control",
        "retry-sick",
        {"command": "retry", "targets": ["x"]},
    )
    sick.until_log("disk.trouble")
    works(sick)
    control.send(sick.own / "control", control.Retry(("nothing.txt",)))
    sick.until_log("job.not_retried")
    disk.heal()
    sick.until_log("job.not_retried", times=2)

    assert len(sick.log("disk.trouble")) == 1
    assert sick.stop() == 0


@pytest.mark.parametrize("moment", ["running", "killed"])
def test_a_job_whose_file_was_taken_out_of_failed_is_forgotten(daemon: Daemon, moment: str) -> None:
    """`rm -r failed/*`: nothing of the jobs is kept, and a retry says that there is nothing."""
    daemon.start().until_ready()
    fail(daemon, "a.txt", "sub/b.txt", "sub/c.txt", "kept.txt")
    if moment == "killed":
        daemon.kill()
    shutil.rmtree(daemon.failed / "sub")
    (daemon.failed / "a.txt").unlink()
    if moment == "killed":
        daemon.start().until_ready()
    until(lambda: len(parked(daemon)) == 1, "the end of three parked jobs")
    leave(daemon.own / "control", "r", {"command": "retry", "targets": ["a.txt", "sub/b.txt"]})
    daemon.until_log("job.not_retried", times=2)
    (daemon.failed / "kept.txt").unlink()
    until(lambda: not parked(daemon), "the end of the last one")
    said = daemon.run("retry", "--all")

    assert "nothing has failed" in said.stdout
    assert not os.listdir(daemon.own / "finished")
    assert daemon.stop() == 0


def test_a_file_that_is_away_for_a_moment_keeps_its_job(daemon: Daemon) -> None:
    """An editor takes a file away and puts another there; a retry goes on with the job."""
    daemon.start().until_ready()
    fail(daemon, "a.txt", "b.txt")
    file = daemon.failed / "a.txt"
    file.rename(daemon.failed / "a.txt~")
    file.write_text("!raise\n")
    (daemon.failed / "b.txt").unlink()
    until(lambda: len(parked(daemon)) == 1, "the end of the other job")
    assert daemon.run("retry", "a.txt").returncode == 0
    daemon.until_log("job.retried")

    assert daemon.stop() == 0


@pytest.mark.parametrize("moment", ["running", "starting"])
def test_an_unmounted_failed_keeps_its_jobs(make_daemon: Make, tmp_path: Path, moment: str) -> None:
    """An empty mount point does not say that the files were taken away."""
    home = tmp_path / "disk"
    home.mkdir()
    with disks.faulty(home) as disk:
        daemon = make_daemon({"paths": {"failed": str(disk.path)}})
        daemon.failed = disk.path
        daemon.start().until_ready()
        fail(daemon, "a.txt", "b.txt")
        if moment == "starting":
            assert daemon.stop() == 0
        disk.unmount()
        if moment == "starting":
            daemon.start()
        daemon.until_status("not mounted", lambda s: "not mounted" in str(s["reason"]))
        disk.mount()
        (disk.path / "b.txt").unlink()
        until(lambda: len(parked(daemon)) == 1, "the end of the job that was taken away")
        control.send(daemon.own / "control", control.Retry(("a.txt",)))
        daemon.until_log("job.retried")

        assert daemon.stop() == 0
