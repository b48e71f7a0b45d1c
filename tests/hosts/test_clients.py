"""Real clients against the running daemon: nothing half-taken, nothing twice, nothing missed.

Each test uses a sub-folder of its own in the inbox of one daemon, and ends with a count.
"""

import http.client
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import servers
from harness import Daemon, until

SETTLE_SECONDS = 1.0
IMAGES = 12  # a line each: half a file would be fewer
TEXT = "".join(f"a red fox, number {n}\n" for n in range(IMAGES))
JSON = json.dumps({"prompts": TEXT.splitlines()})
BIG = json.dumps({"prompts": ["a red fox " * 1900] * 50})  # 950 kB; cut anywhere, it does not parse
JUNK = ("Thumbs.db", ".DS_Store", "~$cat.txt", "cat.txt~", "photo.png", ".cat.txt.swp", "4913")
SETTINGS = {
    "watch": {"settle_seconds": SETTLE_SECONDS, "rescan_seconds": 0.5, "give_up_seconds": 1.5},
    "defaults": {"width": 64, "height": 64, "steps": 1},
}
MakeDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the clients of this file, and for nobody else; all is counted again at its end."""
    daemon = Daemon(tmp_path_factory.mktemp("clients"), SETTINGS).start().until_ready()
    yield daemon
    stopped = daemon.stop()
    claimed = [event["file"] for event in daemon.log("job.claimed")]
    refused = [event["file"] for event in daemon.log("job.refused")]

    assert stopped == 0
    assert len({*claimed, *refused}) == len(claimed) + len(refused)
    assert len(daemon.log("job.done")) == len(claimed)
    assert daemon.unfinished() == []


@pytest.fixture
def inbox(running: Daemon, request: pytest.FixtureRequest) -> Path:
    """A sub-folder of the inbox for one test."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:70].strip("-")
    folder = running.inbox / name
    folder.mkdir()
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three job files and what programs leave beside them."""
    folder = tmp_path / "source"
    (folder / "deeper").mkdir(parents=True)
    (folder / "one.txt").write_text(TEXT)
    (folder / "two words.json").write_text(JSON)
    (folder / "deeper" / "drei ü.txt").write_text(TEXT)
    for name in JUNK:
        (folder / name).write_text("x")
    return folder


ALL = {"one": IMAGES, "two_words": IMAGES, "deeper/drei_ü": IMAGES}


def count(daemon: Daemon, inbox: Path, jobs: dict[str, int], refused: int = 0) -> None:
    """These jobs with so many images each, all done, each claimed once; nothing else was."""
    sub = inbox.name
    for name, images in jobs.items():
        summary = daemon.job(f"{sub}/{name}")
        assert (summary["outcome"], summary["totals"]["images"]) == ("done", images), name
    failed = daemon.failed / sub
    until(lambda: len(list(failed.rglob("*.error.json"))) >= refused, f"{refused} refusals")
    until(lambda: not _job_files(inbox), "an inbox without jobs")
    claims = [e for e in daemon.log("job.claimed") if e["file"].startswith(f"{sub}/")]
    summaries = list((daemon.outbox / sub).rglob("job.json"))

    assert len(list(failed.rglob("*.error.json"))) == refused
    assert (len(claims), len(summaries)) == (len(jobs), len(jobs))


def _job_files(inbox: Path) -> list[Path]:
    return [
        p for p in inbox.rglob("*")
        if p.suffix in (".txt", ".json", ".yaml") and p.name not in JUNK and p.name[0] != "."
    ]  # fmt: skip


def reason(daemon: Daemon, inbox: Path, file: str) -> str:
    """Why a file was refused."""
    return str(daemon.error(f"{inbox.name}/{file}")["error"])


# --- programs of the same machine ---------------------------------------------------------------

LOCAL = {
    "cp": "cp -r . $INBOX/",
    "cp -p": "touch -d 1999-01-01 one.txt && cp -rp . $INBOX/",
    "mv": "mv * .[!.]* $INBOX/",
    "ln": "cp -r deeper $INBOX/ && ln one.txt 'two words.json' Thumbs.db $INBOX/",
    "tar": "tar cf ../a.tar . && tar xf ../a.tar -C $INBOX",
    "unzip": "zip -qr ../a.zip . && unzip -q ../a.zip -d $INBOX",
    "rsync": "rsync -a . $INBOX/",
    "rsync --inplace": "rsync -a --inplace . $INBOX/",
    "rsync --partial": "rsync -a --partial --bwlimit=20 . $INBOX/",
}


@pytest.mark.parametrize("command", LOCAL.values(), ids=LOCAL.keys())
def test_local_programs(running: Daemon, inbox: Path, source: Path, command: str) -> None:
    """Old times, hidden temporaries, folders that are filled as they appear; junk stays where it is."""
    servers.need(*{"rsync", "zip", "unzip", "tar"} & set(command.split()))
    subprocess.run(["sh", "-ec", command], cwd=source, env={**os.environ, "INBOX": str(inbox)}, check=True)  # fmt: skip

    count(running, inbox, ALL)
    left = {path.name for path in inbox.rglob("*") if path.is_file()}
    assert left == (set(JUNK) & {"Thumbs.db"} if command.startswith("cp -r deeper") else set(JUNK))


def test_vim(running: Daemon, inbox: Path) -> None:
    """Its swap and backup files are nobody's jobs; the file is taken as it was written."""
    servers.need("vim.tiny")
    vim = ["vim.tiny", "-u", "NONE", "-es", "-n", "-c", "set backup writebackup"]
    change = ["-c", "normal ggOfirst", "-c", "w", "-c", "normal Glast", "-c", "normal olast", "-c", "wq!"]  # fmt: skip
    (inbox / "a.txt").write_text(TEXT)
    subprocess.run([*vim, *change, inbox / "a.txt"], check=True)

    count(running, inbox, {"a": IMAGES + 2})
    assert {path.name for path in inbox.iterdir()} <= {"a.txt~"}


