"""Ids of jobs."""

from promptdrop.spool.ids import Ids, is_job_id


def test_ids_sort_by_arrival() -> None:
    """They do so also within a microsecond, and when the wall clock is set back."""
    ids = Ids()
    made = [ids.new() for _ in range(20)]
    ids.last = "99991231T235959999999"
    made += [ids.new() for _ in range(2)]

    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert all(map(is_job_id, made[:20]))


def test_other_names_are_strangers() -> None:
    """A folder with any other name among the jobs' folders is not ours."""
    new = Ids().new()

    assert not any(map(is_job_id, ("", "notes", f"{new}~", f"x{new}", f"{new}\n")))
