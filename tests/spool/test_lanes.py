"""Whose turn a job waits for: the lane of a dropped file."""

import pytest

from promptdrop.spool.lanes import lane_of


@pytest.mark.parametrize(
    ("sub", "file", "name"),
    [
        ("ann", "a.txt", "ann"),
        ("ann/deep/down", "a.txt", "ann"),
        ("", "a.txt", ""),
        ("", "generate-a.json", "/generate"),
        ("ann", "generate-a.json", "ann"),
        ("generate", "a.txt", "generate"),
    ],
)
def test_a_lane_is_a_top_folder_the_root_or_generate(sub: str, file: str, name: str) -> None:
    """It is one of its owner's; no folder can have the name of that of `generate`."""
    assert lane_of(1000, sub, file) == (1000, name)
