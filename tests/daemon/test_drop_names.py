"""Names of files and sub-folders: made safe, kept apart, mirrored."""

import os
import subprocess

from harness import Daemon, until


def test_names_are_made_safe(daemon: Daemon) -> None:
    """Names of 255 bytes, with undecodable or control characters, or reserved are nowhere used raw."""
    inbox = os.fsencode(daemon.inbox)
    dropped = {
        "长".encode() * 83 + b"ab.txt": "长" * 26,
        b"caf\xe9.txt": None,
        b"new\nline\x1b[31m.txt": "new_line__31m",
        b"con.txt": "con_",
        b"-rf.txt": "rf",
        b"a b&c;$(id).txt": "a_b_c___id_",
        b"trail. .txt": "trail._",
        "cafe\u0301.txt".encode(): "caf\u00e9",
        b"...json.yaml.txt": None,  # hidden
    }
    for name in dropped:
        with open(inbox + b"/" + name, "w") as file:
            file.write("a cat\n")
    daemon.drain()
    folders = {p.name for p in daemon.outbox.iterdir() if p.is_dir()}
    log = daemon.log_file.read_bytes()

    assert os.listdir(inbox) == [b"...json.yaml.txt"]
    assert {folder for folder in dropped.values() if folder} <= folders
    assert len(folders) == 8
    assert all(daemon.job(folder)["outcome"] == "done" for folder in folders)
    files = {daemon.job(folder)["file"] for folder in folders}
    assert {"caf\\xe9.txt", "new\\nline\\x1b[31m.txt"} <= files
    assert b"\x1b" not in log
    assert b"\xe9" not in log
    for folder in folders:
        assert len(os.fsencode(folder)) <= 80
        assert {s["job"]["file"] for s in daemon.sidecars(folder)} == {daemon.job(folder)["file"]}


def test_hostile_names_are_refused_like_others(daemon: Daemon) -> None:
    """failed/ has the file under its own name, or a cut one, with a reason and a way to retry."""
    names = [b"x" * 251 + b".txt", b"caf\xe9.txt", b"new\nline.txt", b"it's.txt"]
    for name in names:
        with open(os.fsencode(daemon.inbox) + b"/" + name, "w"):
            pass
    done = daemon.drain()
    there = os.listdir(os.fsencode(daemon.failed))

    assert done.returncode == 0
    assert not any(daemon.inbox.iterdir())
    assert len(there) == 8
    assert {b"caf\xe9.txt", b"caf\xe9.txt.error.json", b"new\nline.txt", b"it's.txt"} <= set(there)
    assert all(name.endswith((b".txt", b".txt.error.json")) for name in there)
    retry = daemon.error("it's.txt")["retry"]
    parsed = subprocess.run(
        ["sh", "-c", f"printf '%s|' {retry}"], capture_output=True, text=True, check=False
    )
    assert parsed.stdout == "promptdrop|retry|it's.txt|"


def test_same_names_never_share_a_folder(daemon: Daemon) -> None:
    """The second is JOB~2, even if only case differs, and STEM~2 in failed/."""
    daemon.start().until_ready()
    for n, name in enumerate(["cat.txt", "cat.txt", "CAT.TXT", "cat.prompt"], 1):
        daemon.drop(name, f"cat {n}\n")
        daemon.until_log("job.claimed", times=n)
    for n in (1, 2):
        daemon.drop("bad.txt", "")
        daemon.until_log("job.refused", times=n)
    until(lambda: len(daemon.log("job.done")) == 4, "four jobs")
    folders = [p.name for p in daemon.outbox.iterdir() if p.is_dir()]
    prompts = {folder: daemon.sidecars(folder)[0]["request"]["prompt"] for folder in folders}

    assert prompts == {"cat": "cat 1", "cat~2": "cat 2", "CAT~3": "cat 3", "cat~4": "cat 4"}
    assert (daemon.outbox / "cat~2" / "cat~2-0001.png").exists()
    assert sorted(os.listdir(daemon.failed)) == [
        "bad.txt", "bad.txt.error.json", "bad~2.txt", "bad~2.txt.error.json",
    ]  # fmt: skip
    assert daemon.stop() == 0


def test_sub_folders_are_mirrored(daemon: Daemon) -> None:
    """SUB is mirrored as SUB~2 if a job's folder has its name; each part of a path is made safe."""
    daemon.start().until_ready()
    daemon.drop("cats.txt", "a cat\n")
    daemon.job("cats")
    daemon.drop("cats/a.txt", "a cat\n")
    daemon.drop("A b/c d/e.txt", "a cat\n")
    daemon.drop("nul/f.txt", "a cat\n")
    daemon.drop("g.txt/h.txt", "a cat\n")

    assert daemon.job("cats~2/a")["folder"] == "cats~2/a"
    assert daemon.job("A_b/c_d/e")["outcome"] == "done"
    assert daemon.job("nul_/f")["outcome"] == "done"
    assert daemon.job("g.txt/h")["outcome"] == "done"
    assert daemon.stop() == 0
