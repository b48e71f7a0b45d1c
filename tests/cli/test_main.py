"""The exit status and message of each kind of error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from promptdrop.cli.main import main
from promptdrop.spool.spool import Spool
from statuses import write_status


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """The configuration of the fixture `spool`."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"root": "spool", "model": {"id": "gradient"}}))
    return str(file)


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("status --config nosuch.yaml", 78, "promptdrop: nosuch.yaml"),
        ("submit --prompt a --folder ../b --config CONFIG", 2, "never enters a folder of this name"),
        ("submit --prompt a --folder /b --config CONFIG", 2, "expected a sub-folder of the inbox"),
        ("submit nosuch.txt --config CONFIG", 1, "promptdrop: nosuch.txt: No such file"),
        ("submit a.gif --config CONFIG", 2, "a.gif: not a job file's name"),
        ("submit a.txt --steps 4 --config CONFIG", 2, "--steps goes with --prompt"),
        ("retry --config CONFIG", 2, "expected a NAME, or --all"),
        ("cancel nosuch --config CONFIG", 2, "nosuch: no such job in hand"),
        ("cluster status --config CONFIG", 78, "no cluster is configured"),
        ("model path nosuch/model", 78, "nosuch/model"),
    ],
)  # fmt: skip
def test_an_error_is_a_line_and_a_status(
    spool: Spool,
    config_file: str,
    capsys: pytest.CaptureFixture[str],
    line: str,
    status: int,
    words: str,
) -> None:
    """1 is failure, 2 wrong usage, 78 a wrong configuration; stderr says why, stdout stays empty."""
    ended = main([config_file if word == "CONFIG" else word for word in line.split()])
    said = capsys.readouterr()

    assert ended == status
    assert said.err.startswith("promptdrop: ")
    assert words in said.err
    assert said.out == ""


def test_names_cannot_harm_a_terminal(
    spool: Spool, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters of a name are escaped in an error."""
    main(["cancel", "a\x1b[2J", "--config", config_file])

    assert "a\\x1b[2J: no such job" in capsys.readouterr().err


def test_nobody_reads_on(owned: Spool, config_file: str) -> None:
    """`promptdrop status | head` ends well once head has gone."""
    write_status(owned.paths.status)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "promptdrop", "status", "--config", config_file]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)

    assert (done.returncode, done.stderr) == (0, b"")


def test_control_c_ends_a_command(owned: Spool, config_file: str) -> None:
    """SIGINT ends a command with 130 and without a traceback."""
    write_status(owned.paths.status)
    command = [sys.executable, "-m", "promptdrop", "status", "--watch", "--config", config_file]
    with subprocess.Popen(
        ["env", "--default-signal=INT", *command],  # a shell ignores it in what runs behind it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()

    assert (process.returncode, said) == (130, "")
