"""The findings of `doctor` on a real spool."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptdrop.cli import checks
from promptdrop.cli.checks import Finding
from promptdrop.cli.doctor import print_finding
from promptdrop.spool.spool import Spool
from spools import init_spool, make_spool, put

SOUND: dict[str, Any] = {
    "model": {"id": "gradient", "device": "cpu"},
    "limits": {"min_free_disk_mib": 0},
}


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A spool that every check finds good."""
    return init_spool(tmp_path, **SOUND)


def graded(grade: str, spool: Spool) -> list[tuple[str, str]]:
    """The findings of this grade: (what, text)."""
    return [(f.what, f.text) for f in checks.examine(spool.config) if f.grade == grade]


def test_a_good_spool(spool: Spool) -> None:
    """There is one line for each thing, in order; the gradient is noted, since it is no model."""
    findings = list(checks.examine(spool.config))

    assert [finding.what for finding in findings] == [
        "configuration", "inbox", "state", "outbox", "failed", "watch", "model", "device", "daemon",
    ]  # fmt: skip
    assert [f.what for f in findings if f.grade != "ok"] == ["model"]
    assert findings[-1].text == "not running"


def test_folders_that_are_missing(spool: Spool) -> None:
    """Each is bad, with the command that makes it; checks that need the inbox are left out."""
    shutil.rmtree(spool.paths.root)
    bad = graded("bad", spool)

    assert [what for what, _ in bad] == ["inbox", "state", "outbox", "failed"]
    assert all(f"promptdrop init {spool.paths.root.parent}" in text for _, text in bad)
    assert "watch" not in {finding.what for finding in checks.examine(spool.config)}


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Each folder with less than limits.min_free_disk_mib is bad."""
    spool = init_spool(tmp_path, **{**SOUND, "limits": {"min_free_disk_mib": 10**9}})
    bad = graded("bad", spool)

    assert [what for what, _ in bad] == ["inbox", "state", "outbox", "failed"]
    assert all("less than limits.min_free_disk_mib: 1000000000" in text for _, text in bad)


def test_strangers_in_the_inbox(spool: Spool) -> None:
    """Files that are never taken are noted with the reason, 20 at most; their names are escaped."""
    put(spool, "good.txt")
    (spool.paths.inbox / "a\x1b.txt").symlink_to("good.txt")
    few = graded("note", spool)
    for n in range(30):
        (spool.paths.inbox / f"link{n}.txt").symlink_to("good.txt")
    many = [text for what, text in graded("note", spool) if what == "inbox"]

    assert [text.partition(":")[0] for what, text in few if what == "inbox"] == ["a\\x1b.txt"]
    assert len(many) == 21
    assert many[-1] == "... and more"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders to other groups")
def test_groups_that_differ(spool: Spool) -> None:
    """An outbox of another group than the inbox's is noted, with the cure."""
    group = spool.paths.inbox.stat().st_gid
    os.chown(spool.paths.outbox, -1, group + 1)
    (note,) = [text for what, text in graded("note", spool) if what == "outbox"]

    assert note.endswith(f"chgrp -R {group} {spool.paths.outbox}")


def test_a_model_that_is_missing(tmp_path: Path) -> None:
    """An error that a check raises is a bad finding, and the other checks are still made."""
    spool = init_spool(
        tmp_path, **{**SOUND, "model": {"path": str(tmp_path / "model"), "device": "cpu"}}
    )
    (bad,) = graded("bad", spool)

    assert bad[0] == "model"
    assert str(tmp_path / "model") in bad[1]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    """A GPU number beyond those that are there is bad."""
    spool = init_spool(tmp_path, **{**SOUND, "model": {"id": "gradient", "device": "cuda:99"}})

    assert "model.device: cuda:99: no such device" in dict(graded("bad", spool))["device"]


def test_a_daemon_that_runs(owned: Spool) -> None:
    """The process id of the daemon is shown."""
    assert ("daemon", f"running, pid {os.getpid()}") in graded("ok", owned)


def test_a_finding_is_a_line(drawn: Callable[[Callable[[], None]], str]) -> None:
    """On a terminal a finding is one line with columns; its text is neither folded nor read as markup."""
    text = "[x] " + "y" * 100
    line = drawn(lambda: print_finding(Finding("note", "inbox", text)))

    assert line == f"note  inbox         {text}\n"


def test_a_finding_is_a_line_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    """When piped, a finding is grade, thing and text, separated by tabs."""
    print_finding(Finding("bad", "inbox", "gone"))

    assert capsys.readouterr().out == "bad\tinbox\tgone\n"


def test_an_installation_is_not_needed(tmp_path: Path) -> None:
    """Examining makes nothing."""
    list(checks.examine(make_spool(tmp_path).config))

    assert list(tmp_path.iterdir()) == []
