"""The demonstration model that ships: it is whole and small, and draws what its prompts say."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from demo_model.evaluate import Case, draw, held_out_cases, load, round_trip_psnr
from demo_model.judge import Seen, is_right, look
from demo_model.world import Scene, Thing
from engines import configured, rendered
from harness import REPOSITORY
from promptdrop import weights
from promptdrop.config import Prompt
from promptdrop.engines.zimage import ZImageEngine
from specs import spec

MOST_BYTES = 16_000_000
LEAST_RIGHT = 10  # of 12 held-out prompts; the seeds are fixed
RED_CIRCLE = Scene((Thing("red", "circle"),), "white")
BLUE_STAR = Scene((Thing("blue", "star"),), "yellow")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are quickest on one thread, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    """diffusers' own pipeline on the model as it ships."""
    return load(weights.DEMO, torch.float32)


def red_circle(seed: int) -> Case:
    return Case("", "a red circle", Scene(()), 128, 128, seed)


def things(seen: Seen) -> list[Thing]:
    return [Thing(t.thing.colour, t.thing.shape) for t in seen.things]


def test_the_model_is_whole_and_small() -> None:
    """Every file that model_index.json and the weights' indexes name is there, in 16 MB at most."""
    assert not weights.missing_files(weights.DEMO)
    assert sum(f.stat().st_size for f in weights.DEMO.rglob("*") if f.is_file()) <= MOST_BYTES


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder)
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "daemon", folder / "daemon", ignore=no_bytecode)
    return folder


def pip(*arguments: str | Path) -> None:
    """Run pip, offline: hatchling is the one installed."""
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    subprocess.run([sys.executable, "-m", "pip", *arguments, *options], check=True)


@pytest.mark.parametrize("editable", [[], ["--editable"]])
def test_installing_leaves_nothing_in_the_checkout(
    tmp_path: Path, checkout: Path, editable: list[str]
) -> None:
    """Leftovers of a build would be packed into the next wheel, including modules removed since."""
    before = contents(checkout)
    pip("install", "--target", tmp_path, *editable, checkout)

    assert contents(checkout) == before
    assert list(tmp_path.glob("promptdrop-*.dist-info"))


def test_a_wheel_carries_the_model(tmp_path: Path, checkout: Path) -> None:
    """`model demo` of an installed wheel writes every byte of it, and imports no torch."""
    pip("wheel", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    script = (
        "import sys; from promptdrop.cli import main; assert main.main() == 0;"
        " print(main.__file__, 'torch' in sys.modules)"
    )
    written = subprocess.run(
        [sys.executable, "-c", script, "model", "demo", "copied"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip

    assert written.stdout.splitlines()[-1] == f"{tmp_path}/site/promptdrop/cli/main.py False"
    assert contents(tmp_path / "copied") == contents(weights.DEMO)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, by its place there."""
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_out_prompts_are_drawn(dtype: torch.dtype) -> None:
    """Prompts of both kinds and languages that training never saw come out right, in either precision."""
    kinds = ("one object", "two objects")
    cases = [c for c in held_out_cases(500) if c.kind in kinds and c.height * c.width < 40000]
    english = [c for c in cases if c.text.isascii()]
    chinese = [c for c in cases if not c.text.isascii()]
    chosen = english[:4] + english[-2:] + chinese[:4] + chinese[-2:]
    pipe = load(weights.DEMO, dtype)
    right = sum(is_right(look(draw(pipe, [case])[0]), case.asked) for case in chosen)

    assert pipe.transformer.dtype == dtype
    assert right >= LEAST_RIGHT


def test_a_seed_is_a_picture(pipe: ZImagePipeline) -> None:
    """The same seed gives the same pixels, another seed another picture."""
    first, again, other = (draw(pipe, [red_circle(seed)]) for seed in (1, 1, 2))

    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 1


def test_a_batch_draws_what_singles_draw(pipe: ZImagePipeline) -> None:
    """Prompts drawn together are the pictures they are alone, but for rounding."""
    cases = [c for c in held_out_cases(500) if (c.height, c.width) == (128, 128)][:3]
    together = draw(pipe, cases)
    alone = np.concatenate([draw(pipe, [case]) for case in cases])

    assert [things(look(pixels)) for pixels in together] == [things(look(p)) for p in alone]
    assert np.abs(together.astype(int) - alone).mean() < 1


def test_the_vae_keeps_pictures(pipe: ZImagePipeline) -> None:
    """Encoding and decoding a held-out picture keeps 35 dB or more."""
    assert round_trip_psnr(pipe, count=8, side=160) >= 35


@pytest.mark.parametrize(
    ("overflow", "kept"), [("keep_head", RED_CIRCLE), ("keep_tail", BLUE_STAR)]
)
def test_truncation_keeps_the_end_it_names(overflow: str, kept: Scene) -> None:
    """If a prompt is too long, keep_head draws its beginning and keep_tail its end."""
    engine = ZImageEngine(configured(engine={"warmup": []}), lambda stage: None)
    text = "a red circle on a white background" + " a" * 40 + " a blue star on a yellow background"
    prompt = Prompt.model_validate({"max_tokens": 21, "overflow": overflow})
    long = spec(prompt=text, width=128, height=128, steps=9)
    rendering, pixels = rendered(engine, long, prompt)

    assert rendering.truncated
    assert is_right(look(pixels), kept)
