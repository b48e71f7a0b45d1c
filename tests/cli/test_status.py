"""`promptdrop status`: rows for people, lines when piped."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptdrop.cli import status as command
from promptdrop.cli import terminal
from promptdrop.spool.spool import Spool
from statuses import ENGINE, WINDOW, end, image, status, write_status

BUSY = {
    "state": "rendering",
    "engines": [{**ENGINE, "current": image()}],
    "queue": {"jobs": 2, "images": 7, "publishing": 1},
    "window": {**WINDOW, "images": 50, "p50_ms": 740.6, "p95_ms": 752.0, "p99_ms": 760.1,
               "images_per_second": 1.344},
    "eta_seconds": 7800.0,
    "waiting": [{"file": f"w{n}.txt", "why": "still settling"} for n in range(12)],
    "stuck": [{"file": f"h{n}.txt", "why": "outbox/h is a file"} for n in range(12)],
    "finished": [end("good.txt"), *(end(f"bad{n}.txt", "failed", error="no luck") for n in range(7))],
}  # fmt: skip


def arguments(spool: Spool, file: Path, **options: Any) -> argparse.Namespace:
    """Arguments of `status` for this spool's configuration."""
    file.write_text(json.dumps({"root": str(spool.paths.root), "model": {"id": "gradient"}}))
    return argparse.Namespace(config=file, **{"as_json": False, "watch": False, **options})


def test_rows_of_a_busy_daemon() -> None:
    """At most ten waiting files, ten that trouble holds up and the last five jobs that did not end well are shown."""
    rows = list(command.rows(status(**BUSY)))

    assert rows[:7] == [
        ("state", "rendering"),
        ("engine", "warm, gradient on cpu, float32"),
        ("rendering", "cat.txt 1/4, step 2/8, 1.2 s"),
        ("queue", "7 images of 2 jobs, 1 being saved"),
        ("watch", "inotify on ext4"),
        ("rate", "1.34 images/s, render p50 741 ms, p95 752 ms, p99 760 ms over 50 images"),
        ("done in", "2 h 10 min"),
    ]
    assert rows[7:17] == [("waiting", f"w{n}.txt: still settling") for n in range(10)]
    assert rows[17:27] == [("stuck", f"h{n}.txt: outbox/h is a file") for n in range(10)]
    assert rows[27:] == [("failed", f"bad{n}.txt: no luck") for n in range(2, 7)]


def test_rows_of_an_idle_daemon() -> None:
    """An idle daemon has no rows about rates, time or files."""
    rows = dict(command.rows(status(state="waiting", reason="outbox is full")))

    assert rows["state"] == "waiting: outbox is full"
    assert set(rows) == {"state", "engine", "queue", "watch"}


def test_several_engines_have_names_and_hosts() -> None:
    """With several engines each row has name and host; one that cannot work says why."""
    engines = [
        {**ENGINE, "host": "here"},
        {**ENGINE, "name": "engine-2", "host": "there", "device": None, "reason": "no GPU"},
    ]
    rows = dict(command.rows(status(engines=engines)))

    assert rows["engine-1"] == "warm, gradient on cpu, float32, here"
    assert rows["engine-2"] == "warm, gradient, there: no GPU"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5400, "1 h 30 min"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    """Times are written in seconds, then minutes, then hours and minutes."""
    assert command.duration(seconds) == text


def test_a_terminal_of_80_columns(drawn: Callable[[Callable[[], None]], str]) -> None:
    """No line is longer than that; text is folded, not cut, and markup in it stays text."""
    long = "[bold]" + "x" * 200
    table = drawn(lambda: terminal.pairs([("state", long), ("queue", "empty")]))

    assert max(map(len, table.splitlines())) <= 80
    assert "[bold]" in table
    assert table.count("x") == 200


def test_piped_lines_are_separated_by_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    """When piped, a table has its header, pairs have none, and nothing is folded."""
    terminal.table(("image", "seed"), [("x" * 200, "7")])
    terminal.pairs([("state", "ready")])

    assert capsys.readouterr().out == f"image\tseed\n{'x' * 200}\t7\nstate\tready\n"


def test_json_is_the_daemons_own(
    owned: Spool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """status --json prints what the daemon wrote, whatever keys this version knows."""
    document = {"state": "dreaming", "of": "electric sheep"}
    owned.paths.status.write_text(json.dumps(document))
    code = command.status(arguments(owned, tmp_path / "config.yaml", as_json=True))

    assert code == 0
    assert json.loads(capsys.readouterr().out) == document


@pytest.mark.parametrize("document", [
    {"state": "dreaming", "new": 1},
    {"state": 5, "engines": "many", "queue": None, "waiting": [1], "window": {"p50_ms": "fast"}},
    {"engines": [{"current": {"file": "a.txt"}}], "finished": [{"file": "b.txt"}]},
    {"window": {"p50_ms": 1}, "queue": {"images": 5}, "eta_seconds": 3},
])  # fmt: skip
def test_a_status_of_another_version_is_shown(
    owned: Spool, tmp_path: Path, capsys: pytest.CaptureFixture[str], document: Any
) -> None:
    """Values that such a status has are shown; those it lacks are left blank."""
    owned.paths.status.write_text(json.dumps(document))
    code = command.status(arguments(owned, tmp_path / "config.yaml"))

    assert code == 0
    assert capsys.readouterr().out.startswith("state\t")


def test_no_daemon_runs(spool: Spool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 1, and stderr has the command that starts a daemon."""
    write_status(spool.paths.status)
    file = tmp_path / "config.yaml"
    code = command.status(arguments(spool, file))
    said = capsys.readouterr()

    assert code == 1
    assert said.out == ""
    assert said.err.endswith(f"start it with: promptdrop run --config {file}\n")
