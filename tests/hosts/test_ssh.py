"""scp and sftp against the running daemon, also killed half-way, and what cures that."""

import subprocess
from pathlib import Path

import pytest

import servers
from clients import ALL, BIG, IMAGES, TEXT, count, reason
from harness import Daemon, until

LONG = f"{TEXT.splitlines()[0]:>500}\n" * 600  # 300 kB, of which a part is as good a job


@pytest.mark.parametrize("program", ["scp", "sftp"])
def test_ssh(running: Daemon, inbox: Path, source: Path, tmp_path: Path, program: str) -> None:
    """Uploads are taken whole; JSON of an upload that was killed half-way is refused with a reason."""
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


def test_a_killed_upload_that_parses_is_taken(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """It cannot be told from a whole file, which is why the cures are needed."""
    (tmp_path / "long.txt").write_text(LONG)
    with servers.ssh(tmp_path / "ssh") as options:
        upload_killed("sftp", options, tmp_path / "long.txt", inbox / "cut.txt")

    assert 0 < running.job(f"{inbox.name}/cut")["totals"]["images"] < 600


def test_rename_cures_a_killed_upload(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """An upload that is cut off keeps its hidden name; one that is renamed is whole, and taken once."""
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
