"""The commands of README.md and docs/systemd.md install, upgrade and remove a service."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guide import ONLY_THERE, block, offline
from harness import REPOSITORY, until
from machine import CHECKOUT, Machine, booted

INSTALLER = REPOSITORY / "systemd/install.sh"
SPOOL = "/srv/promptdrop/spool"
# Once all is unmounted only the test's own folders are left; before that nothing may be removed.
LEAVE_THIS_SYSTEM = f"""{ONLY_THERE}
binds() {{ findmnt -rno TARGET | grep -E '^/(opt|srv|usr)/' | sort -r; }}
binds | xargs -r -n 1 umount --lazy
[ -z "$(binds)" ]
"""


@pytest.fixture
def fresh(tmp_path: Path, model: Path) -> Iterator[Machine]:
    """A machine of this test's own, with nothing installed."""
    with booted(tmp_path / "fresh", model) as machine:
        yield machine


def test_the_help_fits_a_terminal() -> None:
    """--help is 80 columns wide at most; an option that there is not is wrong usage."""
    asked = subprocess.run([INSTALLER, "--help"], capture_output=True, text=True, check=False)
    wrong = subprocess.run([INSTALLER, "--now"], capture_output=True, text=True, check=False)

    assert asked.returncode == 0
    assert max(len(line) for line in asked.stdout.splitlines()) <= 80
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "unknown option: --now" in wrong.stderr


def test_the_installer_is_a_dry_run_by_default(machine: Machine) -> None:
    """It prints every command, in lines of a terminal, and changes nothing."""
    look = "find /etc/systemd /etc/promptdrop /srv/promptdrop /opt/promptdrop/docs | sort | md5sum"
    before = machine.shell(look)
    done = machine.run(f"{CHECKOUT}/systemd/install.sh")

    assert "systemctl daemon-reload" in done.stdout
    assert "nothing was done" in done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert machine.shell(look) == before


def test_what_is_printed_can_be_pasted(fresh: Machine) -> None:
    """The lines of the dry run, run by a shell, install what --run installs."""
    printed = fresh.run(f"{CHECKOUT}/systemd/install.sh").stdout
    fresh.shell(printed)
    fresh.run("systemctl", "start", "promptdrop")

    assert fresh.show("promptdrop", "ActiveState") == "active"


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("/home/me/model", "in a home, which the service cannot see"),
        ("/srv/models/none", "model fetch"),
    ],
)
def test_a_model_that_would_not_work_is_refused_first(
    fresh: Machine, named: str, reason: str
) -> None:
    """It is refused before anything is done, and the cure is named."""
    done = fresh.run(f"{CHECKOUT}/systemd/install.sh", "--run", named, check=False)

    assert done.returncode == 1
    assert reason in done.stderr
    assert fresh.run("id", "promptdrop", check=False).returncode != 0


def drop_a_fox(machine: Machine) -> str:
    """A member of the group drops a job; returns its job.json."""
    machine.shell(
        "cd /tmp && setpriv --reuid me --regid me --init-groups sh -c 'umask 022;"
        ' echo "--prompt \\"a red fox\\" --size 128x128 --steps 2" > fox.txt;'
        f" cp fox.txt {SPOOL}/inbox/'"
    )
    read = f"cat {SPOOL}/outbox/fox/job.json 2>/dev/null || true"
    text: str = until(lambda: machine.shell(read), "the job's end")
    return text


def test_a_life_as_the_documents_print_it(fresh: Machine) -> None:
    """Install, drop, upgrade, add a second service, uninstall: users' files stay until they are named."""
    machine = fresh
    machine.shell("id me >/dev/null 2>&1 || useradd --create-home me")
    checkout = f"export USER=me; cd {CHECKOUT}\n"
    said = machine.shell(checkout + offline(block("README.md", "systemd")))
    job = drop_a_fox(machine)
    status = machine.run("systemctl", "status", "--no-pager", "promptdrop", check=False).stdout
    owners = machine.shell(f"cd {SPOOL}/outbox && stat -c '%U %G %a' fox fox/fox-0001.png")
    command = machine.shell("cd / && /usr/local/bin/promptdrop status")

    assert "active (running)" in said
    assert json.loads(job)["outcome"] == "done"
    assert 'Status: "ready' in status
    assert owners.splitlines() == ["promptdrop promptdrop 2775", "promptdrop promptdrop 664"]
    assert "ready" in command

    before = machine.show("promptdrop", "MainPID")
    machine.shell(checkout + offline(block("docs/systemd.md", "upgrade")))
    second = block("docs/systemd.md", "second").replace("cuda:1", "cpu")
    machine.shell(second)

    assert machine.show("promptdrop", "ActiveState") == "active"
    assert machine.show("promptdrop", "MainPID") != before
    assert machine.show("promptdrop@b", "ActiveState") == "active"
    for page in machine.shell("grep -h ^Documentation= /etc/systemd/system/*.service").split():
        machine.run("test", "-f", page.removeprefix("Documentation=").removeprefix("file://"))

    machine.shell("systemctl disable --now promptdrop@b")
    machine.shell("set -x\n" + LEAVE_THIS_SYSTEM + block("docs/systemd.md", "uninstall"))
    left = machine.shell("find /opt /etc /usr/local -path '*promptdrop*' 2>/dev/null || true")

    assert left == ""
    assert machine.shell(f"ls {SPOOL}/outbox/fox/fox-0001.png /srv/models")
    assert machine.show("promptdrop", "LoadState") == "not-found"

    machine.shell(LEAVE_THIS_SYSTEM + block("docs/systemd.md", "uninstall-data"))

    assert machine.shell("ls /srv") == "models\n"
    assert machine.run("id", "promptdrop", check=False).returncode != 0
