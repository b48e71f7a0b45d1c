"""Commands in the control folder, which anybody of the group may write to."""

import os

from promptdrop.spool import control
from promptdrop.spool.spool import Spool


def test_commands_are_read_until_they_are_done(spool: Spool) -> None:
    """There is one file for each hundred targets; a crash before the end repeats a command."""
    folder = spool.paths.control
    control.send(folder, control.Cancel(("x",)))
    control.send(folder, control.Retry(tuple(f"{n}.txt" for n in range(250))))
    first, second = control.read(folder), control.read(folder)
    for command in first:
        control.done(folder, command.file)

    assert first == second
    assert sorted(len(command.targets) for command in first) == [1, 50, 100, 100]
    assert [command.targets for command in first if isinstance(command, control.Cancel)] == [("x",)]
    assert control.read(folder) == ()


def test_what_is_no_command_is_removed(spool: Spool) -> None:
    """Any other file is removed; a folder stays, and a file that is still being written is not read."""
    folder = spool.paths.control
    for name, text in (
        ("a.json", "{"), ("b.json", '{"command": "stop", "targets": []}'), ("c.json", "[]"),
        ("d.json", '{"command": "retry", "targets": "x"}'), (".e.json", "{"), ("f.txt", "{"),
    ):  # fmt: skip
        (folder / name).write_text(text)
    (folder / "g.json").mkdir()
    os.mkfifo(folder / "h.json")

    assert control.read(folder) == ()
    assert sorted(os.listdir(folder)) == [".e.json", "f.txt", "g.json"]


def test_work_is_paused_by_a_command_or_a_file(spool: Spool) -> None:
    """Each reason says how to go on."""
    control.pause(spool.paths.control)
    by_command = control.why_paused(spool.paths)
    control.resume(spool.paths.control)
    (spool.paths.inbox / "PAUSE").touch()
    by_file = control.why_paused(spool.paths)
    (spool.paths.inbox / "PAUSE").unlink()

    assert by_command == "paused; go on with: promptdrop resume"
    assert by_file == "paused by the file PAUSE in the inbox; delete it to go on"
    assert control.why_paused(spool.paths) is None
