"""The choice of tests for `make quick`, and the guard that keeps slow ones out."""

import subprocess
import sys
from pathlib import Path

import pytest

import quick

SUPPORT = Path(quick.__file__).parent


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import json\nfrom promptdrop import names\n", True),
        ("import torch\n", False),
        ("def test():\n    import diffusers\n", False),
        ("from promptdrop.engines import zimage\n", False),
        ("from promptdrop.engines.gradient import GradientEngine\n", True),
        ("import pytest\npytest.importorskip('triton')\n", False),
        ("def test(daemon):\n    daemon.start()\n", False),
        ("def test(make_daemon):\n    make_daemon()\n", False),
        ("def test(model):\n    assert model.exists()\n", False),
    ],
)
def test_what_is_quick(tmp_path: Path, source: str, expected: bool) -> None:
    """A quick test imports no torch, not even by a module of ours, and has no fixture of daemon or model."""
    file = tmp_path / "test_it.py"
    file.write_text(source)

    assert quick.is_quick(file) == expected


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("import torch", "a quick test imports torch"),
        ("subprocess.run(['python', '-m', 'promptdrop', 'run'])", "a quick test starts a daemon"),
        ("import json; subprocess.run(['true'])", ""),
    ],
)
def test_a_quick_test_that_is_slow_fails(statement: str, said: str) -> None:
    """An audit hook of the process refuses torch and daemons, however the test comes to them."""
    code = f"import subprocess, quick; quick.forbid_what_is_slow(); {statement}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SUPPORT, capture_output=True, text=True, check=False
    )

    assert (done.returncode == 0) == (not said)
    assert said in done.stderr
