"""Whose file is taken next: owners take turns, then their lanes; within a lane files go by arrival."""

import pytest

from promptdrop.intake.inbox import Offer
from promptdrop.intake.turns import STUCK, Turns, by_lane
from promptdrop.spool.lanes import lane_of

ANN, BOB = 1001, 1002  # uids


def offers(owner: int, *paths: str) -> list[Offer]:
    """An offer of each of these files, which belong to this uid."""
    parts = [path.rpartition("/") for path in paths]
    return [Offer(sub, file, (1, 1, 1, 1), 0.0, owner=owner) for sub, _, file in parts]


def taken(turns: Turns) -> list[str]:
    """Take every file that waits."""
    order = []
    while offer := turns.take():
        order.append(offer.path)
    return order


def test_many_folders_are_one_owners_turns() -> None:
    """The single file of another is the second that is taken; files at the root are one lane, too."""
    turns = Turns()
    many = [f"{n}/a.txt" for n in range(300)]
    turns.add(by_lane(offers(ANN, *many, "x.txt", "y.txt", "generate-z.json"), "fair"))
    turns.add(by_lane(offers(BOB, "0/bob.txt"), "fair"))

    assert taken(turns) == [
        "0/a.txt", "0/bob.txt", *many[1:], "x.txt", "generate-z.json", "y.txt",
    ]  # fmt: skip


def test_who_has_had_a_turn_is_behind_the_others() -> None:
    """Files that come later go behind those of their lane; nothing is kept of a lane that is empty."""
    turns = Turns()
    turns.add(by_lane(offers(ANN, "a/1.txt", "a/2.txt"), "fair"))
    first = turns.take()
    turns.add(by_lane([*offers(ANN, "a/3.txt"), *offers(BOB, "b.txt")], "fair"))

    assert first
    assert first.path == "a/1.txt"
    assert taken(turns) == ["a/2.txt", "b.txt", "a/3.txt"]
    assert turns.take() is None


def test_fifo_asks_nobody_for_his_name() -> None:
    """Files are taken in the order in which they were found complete."""
    turns = Turns()
    turns.add(by_lane([*offers(ANN, "a/1.txt", "b/2.txt"), *offers(BOB, "3.txt")], "fifo"))

    assert taken(turns) == ["a/1.txt", "b/2.txt", "3.txt"]


@pytest.mark.parametrize("policy", ["fair", "fifo"])
def test_files_behind_stuck_ones_wait(policy: str) -> None:
    """With several claimed files of a lane that wait for its disk, its others wait until one of them goes on;
    other lanes are served, whatever the policy."""
    turns = Turns()
    stuck = lane_of(ANN, "a", "")
    for _ in range(STUCK):
        turns.stalled(stuck, begins=True)
    turns.add(by_lane([*offers(ANN, "a/1.txt", "a/2.txt"), *offers(BOB, "b.txt")], policy))
    while_stuck, behind = taken(turns), turns.behind
    turns.stalled(stuck, begins=False)

    assert (while_stuck, behind) == (["b.txt"], 2)
    assert taken(turns) == ["a/1.txt", "a/2.txt"]
    assert turns.behind == 0
