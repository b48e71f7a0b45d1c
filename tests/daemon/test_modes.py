"""What output.mode keeps from people it keeps everywhere; what is the daemon's own nobody else writes."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Daemon, until
from people import ALICE, BOB, DAEMON, GROUP, STRANGER, Person, open_home, promptdrop_as

CLOSED = {"output": {"mode": "0660", "directory_mode": "2770"}, "inbox": {"duplicates": "refuse"}}
SLOW = "--prompt '!slow 0.3 a cat' --steps 100\n"


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon, not started, whose folder every user can enter; it makes its spool itself."""
    with open_home() as home:
        made = Daemon(home, CLOSED)
        shutil.rmtree(made.root)
        os.chown(home, DAEMON.uid, GROUP)
        yield made
        if made.process and made.process.poll() is None:
            made.kill()


def found(person: Person, daemon: Daemon, *tests: str) -> set[str]:
    """What of the spool passes these tests of find(1) for this user, who enters what he can."""
    listed = person.sh(
        f"find {daemon.root} {' '.join(tests)} -printf '%P\\n'", Path("/"), check=False
    )
    return set(listed.stdout.splitlines())


def command(person: Person, daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of promptdrop on this spool as this user."""
    whole = [*promptdrop_as(person), *words, "--config", str(daemon.config)]
    return subprocess.run(whole, capture_output=True, text=True, check=False, cwd="/")


def is_of_no_use(name: str) -> bool:
    """Whether a file of the spool is the daemon's alone: notes on bytes, an empty mark, half a file, last words."""
    file = Path(name).name
    is_half = file.startswith(".promptdrop-")
    return name.startswith(".promptdrop/cache/") or file in ("cancelled", "last-words") or is_half


def of_every_fate(daemon: Daemon) -> None:
    """Make jobs that are done, refused, failed, retried, cancelled, being rendered and waiting."""
    ALICE.sh("mkdir -m 2770 sub", daemon.inbox)
    daemon.drop("sub/done.txt", "a cat\n")
    daemon.drop("refused.txt", "--wdith 3\n")
    daemon.drop("failed.txt", "!raise\n")
    daemon.drop("retried.txt", "!once-raise flag a dog\n")
    daemon.job("sub/done")
    for name in ("refused.txt", "failed.txt"):
        daemon.error(name)
    daemon.drop("cancelled.txt", SLOW)
    daemon.until_begun()
    command(BOB, daemon, "cancel", "cancelled.txt")
    daemon.error("cancelled.txt")
    retried = command(BOB, daemon, "retry", "failed.txt")
    assert retried.returncode == 0, retried.stderr
    daemon.until_log("job.retried")
    daemon.drop("slow.txt", SLOW)
    daemon.until_begun()
    daemon.drop("waiting.txt", "a bird\n")
    daemon.until_log("job.claimed", file="waiting.txt")


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_a_mode_keeps_out_whom_it_keeps_out_everywhere(daemon: Daemon, umask: str) -> None:
    """With 0660 and 2770 a stranger reads no file and lists no job's folder; the group reads what it should."""
    daemon.start(wrapper=promptdrop_as(DAEMON, umask)).until_ready()
    of_every_fate(daemon)
    files, folders = (found(STRANGER, daemon, "-type", kind, "-readable") for kind in "fd")
    known = found(BOB, daemon, "-type f -readable")
    status = command(BOB, daemon, "status", "--json")
    made = {str(p.relative_to(daemon.root)) for p in daemon.root.rglob("*") if p.is_file()}

    assert files == set()
    assert folders <= {"", "inbox", ".promptdrop", ".promptdrop/control"}
    assert json.loads(status.stdout)["schema"] == "promptdrop.status/1"
    assert {
        "outbox/sub/done/done-0001.png",
        "outbox/sub/done/job.json",
        "outbox/status.json",
    } <= known
    assert {"failed/cancelled.txt.error.json", ".promptdrop/status.json"} <= known
    assert [name for name in made - known if not is_of_no_use(name)] == []
    assert daemon.stop() == 0
    assert found(STRANGER, daemon, "-type f -readable") == set()


@pytest.mark.parametrize("umask", ["000", "022"])
def test_nobody_else_writes_below_the_state_folder(daemon: Daemon, umask: str) -> None:
    """Only control/ is for the group, also where an older installation left all of it to the group."""
    daemon.write_config({"output": {"mode": "0664", "directory_mode": "2775"}})
    daemon.start(wrapper=promptdrop_as(DAEMON, umask)).until_ready()
    assert daemon.stop() == 0
    for name in ("", "pending", "active", "parked", "finished", "cache"):
        (daemon.own / name).chmod(0o2775)
    daemon.start(wrapper=promptdrop_as(DAEMON, umask)).until_ready()
    of_every_fate(daemon)
    writable = found(BOB, daemon, "-path '*/.promptdrop*'", "-writable")

    assert {name.split("/")[1] for name in writable} == {"control"}
    assert {entry["folder"] for entry in daemon.log("spool.closed")} >= {str(daemon.own)}
    assert daemon.stop() == 0


def test_a_forged_job_is_left_alone_and_named(daemon: Daemon) -> None:
    """Somebody of the group made it while pending/ was open to all: nothing is moved for it, and all others go on."""
    secret = daemon.home / "secret.txt"
    secret.write_text("a secret\n")
    os.chown(secret, DAEMON.uid, GROUP)
    secret.chmod(0o600)
    daemon.start(wrapper=promptdrop_as(DAEMON)).until_ready()
    daemon.drop("a.txt", "!slow 0.3 a cat\n--prompt 'a dog' --steps 100\n")
    daemon.until_begun()
    daemon.kill()
    (active,) = (daemon.own / "active").iterdir()
    (daemon.own / "pending").chmod(0o2777)
    forged = daemon.own / "pending" / "20260101T000000000000-abcdef"
    BOB.sh(f"mkdir -p {forged}/drop", daemon.home)
    document = json.loads((active / "request.json").read_bytes())
    document |= {"id": forged.name, "file": f"../../../../../{secret.name}", "folder": "a"}
    BOB.sh(f"cat > {forged}/request.json <<'END'\n{json.dumps(document)}\nEND", daemon.home)
    daemon.start(wrapper=promptdrop_as(DAEMON)).until_ready()
    outcome = daemon.job("a")["outcome"]
    doctor = command(DAEMON, daemon, "doctor")

    assert outcome == "done"
    assert secret.read_text() == "a secret\n"
    assert (forged / "request.json").exists()
    assert [entry["folder"] for entry in daemon.log("spool.not_ours")] == [str(forged)]
    assert f"{forged} is not ours and is left alone: it belongs to uid {BOB.uid}" in doctor.stdout
    assert doctor.returncode == 1
    until(lambda: len(daemon.unfinished()) == 1, "the end of the other job")
    assert daemon.stop() == 0
