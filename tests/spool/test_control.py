"""Commands in the control folder, which anybody of the group may write to."""

import json
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from promptdrop.spool import control
from promptdrop.spool.spool import Spool

KINDS = ("cancel", "retry", "stop")


def read(spool: Spool) -> tuple[control.Command, ...]:
    """The commands that a daemon finds which has seen none of them yet."""
    return control.CommandFiles(spool.paths.control).read(0.0)


def leave(spool: Spool, *files: str) -> None:
    """Leave commands under these names, each to cancel the job X."""
    for file in files:
        (spool.paths.control / file).write_text('{"command": "cancel", "targets": ["x"]}')


def test_commands_are_read_until_they_are_done(spool: Spool) -> None:
    """There is one file for each thousand targets; a crash before the end repeats a command."""
    folder = spool.paths.control
    control.send(folder, control.Cancel(("x",)))
    control.send(folder, control.Retry(tuple(f"{n}.txt" for n in range(2500))))
    first, second = read(spool), read(spool)
    for command in first:
        spool.commands.remove(command.file)

    assert first == second
    assert sorted(len(command.targets) for command in first) == [1, 500, 1000, 1000]
    assert [command.targets for command in first if isinstance(command, control.Cancel)] == [("x",)]
    assert read(spool) == ()


def test_long_targets_fit_into_commands(spool: Spool) -> None:
    """A file is never too large to be a command, however much of its targets has to be escaped."""
    targets = tuple(f"{n}" + "\udcff" * 1000 for n in range(1000))
    control.send(spool.paths.control, control.Retry(targets))
    found = [target for command in read(spool) for target in command.targets]

    assert len(found) < 1000  # the rest has its turn at the next look
    while commands := spool.commands.read(0.0):
        for command in commands:
            spool.commands.remove(command.file)
            found += command.targets
    assert set(found) == set(targets)


BAD = {  # a file's text: what is said of it
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    "[]": "no JSON object",
    '{"command": "stop", "targets": []}': "command=stop",
    '{"command": {"a": []}, "targets": []}': "command=no text",
    '{"command": "retry", "targets": "x"}': "targets is no list of texts",
    '{"command": "retry", "targets": [{"id": []}]}': "targets is no list of texts",
    json.dumps({"command": "cancel", "targets": ["x"] * 1001}): "1001 targets",
    json.dumps({"command": "cancel", "targets": ["x" * (1 << 20)]}): "more than 1048576 bytes",
}


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_what_is_no_command_is_answered_and_removed(spool: Spool, text: str) -> None:
    """The answer has the file's name, printable, what is wrong and what was expected."""
    (spool.paths.control / "a\x1b.json").write_text(text)
    with capture_logs() as lines:
        found = read(spool)

    assert found == ()
    assert [(line["event"], line["file"]) for line in lines] == [("command.refused", "a\\x1b.json")]
    assert lines[0]["reason"].startswith(f"{BAD[text]}; expected a file of at most 1048576 bytes")
    kind = next((k for k in KINDS if f'"command": "{k}"' in text[:1000]), None)
    is_read = len(text) <= 1 << 20
    assert lines[0].get("command") == (kind if is_read else None)
    assert os.listdir(spool.paths.control) == []


def test_what_is_no_file_is_answered_and_removed(spool: Spool, tmp_path: Path) -> None:
    """Links are not followed, pipes not waited for, and of 8 GiB only the first MiB is read."""
    folder = spool.paths.control
    leave(spool, "aim")
    (folder / "aim").rename(tmp_path / "aim")
    (folder / "link.json").symlink_to(tmp_path / "aim")
    (folder / "dangling.json").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.json")
    (folder / "sparse.json").touch()
    os.truncate(folder / "sparse.json", 8 << 30)
    with capture_logs() as lines:
        found = read(spool)

    assert found == ()
    assert sorted(line["file"] for line in lines) == [
        "dangling.json", "link.json", "pipe.json", "sparse.json",
    ]  # fmt: skip
    assert os.listdir(folder) == []
    assert (tmp_path / "aim").exists()


def test_a_folder_with_the_name_of_a_command_is_named_once(spool: Spool) -> None:
    """It cannot be removed, and holds nothing up; a command of that name is obeyed later."""
    folder = spool.paths.control
    (folder / "a.json").mkdir()
    for file in (".e.json", "f.txt"):  # still being written; no command
        (folder / file).write_text("{")
    leave(spool, "b.json")
    with capture_logs() as lines:
        found = [[one.file for one in spool.commands.read(now)] for now in range(3)]
    (folder / "a.json").rmdir()
    leave(spool, "a.json")

    assert found == [["b.json"]] * 3
    assert [line["file"] for line in lines] == ["a.json"]
    assert [one.file for one in spool.commands.read(3.0)] == ["a.json", "b.json"]
    assert sorted(os.listdir(folder)) == [".e.json", "a.json", "b.json", "f.txt"]


def test_those_that_wait_take_nobodys_turn(spool: Spool) -> None:
    """A hundred commands are read at once. Those that wait for a job or a disk do not count, and each
    has its turn again, later and later, behind those that are new."""
    leave(spool, *(f"a{n:03}.json" for n in range(150)))
    first = [one.file for one in spool.commands.read(0.0)]
    for file in first:
        spool.commands.begin(file)
    under_way = spool.commands.read(0.0)
    for n, file in enumerate(first):
        if n % 2:
            spool.commands.set_aside(file)
        else:
            spool.commands.wait(file, 0.0)
    second = [one.file for one in spool.commands.read(0.0)]
    third = [one.file for one in spool.commands.read(10.0)]
    spool.commands.wait(first[0], 10.0)
    later = [
        now
        for now in (10.0, 10.15, 10.25)
        for one in spool.commands.read(now)
        if one.file == first[0]
    ]

    assert first == [f"a{n:03}.json" for n in range(100)]
    assert under_way == ()
    assert second == [f"a{n:03}.json" for n in range(100, 150)]
    assert third == second + first[::2]
    assert later == [10.25]


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