def test_an_appender_that_pauses_less_than_settle_seconds(running: Daemon, inbox: Path) -> None:
    """`>>` closes after every line; the file is taken once, with all of them."""
    line = 'for n in $(seq 12); do echo "line $n" >> "$0"; sleep 0.2; done'
    subprocess.run(["sh", "-c", line, inbox / "a.txt"], check=True)

    count(running, inbox, {"a": 12})


def test_a_slow_writer(running: Daemon, inbox: Path) -> None:
    """Silent for longer than settle_seconds, but open: not taken before it is closed."""
    command = 'exec > "$0"; echo one; sleep 2.5; echo two'
    subprocess.run(["sh", "-c", command, inbox / "a.txt"], check=True)

    count(running, inbox, {"a": 2})


@pytest.mark.parametrize("option", ["--partial", "--inplace", "--archive"])
def test_rsync_killed(running: Daemon, inbox: Path, tmp_path: Path, option: str) -> None:
    """What arrived is left under the final name and refused; without these options nothing is."""
    servers.need("rsync")
    big = tmp_path / "big.json"
    big.write_text(BIG)
    arriving = "big.json" if option == "--inplace" else ".big.json.*"
    with subprocess.Popen(
        ["rsync", option, "--bwlimit=100", str(big), f"{inbox}/"], stderr=subprocess.DEVNULL
    ) as rsync:
        until(lambda: any(p.stat().st_size for p in inbox.glob(arriving)), "a part of it")
        rsync.kill()
    if option == "--archive":
        until(lambda: not list(inbox.iterdir()), "rsync to clean up")
        count(running, inbox, {})
        return

    count(running, inbox, {}, refused=1)
    assert "JSON" in reason(running, inbox, "big.json")
    assert 0 < (running.failed / inbox.name / "big.json").stat().st_size < len(BIG)


# --- Samba --------------------------------------------------------------------------------------


