"""The engine without a model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from promptdrop import config as configuration
from promptdrop.config import Config, Prompt
from promptdrop.engines import engine
from promptdrop.engines.gradient import GradientEngine
from promptdrop.errors import EngineError, EngineStartError
from promptdrop.nouns import ImageSpec, Rendering
from specs import spec

CAT = spec(prompt="a cat", width=256, height=128, steps=3)


def configured(revision: str | None = None) -> Config:
    model = {"id": "gradient", "revision": revision}
    return configuration.parse({"model": model, "engine": {"warmup": ["64x64"]}})


def rendered(spec: ImageSpec, prompt: Prompt | None = None) -> tuple[Rendering, bytes]:
    loaded = engine.load(configured(), lambda stage: None)
    pixels = bytearray(spec.width * spec.height * 3)
    rendering = engine.render_one(
        loaded, spec, prompt or Prompt(), lambda *step: None, memoryview(pixels)
    )
    return rendering, bytes(pixels)


def test_the_same_job_gives_the_same_pixels() -> None:
    """Pixels follow from seed, prompt and size, and are never of one colour."""
    rendering, pixels = rendered(CAT)

    assert pixels == rendered(CAT)[1]
    assert pixels != rendered(CAT._replace(seed=8))[1]
    assert pixels != rendered(CAT._replace(prompt="a dog"))[1]
    assert len({pixels[i : i + 3] for i in range(0, len(pixels), 3)}) > 100
    assert (rendering.evaluations, len(rendering.steps_ms), rendering.tokens) == (3, 3, 10)


def test_every_step_is_reported() -> None:
    """Each step of an image and of the warm-up is reported."""
    loaded = engine.load(configured(), lambda stage: None)
    steps: list[tuple[int, int]] = []
    pixels = memoryview(bytearray(CAT.width * CAT.height * 3))
    loaded.render([CAT], Prompt(), lambda step, of: steps.append((step, of)), [pixels])
    signs: list[None] = []
    loaded.warm_up(lambda: signs.append(None))

    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(signs) == 9


@pytest.mark.parametrize(
    ("overflow", "kept"),
    [("keep_head", "w0 w1 w2 w3 w4 w5 w6 w7"), ("keep_tail", "w2 w3 w4 w5 w6 w7 w8 w9")],
)
def test_overflow(overflow: str, kept: str) -> None:
    """A text is cut by its tokens, of which each word is one and the template eight."""
    prompt = Prompt.model_validate({"max_tokens": 16, "overflow": overflow})
    rendering, _ = rendered(CAT._replace(prompt=" ".join(f"w{i}" for i in range(10))), prompt)

    assert (kept, 16, True) == (rendering.prompt, rendering.tokens, rendering.truncated)


def test_refuse() -> None:
    """With overflow: refuse, a prompt that is too long fails its image."""
    prompt = Prompt(max_tokens=16, overflow="refuse")
    with pytest.raises(EngineError, match="18 tokens"):
        rendered(CAT._replace(prompt="w " * 10), prompt)


@pytest.mark.parametrize("fault", ["!raise", "!constant"])
def test_scripted_failures_leave_the_engine_good(fault: str) -> None:
    """A fault that raises EngineError fails this image only."""
    with pytest.raises(EngineError):
        rendered(CAT._replace(prompt=f"{fault} a cat"))


def test_unknown_trouble_is_no_engine_error() -> None:
    """An unknown error is not turned into an EngineError, so that it ends the process."""
    with pytest.raises(RuntimeError):
        rendered(CAT._replace(prompt="!unknown"))


def test_once(tmp_path: Path) -> None:
    """A fault with `once-` happens at the first attempt only."""
    spec = CAT._replace(prompt=f"!once-raise {tmp_path / 'first'} a cat")
    with pytest.raises(EngineError):
        rendered(spec)

    assert rendered(spec)[0].evaluations == 3


@pytest.mark.parametrize(
    ("fault", "status"),
    [("!crash", 3), ("!segfault", -signal.SIGSEGV), ("!hang-gil", -signal.SIGKILL)],
)
def test_faults_that_end_the_process(fault: str, status: int) -> None:
    """Each fault ends the process as scripted; after `!hang-gil` only SIGKILL ends it."""
    code = (
        "import signal\n"
        "from promptdrop.engines import gradient\n"
        "signal.signal(signal.SIGALRM, lambda *_: exit(9))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.2)\n"
        f"gradient._image_fault({fault[1:]!r}, [])"
    )
    try:
        ended = subprocess.run([sys.executable, "-c", code], timeout=2).returncode
    except subprocess.TimeoutExpired:  # run() has killed it
        ended = -signal.SIGKILL

    assert status == ended


def test_load_faults() -> None:
    """A word in model.revision scripts a fault of loading."""
    with pytest.raises(EngineStartError):
        GradientEngine(configured("!load-raise"), lambda stage: None)
    GradientEngine(configured("!load-slow 0.01"), lambda stage: None)


def test_stop_waits_for_sigcont() -> None:
    """`!stop` stops the process, as a debugger or a frozen cgroup does."""
    code = "from promptdrop.engines import gradient; gradient._image_fault('stop', [])"
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGCONT)

    assert os.WIFSTOPPED(status)
    assert process.wait(10) == 0
