"""Many people on one share: permissions, cancel and pause files, presets, turns."""

import json
import os
import stat
import subprocess
from itertools import pairwise
from typing import Any

import pytest

from harness import Daemon, MakeDaemon, until
from order import noted, rendered_in_order
from users import obedient

SLOW = "!slow 0.05\n"


def until_claimed(daemon: Daemon, jobs: int) -> None:
    """Wait until so many jobs were claimed since the daemon's log began."""
    until(lambda: len(daemon.log("job.claimed")) >= jobs, f"{jobs} claims")


def begun_in_order(daemon: Daemon) -> list[str]:
    """The jobs' folders, one for each image, in the order the images were begun."""
    sidecars = [
        json.loads(p.read_bytes()) for p in daemon.outbox.rglob("*-[0-9][0-9][0-9][0-9].json")
    ]
    ordered = sorted(sidecars, key=lambda sidecar: sidecar["time"]["started"])
    return [sidecar["job"]["name"] for sidecar in ordered]


# --- files --------------------------------------------------------------------------------------


def test_everything_made_is_the_groups(make_daemon: MakeDaemon) -> None:
    """Files, folders and the status have output.mode or output.directory_mode, and the inbox's group."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to any group")
    daemon = make_daemon({"output": {"mode": "0640", "directory_mode": "2750"}})
    os.chown(daemon.inbox, -1, 12345)
    private = daemon.drop("sub/good.txt", '--prompt "a" --seed 1\n')
    private.chmod(0o600)
    daemon.drop("sub/bad.txt", "--wdith 3\n")

    assert daemon.drain().returncode == 0
    made = [daemon.outbox / "sub", daemon.outbox / "status.json", daemon.failed / "sub"]
    made += [*(daemon.outbox / "sub").rglob("*"), *(daemon.failed / "sub").rglob("*")]
    assert len(made) == 3 + 5 + 2
    for path in made:
        status = path.stat()
        mode = 0o2750 if path.is_dir() else 0o640
        assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, mode), path


def test_an_inbox_nothing_can_be_moved_out_of_is_named(daemon: Daemon) -> None:
    """Log and status say so in words; the cure works without a restart."""
    daemon.drop("a.txt", "a\n")
    daemon.inbox.chmod(0o555)
    daemon.start(wrapper=obedient())
    at_start = daemon.until_log("inbox.unusable")["reason"]
    status = daemon.until_status("a reason", lambda status: status["reason"])
    daemon.inbox.chmod(0o2775)

    assert "is read-only for us" in at_start
    assert "mode 0555" in status["reason"]
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_sticky_inbox_is_named(daemon: Daemon) -> None:
    """Log, status and doctor say so; another user's file waits, and the cure that they name works."""
    if os.geteuid() != 0:
        pytest.skip("needs a second user")
    wrapper = ["setpriv", "--bounding-set=-fowner", *obedient()]
    os.chown(daemon.drop("a.txt", "a\n"), 65534, -1)
    os.chown(daemon.inbox, 65534, -1)
    daemon.inbox.chmod(0o1777)
    daemon.start(wrapper=wrapper)
    at_start = daemon.until_log("inbox.unusable")["reason"]
    waiting = daemon.until_waiting("a.txt", "cannot be moved")
    doctor = subprocess.run(
        [*wrapper, "doctor", "--config", daemon.config],
        capture_output=True,
        text=True,
        check=False,
    )
    daemon.inbox.chmod(0o777)

    for said in (at_start, waiting, doctor.stdout):
        assert "is sticky" in said
        assert f"chmod -t {daemon.inbox}" in said
    assert doctor.returncode == 1
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


# --- steering from the share --------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["night/cat.txt.cancel", "night/CAT.cancel"])
def test_a_cancel_file_withdraws_its_job(daemon: Daemon, mark: str) -> None:
    """NAME is that of the file or the job, in any case; the mark is removed, other jobs go on."""
    daemon.drop("night/cat.txt", SLOW * 50)
    daemon.drop("cat.txt", "a\n")
    daemon.start().until_begun(1)
    daemon.drop(mark, "")
    error = daemon.error("night/cat.txt")
    other = daemon.job("cat")["outcome"]

    assert (error["outcome"], other) == ("cancelled", "done")
    until(lambda: not (daemon.inbox / mark).exists(), "the mark to go")
    assert daemon.stop() == 0