def test_samba(running: Daemon, inbox: Path, source: Path, tmp_path: Path) -> None:
    """smbclient, on the share that docs/network-share.md describes."""
    with servers.samba(running.root, tmp_path / "samba") as port:
        subprocess.run(
            ["smbclient", "//127.0.0.1/prompts", servers.PASSWORD, "-U", "root", "-p", str(port),
             "-c", f'cd inbox\\{inbox.name}; lcd "{source}"; recurse; prompt; mput *; '
                   f'put one.txt .hidden.txt; rename .hidden.txt renamed.txt'],
            check=True, capture_output=True,
        )  # fmt: skip
        listed = subprocess.run(
            ["smbclient", "//127.0.0.1/prompts", servers.PASSWORD, "-U", "root", "-p", str(port), "-c", "ls"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        count(running, inbox, {**ALL, "renamed": IMAGES})
        fetched = tmp_path / "fetched.png"
        subprocess.run(
            ["smbclient", "//127.0.0.1/prompts", servers.PASSWORD, "-U", "root", "-p", str(port),
             "-c", f'cd outbox\\{inbox.name}\\one; get one-0001.png "{fetched}"; deltree ..\\one'],
            check=True, capture_output=True,
        )  # fmt: skip

    assert ".promptdrop" not in listed
    assert "outbox" in listed
    assert fetched.read_bytes().startswith(b"\x89PNG")
    assert not (running.outbox / inbox.name / "one").exists()


def test_samba_for_a_member_of_the_group(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """Drops, fetches, deletes, withdraws and pauses, with docs/network-share.md's set-up; others may not."""
    member, stranger = "games", "mail"  # users that Debian has, each with a group of its name
    servers.need("chgrp", "smbd")
    with tempfile.TemporaryDirectory(prefix="promptdrop-") as home:
        os.chmod(home, 0o755)  # others must come through to the share
        daemon = make_daemon(SETTINGS, home=home)
        shutil.rmtree(daemon.root)
        subprocess.run([*daemon.command()[:3], "init", home], check=True, capture_output=True)
        subprocess.run(["chgrp", "-R", member, daemon.root], check=True)
        daemon.start().until_ready()
        with servers.samba(daemon.root, tmp_path / "samba", member, stranger) as port:

            def share(user: str, commands: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    ["smbclient", "//127.0.0.1/prompts", servers.PASSWORD, "-U", user, "-p", str(port), "-c", commands],
                    check=False, capture_output=True, text=True, cwd=home,
                )  # fmt: skip

            (Path(home) / "a.txt").write_text(TEXT)
            (Path(home) / "empty").touch()
            sent = share(member, "cd inbox; mkdir sub; cd sub; put a.txt; put empty bad.json")
            daemon.job("sub/a")
            daemon.error("sub/bad.json")
            share(member, "put empty inbox\\PAUSE; put a.txt inbox\\b.txt")
            daemon.until_status("b.txt paused", lambda s: s["state"] == "paused" and s["queue"]["jobs"])  # fmt: skip
            share(member, "put empty inbox\\b.txt.cancel")
            withdrawn = daemon.error("b.txt")["outcome"]
            fetched = share(
                member,
                "get outbox\\sub\\a\\a-0001.png a.png; get outbox\\status.json status.json;"
                "deltree outbox\\sub; deltree failed\\sub; del inbox\\PAUSE",
            )
            refused = share(stranger, "ls")
            daemon.until_status("no pause", lambda s: s["state"] != "paused")

        assert (sent.returncode, fetched.returncode) == (0, 0)
        assert (Path(home) / "a.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((Path(home) / "status.json").read_bytes())["schema"]
        assert withdrawn == "cancelled"
        assert "sub" not in {*os.listdir(daemon.outbox), *os.listdir(daemon.failed)}
        assert refused.returncode != 0
        assert "ACCESS_DENIED" in refused.stdout + refused.stderr
        assert daemon.stop() == 0


def test_an_smb2_client_that_sets_the_size_first(
    running: Daemon, inbox: Path, tmp_path: Path
) -> None:
    """Full size at once, filled slowly, times set: whole. Killed half-way: NUL bytes, refused."""
    pytest.importorskip("smbprotocol")
    from smbprotocol.file_info import FileEndOfFileInformation  # noqa: F401 - the class must be there

    script = tmp_path / "client.py"
    script.write_text(SMB2_CLIENT)
    with servers.samba(running.root, tmp_path / "samba") as port:
        for name, cut in (("whole.txt", "no"), ("cut.txt", "yes")):
            subprocess.run(
                [servers.sys.executable, script, str(port), servers.PASSWORD, f"inbox\\{inbox.name}\\{name}", cut],
                input=TEXT.encode(), check=cut == "no", capture_output=True, timeout=60,
            )  # fmt: skip

        count(running, inbox, {"whole": IMAGES}, refused=1)
    assert "NUL" in reason(running, inbox, "cut.txt")


SMB2_CLIENT = """
import os, sys, time, uuid
from smbprotocol.connection import Connection
from smbprotocol.file_info import FileBasicInformation, FileEndOfFileInformation
from smbprotocol.open import (CreateDisposition, CreateOptions, FileAttributes, FilePipePrinterAccessMask,
                              ImpersonationLevel, Open, ShareAccess)
from smbprotocol.open import SMB2SetInfoRequest
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

port, password, name, cut = sys.argv[1:]
data = sys.stdin.buffer.read()
connection = Connection(uuid.uuid4(), "127.0.0.1", int(port)); connection.connect()
session = Session(connection, "root", password, require_encryption=False); session.connect()
tree = TreeConnect(session, r"\\\\127.0.0.1\\prompts"); tree.connect()
file = Open(tree, name)
file.create(ImpersonationLevel.Impersonation,
            FilePipePrinterAccessMask.GENERIC_READ | FilePipePrinterAccessMask.GENERIC_WRITE,
            FileAttributes.FILE_ATTRIBUTE_NORMAL, ShareAccess.FILE_SHARE_READ,
            CreateDisposition.FILE_OVERWRITE_IF, CreateOptions.FILE_NON_DIRECTORY_FILE)

def set_info(info):
    request = SMB2SetInfoRequest()
    request["info_type"] = 1
    request["file_info_class"] = info.INFO_CLASS
    request["file_id"] = file.file_id
    request["buffer"] = info
    sent = connection.send(request, session.session_id, tree.tree_connect_id)
    connection.receive(sent)

end = FileEndOfFileInformation(); end["end_of_file"] = len(data); set_info(end)
half = len(data) // 2
for start in range(0, half if cut == "yes" else len(data), 40):
    file.write(data[start:start + 40], start)
    time.sleep(0.15)
if cut == "yes":
    os._exit(9)
times = FileBasicInformation()
times["creation_time"] = times["last_access_time"] = times["last_write_time"] = times["change_time"] = 131000000000000000
set_info(times)
file.close(); tree.disconnect(); session.disconnect(); connection.disconnect()
"""


# --- ssh ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["scp", "sftp"])
def test_ssh(running: Daemon, inbox: Path, source: Path, tmp_path: Path, program: str) -> None:
    """Whole; and killed half-way: JSON is refused with a reason."""
    with servers.ssh(tmp_path / "ssh") as options:
        if program == "scp":
            subprocess.run(["scp", "-q", "-rp", *options, f"{source}/.", f"127.0.0.1:{inbox}"], check=True)  # fmt: skip
        else:
            commands = f'cd "{inbox}"\nlcd "{source}"\nput -r .\n'
            subprocess.run(["sftp", "-q", "-b", "-", *options, "127.0.0.1"], input=commands.encode(), check=True, capture_output=True)  # fmt: skip
        big = tmp_path / "killed.json"
        big.write_text(BIG)
        upload_killed(program, options, big, inbox / "killed.json")

        count(running, inbox, ALL, refused=1)
    assert "JSON" in reason(running, inbox, "killed.json")
    assert 0 < (running.failed / inbox.name / "killed.json").stat().st_size < len(BIG)


def upload_killed(program: str, options: list[str], file: Path, target: Path) -> None:
    """Send `file` at 10 kB/s by scp or sftp, and kill that as soon as a part of it is there."""
    command = ["scp", "-q", "-l", "80", *options, str(file), f"127.0.0.1:{target}"]
    if program == "sftp":
        command = ["sftp", "-q", "-l", "80", "-B", "1000", "-b", "-", *options, "127.0.0.1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as upload:
        if program == "sftp" and upload.stdin:
            upload.stdin.write(f'put "{file}" "{target}"\n'.encode())
            upload.stdin.flush()
        until(lambda: target.exists() and target.stat().st_size > 0, "a part of it")
        upload.kill()


# --- WebDAV -------------------------------------------------------------------------------------


def test_webdav(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """An empty file is closed first, the content follows, here slowly."""
    with servers.webdav(running.inbox, tmp_path / "dav") as port:
        for name, pause in (("quick.txt", 0.0), ("slow.txt", 0.3)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest("PUT", f"/{inbox.name}/{name}")
            connection.putheader("Content-Length", str(len(TEXT)))
            connection.endheaders()
            for start in range(0, len(TEXT), 50):
                connection.send(TEXT[start : start + 50].encode())
                time.sleep(pause)
            assert connection.getresponse().status == 201
            connection.close()

        cut = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        cut.putrequest("PUT", f"/{inbox.name}/cut.json")
        cut.putheader("Content-Length", str(len(BIG)))
        cut.endheaders()
        cut.send(BIG[: len(BIG) // 2].encode())
        until((inbox / "cut.json").exists, "a part of it")
        cut.close()

        count(running, inbox, {"quick": IMAGES, "slow": IMAGES}, refused=1)
    assert "JSON" in reason(running, inbox, "cut.json")


# --- a mount that hears nothing -----------------------------------------------------------------


def test_a_fuse_mount_is_polled(make_daemon: MakeDaemon, tmp_path: Path, source: Path) -> None:
    """Files appear from the other side, without an event; the mode is said in log, status, doctor.

    Whether somebody writes there cannot be asked: the quiet time alone holds an appender's file back.
    """
    real, home = tmp_path / "real", tmp_path / "mount"
    real.mkdir()
    with servers.bindfs(real, home):
        daemon = make_daemon(SETTINGS, home="mount")
        daemon.start().until_ready()
        started = daemon.until_log("daemon.started")
        other_side = real / "spool" / "inbox"
        line = 'for n in $(seq 12); do echo "line $n" >> "$0"; sleep 0.2; done'
        subprocess.run(["cp", "-r", f"{source}/.", other_side], check=True)
        subprocess.run(["sh", "-c", line, other_side / "appended.txt"], check=True)
        summaries = [daemon.job(name) for name in (*ALL, "appended")]
        status = daemon.run("status")
        doctor = daemon.run("doctor")
        claims = daemon.log("job.claimed")
        left = {path.name for path in other_side.rglob("*") if path.is_file()}
        stopped = daemon.stop()

        assert [s["totals"]["rendered"] for s in summaries] == [IMAGES] * 4
        assert (len(claims), left, stopped) == (4, set(JUNK), 0)
        for said in (started["watch"], status.stdout, doctor.stdout):
            assert "poll" in said
            assert "fuse" in said


# --- a killed upload that still reads as a job, and its cures -----------------------------------

LONG = f"{TEXT.splitlines()[0]:>500}\n" * 600  # 300 kB, of which a part is as good a job


def test_a_killed_upload_that_parses_is_taken(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """Nobody can tell: this is what the cures are for."""
    (tmp_path / "long.txt").write_text(LONG)
    with servers.ssh(tmp_path / "ssh") as options:
        upload_killed("sftp", options, tmp_path / "long.txt", inbox / "cut.txt")

    assert 0 < running.job(f"{inbox.name}/cut")["totals"]["images"] < 600


def test_rename_cures_a_killed_upload(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """What is cut off stays under its hidden name for ever; what is renamed is whole, and taken once."""
    (tmp_path / "long.txt").write_text(LONG)
    (tmp_path / "whole.txt").write_text(TEXT)
    commands = (
        f'cd "{inbox}"\nlcd "{tmp_path}"\nput whole.txt .whole.txt\nrename .whole.txt whole.txt\n'
    )
    with servers.ssh(tmp_path / "ssh") as options:
        upload_killed("sftp", options, tmp_path / "long.txt", inbox / ".cut.txt")
        subprocess.run(["sftp", "-q", "-b", "-", *options, "127.0.0.1"], input=commands.encode(), check=True, capture_output=True)  # fmt: skip

    count(running, inbox, {"whole": IMAGES})
    assert 0 < (inbox / ".cut.txt").stat().st_size < len(LONG)


def test_submit_cures_a_cut_upload(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """Cut off in the middle of its writing it leaves nothing; else the whole file is taken once."""
    servers.need("prlimit")
    (tmp_path / "sent.txt").write_text(TEXT)
    submit = running.command("submit", str(tmp_path / "sent.txt"), "--folder", inbox.name)
    cut = subprocess.run(["prlimit", "--fsize=100", *submit], capture_output=True, check=False)
    left = os.listdir(inbox)
    subprocess.run(submit, check=True, capture_output=True)

    count(running, inbox, {"sent": IMAGES})
    assert (cut.returncode, left) == (1, [])


def test_a_ready_suffix_cures_a_cut_upload(make_daemon: MakeDaemon) -> None:
    """Without its mark a file is not taken, however long it rests; the mark goes with the file."""
    daemon = make_daemon({**SETTINGS, "watch": {**SETTINGS["watch"], "ready_suffix": ".done"}})
    (daemon.inbox / "cut.txt").write_text(TEXT[: len(TEXT) // 2])
    (daemon.inbox / "whole.txt").write_text(TEXT)
    (daemon.inbox / "whole.txt.done").touch()
    daemon.start()
    images = daemon.job("whole")["totals"]["images"]
    why = daemon.until_waiting("cut.txt")

    assert images == IMAGES
    assert why == "waiting for cut.txt.done"
    assert os.listdir(daemon.inbox) == ["cut.txt"]
    assert daemon.stop() == 0
