"""Root runs commands on a spool in which the group's people have laid traps."""

import json
import os
import shlex
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Daemon, until
from people import ALICE, DAEMON, STRANGER, give_to_group, open_home, promptdrop_as

READY = {"watch": {"ready_suffix": ".done"}}
SECRET = "only root may read this"
MEMORY = "--as=1500000000"  # bytes of address space; a whole look at 8 GiB does not fit


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of its own user, on a spool that its group may fill; not started."""
    promptdrop_as(DAEMON)  # skips without root
    with open_home() as home:
        daemon = Daemon(
            home,
            {"engine": {"max_attempts": 1}, "output": {"mode": "0660", "directory_mode": "2770"}},
        )
        give_to_group(daemon)
        yield daemon
        if daemon.process and daemon.process.poll() is None:
            daemon.kill()


@pytest.fixture
def secret(shared: Daemon) -> Path:
    """A file of root's."""
    path = shared.home / "secret.png"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def alice(daemon: Daemon, script: str) -> None:
    """Run a shell script as ALICE in the spool's root."""
    ALICE.sh(script, daemon.root)


@pytest.mark.parametrize("trap", ["absolute", "link", "folder"])
def test_generate_delivers_no_file_of_roots(shared: Daemon, secret: Path, trap: str) -> None:
    """Someone of the group replaces a sidecar, an image or the job's folder while root waits: what is
    not the job's own is said to be missing, the rest is delivered."""
    shared.start(wrapper=promptdrop_as(DAEMON)).until_ready()
    words = shared.command("generate", "--prompts", "a;!slow 2 b", "--output", "out")
    waiting = subprocess.Popen(
        words, cwd=shared.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    (first,) = until(lambda: list(shared.outbox.rglob("*-0001.json")), "the first image")
    document, home, picture = (
        json.loads(first.read_bytes()),
        shlex.quote(str(first.parent)),
        first.with_suffix(".png"),
    )
    if trap == "absolute":
        document["image"]["file"] = str(secret)
        forged = shlex.quote(json.dumps(document))
        alice(shared, f"rm -f {first}; printf %s {forged} > {first}")
    elif trap == "link":
        alice(shared, f"mv {picture} {picture}.old; ln -s {secret} {picture}")
    else:
        shared.until_log("job.claimed")
        until(
            lambda: list(shared.outbox.rglob("job.json")) or waiting.poll() is not None,
            "the end of the job",
        )
        alice(shared, f"mv {home} {home}.old; ln -s {home}.old {home}")
    out, said = waiting.communicate(timeout=60)
    made = sorted((shared.home / "out").iterdir())

    assert SECRET.encode() not in b"".join(path.read_bytes() for path in made)
    assert "Traceback" not in said
    if trap != "folder":  # that trap may come too late
        assert waiting.returncode == 1
        assert "1 of 2 images are not in" in said
        assert len(made) == len(out.splitlines()) == 1
    assert shared.stop() == 0


def test_submit_makes_nothing_behind_a_link(shared: Daemon, tmp_path: Path) -> None:
    """Neither the marker of a file nor a sub-folder of the inbox is a way out of it."""
    shared.write_config(READY)
    behind = tmp_path / "behind"
    behind.mkdir()
    alice(shared, f"ln -s {behind}/made inbox/cat.txt.done; ln -s {behind} inbox/night")
    job = tmp_path / "cat.txt"
    job.write_text("a cat\n")
    through = shared.run("submit", "--folder", "night", str(job))
    beside = shared.run("submit", str(job))

    assert (through.returncode, beside.returncode) == (2, 0)
    assert "inbox/night: a link, or no folder" in through.stderr
    assert beside.stdout == "submitted cat~2.txt\n"
    assert list(behind.iterdir()) == []
    assert sorted(os.listdir(shared.inbox)) == [
        "cat.txt.done",
        "cat~2.txt",
        "cat~2.txt.done",
        "night",
    ]


def test_retry_reads_no_record_that_is_not_ours(shared: Daemon) -> None:
    """Records of 8 GiB, of the wrong kind, closed ones, links and pipes neither end nor slow a command."""
    traps = """
        for name in huge wrong closed link pipe folder good; do echo a cat > $name.txt; done
        truncate -s 8G huge.txt.error.json
        echo '{"schema": "promptdrop.error/1", "id": []}' > wrong.txt.error.json
        echo '{"schema": "promptdrop.error/1", "id": "/etc"}' > closed.txt.error.json; chmod 0 closed.txt.error.json
        ln -s /dev/zero link.txt.error.json; mkfifo pipe.txt.error.json; mkdir folder.txt.error.json
        echo '{"schema": "promptdrop.error/1", "error": "no luck"}' > good.txt.error.json
        ln -s /etc/passwd passwd; echo '{}' > passwd.error.json; ln -s /etc etc; mkdir sub; ln -s sub/sub sub/loop
    """
    ALICE.sh(traps, shared.failed)
    prefix = ["prlimit", MEMORY]
    nothing, huge, everything = (
        subprocess.run(
            [*prefix, *shared.command("retry", *words)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for words in (["anything"], ["huge.txt"], ["--all"])
    )

    assert (nothing.returncode, huge.returncode, everything.returncode) == (2, 0, 0), (
        everything.stderr
    )
    assert (
        nothing.stderr == "promptdrop: anything: no such job in failed/; see: promptdrop status\n"
    )
    assert huge.stdout == "retrying unknown  huge.txt: its reason cannot be read\n"
    assert "retrying refused  good.txt: no luck\n" in everything.stdout
    assert everything.stdout.count("its reason cannot be read") == 6
    assert "passwd" not in everything.stdout


def test_a_job_file_is_read_up_to_its_limit(shared: Daemon, tmp_path: Path) -> None:
    """A file of 100 GiB, or a link to a device without end, is refused by name; nothing is dropped."""
    huge, endless = tmp_path / "huge.txt", tmp_path / "endless.txt"
    huge.touch()
    os.truncate(huge, 100 << 30)
    endless.symlink_to("/dev/zero")
    for file in (huge, endless):
        done = subprocess.run(
            ["prlimit", MEMORY, *shared.command("submit", str(file))],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert done.returncode == 2
        assert done.stderr == f"promptdrop: {file}: larger than limits.job_file_kib: 1024 KiB\n"
    assert os.listdir(shared.inbox) == []


def test_a_drop_is_as_private_as_its_images(shared: Daemon) -> None:
    """With output.mode 0660 a stranger reads neither the file that a command drops nor its marker; the
    daemon, another user than the dropper, renders it."""
    shared.write_config(READY)
    command = [
        *promptdrop_as(ALICE),
        "submit",
        "--prompt",
        "a secret",
        "--folder",
        "s",
        "--config",
        str(shared.config),
    ]
    submitted = subprocess.run(command, capture_output=True, text=True, check=True)
    file = shared.inbox / submitted.stdout.split()[1]
    looked = STRANGER.sh(f"cat {file}; ls {file.parent}", shared.home, check=False)
    modes = [
        stat.S_IMODE(path.stat().st_mode)
        for path in (file, file.with_name(f"{file.name}.done"), file.parent)
    ]
    shared.start(wrapper=promptdrop_as(DAEMON))

    assert modes == [0o660, 0o660, 0o2770]
    assert looked.stdout == ""
    assert shared.job(f"s/{file.stem}")["outcome"] == "done"
    assert shared.stop() == 0
