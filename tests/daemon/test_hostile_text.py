"""Names, prompts and reasons that want to command a terminal, through every command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import Daemon, MakeDaemon
from hostile import HOSTILE, HOSTILE_NAME, harm, on_terminal
from promptdrop.cli.parser import COMMANDS, Command
from promptdrop.spool.spool import Spool
from spools import claimed_job, finish, init_spool, refuse
from statuses import ENGINE, IDLE, end, image

# Every command, with arguments that make it show what others, or its user, have named. SCENE is the
# folder of the scene; `!` before a word: nothing hostile is shown, since it shows nothing of others.
LINES = [
    f"init SCENE/{HOSTILE_NAME}",
    f"init SCENE/new --model {HOSTILE_NAME}",
    f"run --config SCENE/{HOSTILE_NAME}",
    f"run --{HOSTILE_NAME}",
    f"generate cat -o SCENE/{HOSTILE_NAME}.gif",
    f"generate cat --steps {HOSTILE_NAME}",
    f"generate cat --size {HOSTILE_NAME}",
    f"submit SCENE/{HOSTILE_NAME}.txt",
    f"submit SCENE/{HOSTILE_NAME}.gif",
    f"submit SCENE/gone{HOSTILE_NAME}.txt",
    f"submit --prompt cat --folder {HOSTILE_NAME}",
    f"submit --prompt {HOSTILE_NAME} --folder link{HOSTILE_NAME}",
    f"check SCENE/{HOSTILE_NAME}.txt",
    f"check SCENE/bad{HOSTILE_NAME}.txt SCENE/gone{HOSTILE_NAME}.txt",
    "status",
    "status --json",
    "status --watch",
    "status --watch --json",
    "retry --all",
    f"retry refused{HOSTILE_NAME}.txt",
    f"retry {HOSTILE_NAME}",
    f"retry gone{HOSTILE_NAME}",
    f"cancel a{HOSTILE_NAME}.txt",
    f"cancel twice{HOSTILE_NAME}.txt",
    f"cancel gone{HOSTILE_NAME}",
    f"pause --config SCENE/{HOSTILE_NAME}",
    "!pause",
    f"resume --config SCENE/{HOSTILE_NAME}",
    "!resume",
    "doctor",
    f"doctor {HOSTILE_NAME}",
    "!cluster status",
    f"cluster status --{HOSTILE_NAME}",
    f"cluster release --{HOSTILE_NAME}",
    f"model demo SCENE/{HOSTILE_NAME}/m",
    f"model fetch x --hub {HOSTILE_NAME}",
    f"model fetch {HOSTILE_NAME}",
    f"model path {HOSTILE_NAME}/m",
    f"schema {HOSTILE_NAME}",
    "!schema status",
    f"bench --size {HOSTILE_NAME}",
    HOSTILE_NAME,
]
NO_CONFIG = ("init", "model", "schema", HOSTILE_NAME)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Path]:
    """A spool in which everything has a hostile name or reason, and whose daemon seems to run."""
    spool = init_spool(
        tmp_path, root=str(tmp_path / f"spool{HOSTILE}"), limits={"min_free_disk_mib": 0}
    )
    config = {"root": str(spool.paths.root), "model": {"id": "gradient", "device": "cpu"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / f"{HOSTILE_NAME}.txt").write_text(
        "a cat\n" + HOSTILE.replace("\n", "\\n").replace("\x85", "")
    )
    (tmp_path / f"bad{HOSTILE_NAME}.txt").write_text(f"--{HOSTILE} 1\n--size {HOSTILE}\n")
    (spool.paths.inbox / f"link{HOSTILE_NAME}").symlink_to("nowhere")
    (spool.paths.inbox / f"{HOSTILE_NAME}.txt").mkdir()
    fill_failed(spool)
    claimed_job(spool, f"a{HOSTILE_NAME}.txt")
    for _ in range(2):
        claimed_job(spool, f"twice{HOSTILE_NAME}.txt")
    spool.paths.status.write_text(json.dumps(hostile_status()))
    spool.lock.acquire()
    yield tmp_path
    spool.lock.release()


def fill_failed(spool: Spool) -> None:
    """Put files into failed/ whose records, outbox folders and reasons are hostile."""
    refuse(spool, f"refused{HOSTILE_NAME}.txt", HOSTILE)
    for n in range(2):
        job = claimed_job(spool, f"failed{n}{HOSTILE_NAME}.txt")
        finish(spool, job, HOSTILE)
        record = spool.paths.failed / f"failed{n}{HOSTILE_NAME}.txt.error.json"
        document = {**json.loads(record.read_bytes()), "folder": HOSTILE_NAME, "error": HOSTILE}
        record.write_text(json.dumps(document))
    refuse(spool, f"torn{HOSTILE_NAME}.txt", "x")
    (spool.paths.failed / f"torn{HOSTILE_NAME}.txt.error.json").write_text('{"id": []}')


def hostile_status() -> dict[str, Any]:
    """A status in which every text is hostile."""
    engine = {**ENGINE, "current": {**image(HOSTILE), "job": HOSTILE}}
    engine |= dict.fromkeys(
        ("name", "stage", "model", "device", "dtype", "host", "reason"), HOSTILE
    )
    lists = {"waiting": [{"file": HOSTILE, "why": HOSTILE}], "engines": [engine, engine]}
    lists["stuck"] = lists["waiting"]
    finished = [end(HOSTILE, "failed", error=HOSTILE, folder=HOSTILE)]
    texts = {"state": HOSTILE, "reason": HOSTILE, "watch": HOSTILE, "new": [HOSTILE_NAME]}
    return {**IDLE, **lists, **texts, "finished": finished}


def command(line: str, scene: Path) -> list[bytes]:
    """The words of a command line; each hostile text is one."""
    words = [
        word.replace("\0", HOSTILE_NAME) for word in line.replace(HOSTILE_NAME, "\0").split(" ")
    ]
    if words[0] not in NO_CONFIG and "--config" not in words:
        words += ["--config", "SCENE/config.yaml"]
    words = [sys.executable, "-m", "promptdrop", *(w.replace("SCENE", str(scene)) for w in words)]
    return [os.fsencode(word) for word in words]


def output_of(
    words: list[str] | list[bytes], where: str, enough: bytes = b"", cwd: Path | None = None
) -> bytes:
    """Run a command, piped or on a terminal, and return all that it writes; see `on_terminal`."""
    env = {**os.environ, "PYTHONUTF8": "1"}
    if where == "terminal":
        return on_terminal(words, enough, env=env, cwd=cwd)
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.run(words, stdout=pipe, stderr=both, env=env, cwd=cwd, check=False).stdout


def test_every_command_is_there() -> None:
    """No command is left out."""
    names = {line.lstrip("!").split(" ")[0] for line in LINES}

    assert {entry.name for entry in COMMANDS} <= names
    for entry in COMMANDS:
        if not isinstance(entry, Command):
            lines = [line.lstrip("!") for line in LINES]
            assert all(
                any(x.startswith(f"{entry.name} {a.name}") for x in lines) for a in entry.actions
            )


@pytest.mark.parametrize("where", ["piped", "terminal"])
@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line)[:40])
def test_no_text_harms_a_terminal(scene: Path, line: str, where: str) -> None:
    """Of all that a command prints, only its own styles, line breaks and tabs are for the terminal; no
    text makes a line of its own; names that were shown escaped stay readable."""
    words, is_endless = command(line.lstrip("!"), scene), "--watch" in line
    words = [b"timeout", b"-s", b"INT", b"2", *words] if is_endless and where == "piped" else words
    output = output_of(words, where, b"FAKED" if is_endless else b"", cwd=scene)

    assert harm(output, where == "terminal") == ""
    assert b"Traceback" not in output
    assert (b"x1b]0;owned" in output or b"u001b]0;owned" in output) == (not line.startswith("!"))
    assert b"\\\\x1b" not in output or "--json" in line


# --- a daemon at work ---------------------------------------------------------------------------


def drop_hostile(daemon: Daemon) -> None:
    """Drop a job that is rendered, one that fails and one that is refused, all with hostile names."""
    folder = daemon.inbox / HOSTILE_NAME
    folder.mkdir()
    for name, text in (("good", "a cat\n"), ("bad", "!raise\n"), ("ugly", f"--{HOSTILE}\n")):
        (folder / f"{name}{HOSTILE_NAME}.txt").write_text(text)


@pytest.mark.parametrize("where", ["piped", "terminal"])
def test_the_table_of_a_drain(make_daemon: MakeDaemon, where: str) -> None:
    """Its rows, its bar and the log have escaped names."""
    daemon = make_daemon({"engine": {"max_attempts": 1}, "log": {"format": "json"}})
    drop_hostile(daemon)
    output = output_of(daemon.command("run", "--drain"), where, cwd=daemon.home)

    assert harm(output, where == "terminal") == ""
    assert all(word in output for word in (b"good", b"bad", b"refused: ", b"\\x1b]0;owned"))


@pytest.mark.parametrize("where", ["piped", "terminal"])
def test_who_waits_for_a_job(make_daemon: MakeDaemon, tmp_path: Path, where: str) -> None:
    """The bar and the outcome of `submit --wait` and `generate` are escaped."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.start().until_ready()
    files = [tmp_path / f"{name}{HOSTILE_NAME}.txt" for name in ("good", "bad")]
    for path, text in zip(files, ("a cat\n", "!raise\n"), strict=True):
        path.write_text(text)
    picture = tmp_path / f"{HOSTILE_NAME}.png"
    submitted = output_of(daemon.command("submit", "--wait", *map(str, files)), where)
    generated = output_of(daemon.command("generate", "a cat", "-o", str(picture)), where)

    for output in (submitted, generated):
        assert harm(output, where == "terminal") == ""
        assert b"\\x1b]0;owned" in output
    assert picture.exists(), generated
    assert daemon.stop() == 0
