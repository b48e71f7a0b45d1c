"""Clients of a Samba share against the running daemon."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import servers
from clients import ALL, IMAGES, SETTINGS, TEXT, count, reason
from harness import Daemon, MakeDaemon


def test_samba(running: Daemon, inbox: Path, source: Path, tmp_path: Path) -> None:
    """Files that smbclient puts on the share of docs/network-share.md are taken whole and once."""
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
    """A file that has its full size at once is taken when it is filled; killed half-way, it is refused."""
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
