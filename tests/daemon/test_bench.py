"""`bench`: times the configuration with an engine of its own."""

import pytest

from harness import Daemon


def test_bench_times_the_configuration(daemon: Daemon) -> None:
    """It prints what was rendered, the rate, and quantiles of each part; nothing goes to the spool."""
    done = daemon.run("bench", "--images", "5", "--size", "128x64")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    table = {name: figures for name, *figures in rows}

    assert done.returncode == 0, done.stderr
    assert (table["size"], table["images"], table["evaluations"]) == (["128x64"], ["5"], ["3"])
    assert float(table["images/s"][0]) > 0
    assert table["ms"] == ["p50", "p95", "p99"]
    for part in ("encode", "denoise", "one evaluation", "decode", "transfer", "render"):
        p50, p95, p99 = map(float, table[part])
        assert 0 <= p50 <= p95 <= p99
    assert daemon.tree() == []


@pytest.mark.parametrize(("images", "size"), [("0", "64x64"), ("1", "65x64"), ("1", "64")])
def test_bench_refuses_what_no_job_may_ask_for(daemon: Daemon, images: str, size: str) -> None:
    """It is wrong usage, found before anything is loaded."""
    done = daemon.run("bench", "--images", images, "--size", size)

    assert done.returncode == 2
    assert (images if images == "0" else size) in done.stderr
