"""An engine without torch, for tests and dry runs: `model: {id: gradient}`.

A word at the start of the prompt scripts a fault, a word in `model.revision` a fault of loading;
`!once-FAULT PATH` does FAULT only if the file PATH does not exist, and creates it first; `!wait PATH`
renders once the file PATH exists; `!note PATH TEXT` appends TEXT to that file, as a line; `!text-FAULT`
does FAULT wherever the text is encoded, when the image is prepared, too.
"""

import ctypes
import hashlib
import os
import pickle
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from promptdrop.config import Config, Prompt
from promptdrop.engines.engine import OnStage, OnStep, warm_up_spec
from promptdrop.errors import EngineError, EngineStartError
from promptdrop.nouns import EngineInfo, ImageSpec, Latency, Rendering

TEMPLATE_TOKENS = 8
BYTES_TWICE = bytes(range(256)) * 2


class GradientEngine:
    """Draws gradients whose colours follow from seed, prompt and size."""

    def __init__(self, config: Config, on_stage: OnStage) -> None:
        on_stage("loading weights")
        _load_fault(config.model.revision or "")
        self._config = config
        self.info = EngineInfo(
            model=config.model.id,
            revision=config.model.revision,
            dtype="float32",
            quantization="none",
            compiled=False,
            device="cpu",
        )

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Render every warm-up size once."""
        fault, _ = _scripted(self._config.model.revision or "")
        _image_fault(fault.removeprefix("warm-"), [])
        for size in self._config.engine.warmup:
            spec = warm_up_spec(self._config, size, "warm up")
            buffer = memoryview(bytearray(spec.height * spec.width * 3))
            self.render([spec], self._config.prompt, lambda step, steps: on_step(), [buffer])

    def render(
        self,
        specs: Sequence[ImageSpec],
        prompt: Prompt,
        on_step: OnStep,
        buffers: Sequence[memoryview],
    ) -> list[Rendering | EngineError]:
        """Render images, or do what their prompts' first words say.

        `!raise` and `!constant` fail their image alone, `!slow SECONDS` slows each step of all,
        `!late-FAULT SECONDS` slows them, too, and does FAULT after the first step; `!together` fails a batch of
        several; all other faults are the whole engine's.
        """
        begun = [
            _begin(spec, prompt, buffer, is_alone=len(specs) == 1)
            for spec, buffer in zip(specs, buffers, strict=True)
        ]
        drawings = [one for one in begun if isinstance(one, _Drawing)]
        step_seconds = max((one.step_seconds for one in drawings), default=0.0)
        marks, evaluations = [time.perf_counter()], specs[0].evaluations
        for step in range(1, evaluations + 1) if drawings else ():
            time.sleep(step_seconds)
            marks.append(time.perf_counter())
            on_step(step, evaluations)
            for one in drawings:
                if step == 1 and one.fault.startswith("late-"):
                    _image_fault(one.fault.removeprefix("late-"), [])
        return [
            _finish(one, marks, len(drawings)) if isinstance(one, _Drawing) else one
            for one in begun
        ]

    def prepare(self, spec: ImageSpec, prompt: Prompt) -> None:
        """Do what `!text-FAULT` says."""
        if spec.prompt.startswith("!text-"):
            fault, arguments = _scripted(spec.prompt)
            with suppress(EngineError):  # raised again, and charged, when the image is begun
                _image_fault(fault.removeprefix("text-"), arguments)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Count a token for each word, and those of a template."""
        return [len(prompt.split()) + TEMPLATE_TOKENS for prompt in prompts]

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""


def fit(text: str, prompt: Prompt) -> str:
    """Cut a text to the words that fit. Raises EngineError: it does not fit and must not be cut."""
    words = list(re.finditer(r"\S+", text))
    room = prompt.max_tokens - TEMPLATE_TOKENS
    if len(words) <= room:
        return text
    if prompt.overflow == "refuse":
        raise EngineError(
            f"prompt: {len(words) + TEMPLATE_TOKENS} tokens with the template;"
            f" expected at most {prompt.max_tokens} (prompt.max_tokens)"
        )
    if prompt.overflow == "keep_head":
        return text[: words[room - 1].end()]
    return text[words[-room].start() :]


@dataclass(frozen=True, slots=True)
class _Drawing:
    """An image that was begun, and the fault that its prompt scripts."""

    spec: ImageSpec
    buffer: memoryview
    text: str
    fault: str
    step_seconds: float
    encode: float  # ms


def _begin(
    spec: ImageSpec, prompt: Prompt, buffer: memoryview, is_alone: bool
) -> _Drawing | EngineError:
    begin = time.perf_counter()
    fault, arguments = _scripted(spec.prompt)
    if fault == "together" and not is_alone:
        raise EngineError("scripted by !together")
    try:
        _image_fault(fault.removeprefix("text-"), arguments)
        text = fit(spec.prompt, prompt)
    except EngineError as e:
        return e
    is_slow = fault == "slow" or fault.startswith("late-")
    step_seconds = float(arguments[0]) if is_slow else 0.0
    encode = (time.perf_counter() - begin) * 1000
    return _Drawing(spec, buffer, text, fault, step_seconds, encode)