def test_a_cancel_file_waits_for_the_file_it_names(daemon: Daemon) -> None:
    """It may be dropped together with the file, or before that has settled."""
    daemon.drop("cat.txt.cancel", "")
    daemon.drop("cat.txt", SLOW * 200)
    daemon.start()

    assert daemon.error("cat.txt")["outcome"] == "cancelled"
    assert daemon.stop() == 0


def test_a_cancel_file_that_fits_no_job_or_two_says_so(daemon: Daemon) -> None:
    """It goes to failed/, so that it withdraws nothing later."""
    daemon.drop("nobody.cancel", "")
    daemon.run("pause")
    daemon.start()
    for n in (1, 2):  # folders cat and cat~2
        daemon.drop("cat.txt", "a\n")
        until_claimed(daemon, n)
    ids = daemon.unfinished()
    daemon.drop("cat.txt.cancel", "")
    ambiguous = daemon.error("cat.txt.cancel")["error"]
    daemon.drop(f"{ids[1]}.cancel", "")

    assert "names no job" in daemon.error("nobody.cancel")["error"]
    assert f"names 2 jobs: {ids[0]}, {ids[1]}" in ambiguous
    assert daemon.error("cat.txt")["id"] == ids[1]
    until(lambda: daemon.unfinished() == ids[:1], "the other job alone")
    assert daemon.stop() == 0


def test_a_pause_file_pauses(daemon: Daemon) -> None:
    """Files are claimed and no image is rendered until it is deleted, or until `resume`."""
    (daemon.inbox / "PAUSE").touch()
    daemon.drop("a.txt", "a\n")
    daemon.start().until_ready()
    until_claimed(daemon, 1)
    paused = daemon.until_status("paused", lambda s: s["state"] == "paused")
    nothing = daemon.published()
    (daemon.inbox / "PAUSE").unlink()
    first = daemon.job("a")["outcome"]
    (daemon.inbox / "PAUSE").touch()
    daemon.until_status("paused", lambda s: s["state"] == "paused")
    daemon.run("resume")
    daemon.drop("b.txt", "b\n")

    assert "delete it to go on" in paused["reason"]
    assert (nothing, first, daemon.job("b")["outcome"]) == ([], "done", "done")
    assert not (daemon.inbox / "PAUSE").exists()
    assert daemon.stop() == 0


def test_the_outbox_has_the_status(daemon: Daemon) -> None:
    """status.json beside the images: queue, current job and ETA; whole at every look, once a second."""
    daemon.drop("a.txt", SLOW * 25)
    daemon.start()
    path = daemon.outbox / "status.json"
    seen: dict[int, dict[str, Any]] = {}  # by the moment it was written, ns

    def look() -> bool:
        if path.exists():
            with path.open("rb") as file:
                seen[os.fstat(file.fileno()).st_mtime_ns] = json.load(file)
        return (daemon.outbox / "a" / "job.json").exists()

    until(look, "the job's end")
    stopped = daemon.stop()
    last = json.loads(path.read_bytes())
    rendering = [s for s in seen.values() if s["current"]]
    assert rendering
    assert rendering[-1]["current"]["file"] == "a.txt"
    assert rendering[-1]["queue"]["images"] > 0
    assert rendering[-1]["eta_seconds"] > 0
    assert all(b - a > 0.9e9 for a, b in pairwise(sorted(seen)))
    assert (stopped, last["state"], last["queue"]["images"]) == (0, "stopping", 0)
    assert not list(daemon.outbox.glob(".promptdrop-*"))


# --- presets and duplicates ---------------------------------------------------------------------


