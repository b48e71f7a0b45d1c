"""The time limit of images, by the time in which the engine's process could work on them."""

import subprocess
import sys
import time

import pytest

from promptdrop.engines.alarm import Alarm
from promptdrop.errors import ImageTimeout

HOLDS_THE_GIL = """
from promptdrop.engines.alarm import Alarm
from promptdrop.errors import ImageTimeout
try:
    with Alarm(1):
        sum(range(200_000_000))  # one C call of seconds, in which no signal handler runs
        print("went on")
except ImageTimeout:
    print("alarm")
"""


def test_an_alarm_ends_its_block() -> None:
    """After its seconds, neither sooner nor much later."""
    began = time.monotonic()
    with pytest.raises(ImageTimeout), Alarm(0.3) as alarm:
        time.sleep(60)

    assert 0.29 < time.monotonic() - began < 30
    assert alarm.is_over


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    """Nothing rings afterwards."""
    with Alarm(0.1) as alarm:
        pass
    time.sleep(0.15)

    assert not alarm.is_over


def test_a_c_call_that_holds_the_gil_is_no_excuse() -> None:
    """The rings that come meanwhile count, though no handler of Python's can run."""
    command = [sys.executable, "-c", HOLDS_THE_GIL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout == "alarm\n"
