"""Servers that people's programs talk to, each on a free port of the loopback, until the test ends."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import PATIENCE_SECONDS, free_port

NETWORK_SHARE = Path(__file__).parents[2] / "docs" / "network-share.md"
PASSWORD = "a password for tests"


def need(*programs: str) -> None:
    """Skip where a program cannot be had."""
    if missing := [program for program in programs if not which(program)]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def which(program: str) -> str | None:
    """Find a program, also in the folders that only root's PATH has."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/lib/openssh")


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server in the foreground until it answers, and to its end afterwards."""
    with log.open("wb") as output, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not answers(port):
                assert process.poll() is None, log.read_text("utf-8", "replace")[-2000:]
                assert time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.02)
            yield
        finally:
            os.killpg(process.pid, 15)


@contextmanager
def samba(spool: Path, home: Path, member: str = "root", *others: str) -> Iterator[int]:
    """smbd with the share of docs/network-share.md as it stands there, for `member`'s own group.

    Yields the port. `member` and `others` have PASSWORD.
    """
    need("smbd", "smbclient", "smbpasswd")
    if os.geteuid() != 0:
        pytest.skip("smbd needs root to become its users")
    shown = re.search(r"```ini smb.conf\n(.*?)```", NETWORK_SHARE.read_text(), re.S)
    assert shown, "docs/network-share.md shows an smb.conf"
    share = (
        shown[1].replace("/srv/promptdrop/spool", str(spool)).replace("promptdrop\n", f"{member}\n")
    )
    home.mkdir()
    folders = ("pid", "lock", "state", "cache", "ncalrpc", "private")
    lines = [f"   {name} {'dir' if name in ('ncalrpc', 'private') else 'directory'} = {home}/{name}" for name in folders]  # fmt: skip
    for name in folders:
        (home / name).mkdir(mode=0o755)
    port = free_port()
    conf = home / "smb.conf"
    conf.write_text(
        "[global]\n   server role = standalone server\n   disable spoolss = yes\n   load printers = no\n"
        f"   smb ports = {port}\n   interfaces = lo\n   bind interfaces only = yes\n   log file = {home}/log\n"
        + "\n".join(lines) + "\n" + share
    )  # fmt: skip
    for user in (member, *others):
        subprocess.run(
            ["smbpasswd", "-c", str(conf), "-s", "-a", user],
            input=f"{PASSWORD}\n{PASSWORD}\n".encode(), check=True, capture_output=True,
        )  # fmt: skip
    smbd = which("smbd") or "smbd"
    command = [smbd, "--foreground", "--no-process-group", "--debug-stdout", "-s", str(conf)]
    with serving(command, port, home / "smbd.log"):
        yield port


@contextmanager
def ssh(home: Path) -> Iterator[list[str]]:
    """sshd for ourselves; yields the options that scp and sftp need."""
    need("sshd", "sftp", "scp", "ssh-keygen")
    home.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key], check=True)  # fmt: skip
    port, conf = free_port(), home / "sshd_config"
    conf.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/user.pub\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\nPasswordAuthentication no\n"
        "Subsystem sftp internal-sftp\n"
    )
    options = [
        f"Port={port}", f"IdentityFile={home}/user", "StrictHostKeyChecking=no", "IdentitiesOnly=yes",
        "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes",
    ]  # fmt: skip
    with serving([which("sshd") or "sshd", "-D", "-e", "-f", str(conf)], port, home / "sshd.log"):
        yield [part for option in options for part in ("-o", option)]


@contextmanager
def webdav(folder: Path, home: Path) -> Iterator[int]:
    """wsgidav over a folder; yields the port."""
    pytest.importorskip("wsgidav")
    home.mkdir()
    port = free_port()
    command = [
        sys.executable, "-W", "ignore", "-m", "wsgidav.server.server_cli", "--host", "127.0.0.1",
        "--port", str(port), "--root", str(folder), "--auth", "anonymous", "--server", "cheroot", "--no-config",
    ]  # fmt: skip
    with serving(command, port, home / "wsgidav.log"):
        yield port


@contextmanager
def bindfs(source: Path, mount: Path) -> Iterator[None]:
    """A FUSE mount of a folder: what is written into the folder makes no event in the mount."""
    need("bindfs", "fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    mount.mkdir()
    done = subprocess.run(["bindfs", str(source), str(mount)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        assert os.path.ismount(mount)
        yield
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
