"""The cache of compiled code on the disk."""

import os
from pathlib import Path

import pytest

from promptdrop.engines import compile_cache


def test_a_cache_is_of_one_model_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of another model that was not used for a week is removed; only the daemon may use the rest."""
    for variable in compile_cache.VARIABLES:
        monkeypatch.delenv(variable, raising=False)  # so that it is put back afterwards
    compile_cache.use(tmp_path, "one", "cpu")
    first = Path(os.environ[compile_cache.VARIABLES[0]])
    (first / "code").touch()
    compile_cache.use(tmp_path, "one", "cpu")

    assert (first / "code").exists()
    assert first.stat().st_mode & 0o077 == 0

    compile_cache.use(tmp_path, "two", "cpu")

    assert len([*tmp_path.iterdir()]) == 2  # an engine of another device may be using it

    os.utime(first, (0, 0))
    compile_cache.use(tmp_path, "two", "cpu")
    second = Path(os.environ[compile_cache.VARIABLES[0]])

    assert [*tmp_path.iterdir()] == [second]
    assert not compile_cache.discard("it is empty")
    (second / "code").touch()
    assert compile_cache.discard("it is broken")
    assert not any(second.iterdir())