def _finish(drawing: _Drawing, marks: list[float], batch: int) -> Rendering | EngineError:
    if drawing.fault == "constant":
        return EngineError("every pixel of the image has the same colour")
    begin = time.perf_counter()
    _paint(drawing.spec, drawing.text, drawing.buffer)
    return Rendering(
        prompt=drawing.text,
        tokens=len(drawing.text.split()) + TEMPLATE_TOKENS,
        truncated=drawing.text != drawing.spec.prompt,
        evaluations=drawing.spec.evaluations,
        latency_ms=Latency(
            encode=drawing.encode,
            denoise=(marks[-1] - marks[0]) * 1000,
            decode=(time.perf_counter() - begin) * 1000,
            transfer=0.0,
        ),
        steps_ms=tuple((b - a) * 1000 for a, b in pairwise(marks)),
        batch=batch,
    )


def _paint(spec: ImageSpec, text: str, buffer: memoryview) -> None:
    """Paint gradients: red and blue across, green the other way, all three down; never one colour."""
    width, height = spec.width, spec.height
    digest = hashlib.sha256(f"{spec.seed} {width}x{height} {text}".encode()).digest()
    red, green, blue, down = digest[:4]
    ramp = bytes(x * 256 // width for x in range(width))  # [width]
    row = bytearray(width * 3)  # [width, 3]
    row[0::3] = ramp.translate(_adding(red))
    row[1::3] = ramp[::-1].translate(_adding(green))
    row[2::3] = ramp.translate(_adding(blue))
    for y in range(height):
        table = _adding(down + y * 256 // height)
        buffer[y * width * 3 : (y + 1) * width * 3] = row.translate(table)


def _adding(offset: int) -> bytes:
    """A table for bytes.translate that adds `offset` modulo 256."""
    return BYTES_TWICE[offset % 256 : offset % 256 + 256]


def _scripted(text: str) -> tuple[str, list[str]]:
    """Return the fault that a text begins with and the words after it; `once-` is resolved here."""
    words = text.split()
    if not words or not words[0].startswith("!"):
        return "", words
    fault, arguments = words[0][1:], words[1:]
    if fault.startswith("once-"):
        try:
            Path(arguments[0]).touch(exist_ok=False)
        except FileExistsError:
            return "", arguments[1:]
        return fault.removeprefix("once-"), arguments[1:]
    return fault, arguments


def _image_fault(fault: str, arguments: list[str]) -> None:
    if fault == "hang":
        _hang()
    elif fault == "wait":
        _wait_for(Path(arguments[0]))
    elif fault == "note":
        with open(arguments[0], "a") as file:
            file.write(" ".join(arguments[1:]) + "\n")
    elif fault == "hang-gil":
        _hang_holding_the_gil()
    elif fault == "raise":
        raise EngineError("scripted by !raise")
    elif fault == "crash":
        os._exit(3)
    elif fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "unknown":
        raise RuntimeError("scripted by !unknown")
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "spin":
        _spin()
    elif fault == "oom":
        _eat_memory()
    elif fault == "write":  # hangs while the file system is frozen
        Path(arguments[0]).write_bytes(b"x")
    elif fault == "close":
        os.close(_pipe())
        _hang()
    elif fault == "half":  # sends the length of a message without the message
        os.write(_pipe(), struct.pack("!i", 1000) + b"half")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "huge":
        os.write(_pipe(), struct.pack("!i", 2**31 - 1))
        _hang()
    elif fault == "garbage":
        os.write(_pipe(), struct.pack("!i", 7) + b"garbage")
        _hang()
    elif fault == "nonsense":
        nonsense = pickle.dumps({"answer": 42})
        os.write(_pipe(), struct.pack("!i", len(nonsense)) + nonsense)
        _hang()


def _load_fault(revision: str) -> None:
    fault, arguments = _scripted(revision)
    if fault == "load-crash":
        os._exit(3)
    elif fault == "load-raise":
        raise EngineStartError("scripted by !load-raise")
    elif fault == "load-linger":
        threading.Thread(target=_hang).start()  # the interpreter waits for it at its end
        raise EngineStartError("scripted by !load-linger")
    elif fault == "load-hang":
        _hang()
    elif fault == "load-slow":
        time.sleep(float(arguments[0]))


def _pipe() -> int:
    """The engine process's end of the pipe to the daemon."""
    return int(sys.argv[1])


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def _spin() -> NoReturn:
    """Loop for ever, as a kernel that never ends looks to its caller: no exception gets through."""
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


def _eat_memory() -> NoReturn:
    eaten = []
    while True:
        eaten.append(bytearray(1 << 24))


def _hang_holding_the_gil() -> None:
    """Lock a default mutex twice: no signal gets a thread out of it (pthread_mutex_lock(3))."""
    mutex = ctypes.create_string_buffer(64)  # zeros: PTHREAD_MUTEX_INITIALIZER
    libc = ctypes.PyDLL(None)  # PyDLL keeps the GIL
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
