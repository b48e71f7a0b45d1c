"""Users for whom permissions count, also when the tests run as root."""

import os
import subprocess
import sys

import pytest

ROOT = os.geteuid() == 0
# root that obeys permissions like everybody else: capabilities(7), CAP_DAC_OVERRIDE
OBEDIENT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if ROOT else []


def obedient() -> list[str]:
    """`python -m promptdrop` for whom permissions count, also when the tests run as root."""
    command = [*OBEDIENT, sys.executable, "-m", "promptdrop"]
    if subprocess.run([*OBEDIENT, "true"], capture_output=True, check=False).returncode:
        pytest.skip("setpriv cannot drop capabilities here")
    return command
