"""Promises of SECURITY.md that a machine can check: no pickle from disk, no remote code, pinned hashes."""

import ast
import re
from pathlib import Path

import pytest

from promptdrop import config, config_file

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "daemon" / "promptdrop"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)
UNHASHED = {"torch"}  # its CPU and CUDA builds share a version, not a file


def pins(file: str) -> dict[str, str]:
    """Read pins: the name, spelled as PEP 503 has it -> the version."""
    found = PIN.findall((ROOT / file).read_text())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_every_pin_has_its_hashes() -> None:
    """constraints-hashed.txt says what constraints.txt says; after a change: `make hashes`."""
    pinned = pins("constraints.txt")
    entries = (ROOT / "constraints-hashed.txt").read_text().replace("\\\n", " ").splitlines()

    assert pins("constraints-hashed.txt") == {
        name: version for name, version in pinned.items() if name not in UNHASHED
    }
    assert all("--hash=sha256:" in entry for entry in entries)


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Every call of a function or method of this name in the package."""
    return [
        (file, node)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) == name
    ]


def test_weights_are_safetensors_and_no_code() -> None:
    """Every loading of a model says so; nothing of it may run, or come over the network."""
    loadings = calls("from_pretrained")
    assert loadings
    for file, call in loadings:
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}

        assert words.get("local_files_only") == "True", file
        assert words.get("use_safetensors", "True") == "True", file
        assert "trust_remote_code" not in words, file


def test_nothing_is_unpickled_from_a_disk() -> None:
    """The pipes between daemon, engine and gateway, all ours, are the only pickle there is."""
    readers = {file.name for file, _ in calls("loads") if "pickle" in file.read_text()}

    assert readers <= {"link.py", "backend.py", "gateway.py"}
    assert [call for _, call in calls("load") if "torch" in ast.unparse(call.func)] == []


@pytest.mark.parametrize("name", ["eval", "exec", "os.system", "os.popen"])
def test_nothing_is_evaluated(name: str) -> None:
    """No text becomes code or a shell command."""
    found = [
        (file, call.lineno)
        for file, call in calls(name.rpartition(".")[2])
        if ast.unparse(call.func) == name
    ]

    assert found == []


def test_nothing_listens_by_default() -> None:
    """metrics.listen is off, in the defaults and in the file that init writes."""
    shipped = config_file.load(PACKAGE / "config.yaml")

    assert config.parse({"model": {"id": "x"}}).metrics.listen is None
    assert shipped.metrics.listen is None
