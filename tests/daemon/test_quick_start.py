"""The README's quick start without a GPU, run as written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guide import block


@pytest.mark.timeout(300)
def test_the_quick_start_works(tmp_path: Path) -> None:
    """The commands without a GPU, as written, in an empty folder."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "promptdrop"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m promptdrop "$@"\n')
    program.chmod(0o755)
    path = f"{bin_folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", block("README.md", "quick-start")], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ring.png").stat().st_size > 1000
    assert len(list((tmp_path / "try/spool/outbox").glob("*/job.json"))) == 1
