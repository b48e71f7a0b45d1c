"""The files in systemd/: systemd accepts them, their sandbox scores well, the template is the service."""

import re
import subprocess
from pathlib import Path

import pytest

from harness import REPOSITORY, needs_systemd_analyze

SYSTEMD = REPOSITORY / "systemd"


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["promptdrop.service", "promptdrop@.service"])
def test_the_units_are_clean(tmp_path: Path, name: str) -> None:
    """`systemd-analyze verify` has nothing to say (it returns 0 on unknown keys)."""
    copy = tmp_path / name
    text = (SYSTEMD / name).read_text()
    copy.write_text(text.replace("/opt/promptdrop/.venv/bin/promptdrop", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_keeps_the_contract() -> None:
    """Type=notify, no restart on 75 and 78, reload by SIGHUP, a watchdog, time to stop."""
    lines = (SYSTEMD / "promptdrop.service").read_text().splitlines()

    for wanted in (
        "Type=notify",
        "RestartPreventExitStatus=75 78",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "WatchdogSec=60",
        "TimeoutStopSec=60",
    ):
        assert wanted in lines


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["promptdrop.service", "promptdrop@.service"])
def test_the_sandbox_scores_at_most_one(tmp_path: Path, name: str) -> None:
    """`systemd-analyze security`: 1.0 of 10 is what a service that needs a GPU can reach."""
    copy = tmp_path / name.replace("@", "@gpu0")
    copy.write_text(
        (SYSTEMD / name).read_text().replace("/opt/promptdrop/.venv/bin/promptdrop", "/bin/true")
    )
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=10", str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout


def test_the_template_is_the_service() -> None:
    """promptdrop@.service differs only where its name, configuration and folder stand."""
    single, template = (
        (SYSTEMD / name).read_text().splitlines()[2:]
        for name in ("promptdrop.service", "promptdrop@.service")
    )
    different = [line for line, other in zip(template, single, strict=True) if line != other]

    assert len(different) == 4
    assert all("%i" in line for line in different)


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["promptdrop-ray-head.service", "promptdrop-ray-worker.service"])
def test_the_units_of_a_cluster(tmp_path: Path, name: str) -> None:
    """Hardened as far as a network allows, a token asked for, no statistics, no dashboard, no open port."""
    text = (SYSTEMD / name).read_text()
    copy = tmp_path / name
    copy.write_text(text.replace("/opt/promptdrop/.venv/bin/ray", "/bin/true"))
    score = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(copy)]
    verify = ["systemd-analyze", "verify", "--man=no", str(copy)]
    scored = subprocess.run(score, capture_output=True, text=True, check=False)
    verified = subprocess.run(verify, capture_output=True, text=True, check=False)

    assert scored.returncode == 0, scored.stdout
    assert (verified.returncode, verified.stderr) == (0, "")
    for wanted in (
        "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/etc/promptdrop/ray.token", "--block",
        "RAY_USAGE_STATS_ENABLED=0", "--disable-usage-stats", "--node-manager-port=6380",
        "--object-manager-port=6381", "--min-worker-port=6400", "KillMode=control-group",
    ):  # fmt: skip
        assert wanted in text
    assert "ray stop" not in re.sub(r"#.*", "", text)