def test_a_sub_folder_is_a_preset(make_daemon: MakeDaemon) -> None:
    """A field that the file does not give is taken from its folder; one that it gives is kept."""
    preset = {"size": "128x64", "steps": 2, "count": 2, "format": "jpeg", "priority": 7}
    daemon = make_daemon({"folders": {"wall": preset}})
    daemon.drop("wall/deep/a.txt", "a\n")
    daemon.drop("wall/b.yaml", "{prompt: b, steps: 1, seed: [1, 2, 3], format: png}")
    daemon.drop("c.txt", "c\n")

    assert daemon.drain().returncode == 0
    shown = daemon.run("check", str(daemon.outbox / "c" / "request.txt"))
    a, b, c = (daemon.sidecars(folder) for folder in ("wall/deep/a", "wall/b", "c"))
    assert [(s["image"]["width"], s["request"]["steps"], s["image"]["format"]) for s in a] == [
        (128, 2, "jpeg")
    ] * 2
    assert [(s["image"]["width"], s["request"]["steps"], s["image"]["format"]) for s in b] == [
        (128, 1, "png")
    ] * 3
    assert [(s["image"]["width"], s["request"]["steps"]) for s in c] == [(64, 3)]
    assert "64x64" in shown.stdout


def test_duplicates_are_refused_on_request(make_daemon: MakeDaemon) -> None:
    """The same bytes from the same folder, also after a restart; a job that failed may come back."""
    daemon = make_daemon({"inbox": {"duplicates": "refuse"}})
    daemon.drop("a.txt", '--prompt "a" --seed 1\n')
    daemon.drop("failing.txt", "!raise boom\n")
    daemon.drain()
    daemon.drop("a (conflicted copy).txt", '--prompt "a" --seed 1\n')
    daemon.drop("other/a.txt", '--prompt "a" --seed 1\n')
    (daemon.failed / "failing.txt").rename(daemon.inbox / "failing.txt")
    daemon.drain()

    assert "same bytes as a.txt" in daemon.error("a (conflicted copy).txt")["error"]
    assert daemon.job("other/a")["outcome"] == "done"
    assert daemon.job("failing~2")["outcome"] == "failed"


# --- fairness -----------------------------------------------------------------------------------


def test_a_thousand_files_do_not_keep_a_single_one_waiting(make_daemon: MakeDaemon) -> None:
    """Files are claimed, and images rendered, in turn between folders: bob's is among the first."""
    daemon = make_daemon({"watch": {"settle_seconds": 0.5, "rescan_seconds": 0.2}})
    folder = daemon.home / "alice"
    for n in range(1000):
        daemon.drop(f"{n:04d}.txt", SLOW, folder)
    daemon.start().until_ready()
    folder.rename(daemon.inbox / "alice")
    until(lambda: daemon.published(), "alice's first image")
    daemon.drop("bob/one.txt", "bob\n")
    daemon.job("bob/one")
    published = [file for file, _ in daemon.published()]
    daemon.stop()

    assert published.index("bob/one/one-0001.png") < 200


def test_ten_thousand_images_do_not_keep_a_single_one_waiting(daemon: Daemon) -> None:
    """Once claimed, bob's is begun next: behind what the engine has in hand, not behind the rest."""
    daemon.drop("alice/many.yaml", "prompt: '!slow 0.02'\ncount: 10000\n")
    daemon.start().until_begun(20)
    daemon.drop("bob/one.txt", "bob\n")
    daemon.job("bob/one")
    order = begun_in_order(daemon)
    events = daemon.log()
    claimed = next(n for n, e in enumerate(events) if e.get("file") == "bob/one.txt")
    before = [e for e in events[:claimed] if e["event"] == "image.published"]
    left = daemon.status()["queue"]["images"]

    assert order.index("one") <= len(before) + 8  # in the engine or on their way to the disk
    assert left > 9000
    assert daemon.stop() == 0


def test_a_higher_priority_goes_in_front_at_the_next_image(daemon: Daemon) -> None:
    """It goes also before an image that the engine was sent ahead of time."""
    go = daemon.home / "go"
    daemon.drop("low.txt", f"!wait {go}\n" + f"{noted(daemon, 'low')}\n" * 3)
    daemon.start().until_begun(1)
    daemon.drop("high.yaml", f"prompt: '{noted(daemon, 'high')}'\npriority: 5\n")
    until(lambda: len(list(daemon.own.glob("active/*"))) == 2, "high with the engine")
    go.touch()
    daemon.job("low")

    assert rendered_in_order(daemon) == ["high", "low", "low", "low"]
    assert daemon.stop() == 0
