"""Whose turn it is: fair between people and their sub-folders, first in first out, priorities."""

import shlex
from collections.abc import Sequence

from harness import Daemon, MakeDaemon, until
from order import noted, rendered_in_order
from people import ALICE, BOB, DAEMON, Person, give_to_group, open_home, promptdrop_as
from promptdrop.intake.intake import TAKING


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
    """One image in turn from each sub-folder with work, the root being one more."""
    daemon = make_daemon({"queue": {"policy": "fair"}})
    order = render_paused_drops(daemon, folders(daemon))

    assert order == ["a", "b", "c", "a", "b", "d", "a", "a"]


def drop_as(person: Person, daemon: Daemon, sub: str, count: int, prompt: str) -> None:
    """Somebody drops a file of two images into each of so many sub-folders."""
    text = shlex.quote(f"{prompt}\n{prompt}\n")
    script = f"mkdir -p {sub}$n && printf %s {text} >{sub}$n/.a && mv {sub}$n/.a {sub}$n/a.txt"
    person.sh(f"set -e; umask 002; for n in $(seq {count}); do {script}; done", daemon.inbox)


def test_three_hundred_folders_are_one_persons_turns() -> None:
    """Bob's file is claimed, and his first image begun, within two turns, also after a restart."""
    command = promptdrop_as(DAEMON)
    with open_home() as home:
        daemon = Daemon(home)
        give_to_group(daemon)
        try:
            ALICE.sh("touch PAUSE", daemon.inbox)
            drop_as(ALICE, daemon, "alice-", 300, noted(daemon, "alice"))
            drop_as(BOB, daemon, "bob-", 1, noted(daemon, "bob"))
            daemon.start(wrapper=command)
            daemon.until_log("job.claimed", times=301)
            claimed = [entry["file"] for entry in daemon.log("job.claimed")]
            daemon.kill()
            daemon.start(wrapper=command).until_ready()
            ALICE.sh("rm PAUSE", daemon.inbox)
            daemon.job("bob-1/a")
            stopped = daemon.stop()
        finally:
            daemon.kill()

        assert stopped == 0
        assert claimed.index("bob-1/a.txt") <= TAKING  # so many are read at once
        assert rendered_in_order(daemon)[:4] == ["alice", "bob", "alice", "bob"]


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
