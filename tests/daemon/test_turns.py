"""Whose turn it is: fair between sub-folders, first in first out, priorities."""

from collections.abc import Sequence

from harness import Daemon, MakeDaemon, until
from order import noted, rendered_in_order


def render_paused_drops(daemon: Daemon, drops: Sequence[tuple[str, str]]) -> list[str]:
    """Claim these files one after the other while paused, then render them all.

    Returns the names that their images note, in order.
    """
    daemon.run("pause")
    daemon.start()
    for n, (name, content) in enumerate(drops, 1):
        daemon.drop(name, content)
        daemon.until_log("job.claimed", times=n)
    daemon.run("resume")
    until(lambda: len(daemon.log("job.done")) == len(drops), "all jobs done")
    assert daemon.stop() == 0
    return rendered_in_order(daemon)


def folders(daemon: Daemon) -> list[tuple[str, str]]:
    """Two jobs in sub-folders, two at the root."""
    images = [("big/a", 4), ("small/b", 2), ("c", 1), ("d", 1)]
    return [(f"{job}.txt", f"{noted(daemon, job[-1])}\n" * count) for job, count in images]


def test_fair_takes_turns_between_sub_folders(make_daemon: MakeDaemon) -> None:
    """One image in turn from each sub-folder with work, each job at the root being a lane."""
    daemon = make_daemon({"queue": {"policy": "fair"}})
    order = render_paused_drops(daemon, folders(daemon))

    assert order == ["a", "b", "c", "d", "a", "b", "a", "a"]


def test_fifo_goes_by_arrival(make_daemon: MakeDaemon) -> None:
    """A job is finished before the next one begins."""
    daemon = make_daemon({"queue": {"policy": "fifo"}})
    order = render_paused_drops(daemon, folders(daemon))

    assert order == ["a"] * 4 + ["b"] * 2 + ["c", "d"]


def test_priority_goes_first(daemon: Daemon) -> None:
    """Priority counts before any turn-taking, the higher before the lower."""
    drops = [
        (f"{name}.yaml", f"prompt: '{noted(daemon, name)}'\ncount: 2\npriority: {priority}\n")
        for name, priority in (("low", -5), ("plain", 0), ("high", 10))
    ]

    assert render_paused_drops(daemon, drops) == ["high", "high", "plain", "plain", "low", "low"]
