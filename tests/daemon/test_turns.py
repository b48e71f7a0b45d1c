"""Whose turn it is: fair between sub-folders, first in first out, priorities."""

import json

from harness import Daemon, MakeDaemon, until


def rendered_in_order(daemon: Daemon) -> list[str]:
    """The jobs' folders, one for each image, in the order the images were begun."""
    sidecars = [
        json.loads(p.read_bytes()) for p in daemon.outbox.rglob("*-[0-9][0-9][0-9][0-9].json")
    ]
    return [s["job"]["name"] for s in sorted(sidecars, key=lambda s: s["time"]["started"])]


def render_paused_drops(daemon: Daemon, drops: list[tuple[str, str]]) -> list[str]:
    """Claim these files one after the other while paused, then render them all."""
    daemon.run("pause")
    daemon.start()
    for n, (name, content) in enumerate(drops, 1):
        daemon.drop(name, content)
        daemon.until_log("job.claimed", times=n)
    daemon.run("resume")
    until(lambda: len(daemon.log("job.done")) == len(drops), "all jobs done")
    assert daemon.stop() == 0
    return rendered_in_order(daemon)


IMAGE = "!slow 0.01\n"  # long enough for the order in which images begin to be seen
FOLDERS = [("big/a.txt", IMAGE * 4), ("small/b.txt", IMAGE * 2), ("c.txt", IMAGE), ("d.txt", IMAGE)]


def test_fair_takes_turns_between_sub_folders(make_daemon: MakeDaemon) -> None:
    """One image in turn from each sub-folder with work, each job at the root being a lane."""
    order = render_paused_drops(make_daemon({"queue": {"policy": "fair"}}), FOLDERS)

    assert order == ["a", "b", "c", "d", "a", "b", "a", "a"]


def test_fifo_goes_by_arrival(make_daemon: MakeDaemon) -> None:
    """A job is finished before the next one begins."""
    order = render_paused_drops(make_daemon({"queue": {"policy": "fifo"}}), FOLDERS)

    assert order == ["a"] * 4 + ["b"] * 2 + ["c", "d"]


def test_priority_goes_first(daemon: Daemon) -> None:
    """Priority counts before any turn-taking, the higher before the lower."""
    two = 'prompts: ["!slow 0.01 a", "!slow 0.01 b"]\n'
    drops = [
        ("low.yaml", f"{two}priority: -5\n"),
        ("plain.yaml", two),
        ("high.yaml", f"{two}priority: 10\n"),
    ]

    assert render_paused_drops(daemon, drops) == ["high", "high", "plain", "plain", "low", "low"]
