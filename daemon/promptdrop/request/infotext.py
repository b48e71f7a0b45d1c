"""Write and read A1111's infotext, the text in a picture that every Stable Diffusion tool knows.

Grammar: modules/infotext_utils.py and processing.create_infotext of
https://github.com/AUTOMATIC1111/stable-diffusion-webui (1.10).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SAMPLERS = {  # A1111's name of each scheduler
    "euler": "Euler",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "heun": "Heun",
}
_NEGATIVE = "Negative prompt:"
_RUN = re.compile(r"([\w \-/]++)(:?)")  # a key is such a run before a colon; possessive: linear
_QUOTED = re.compile(r'\s*("(?:[^\\"]|\\.)++")(?:,|$)')
_BARE = re.compile(r"\s*+([^,]*+),?")


@dataclass(frozen=True, slots=True)
class ParsedInfotext:
    """The parts of an infotext. `fields`: the line of settings as text, in its order."""

    prompt: str
    negative_prompt: str | None
    fields: dict[str, str] = field(default_factory=dict)


def format_infotext(prompt: str, negative_prompt: str | None, fields: Mapping[str, object]) -> str:
    """Write the infotext of an image, `fields` in their order without those that are None.

    `parse_infotext` returns the same fields, and the prompts with every line stripped and without
    blank lines at the beginning. As in A1111, a line of the prompt that begins with `Negative prompt:`
    is read as negative prompt, and such a line of the negative prompt loses those words. A line like
    `Steps: 9` in a prompt stays there, as only the last line is settings.
    """
    settings = ", ".join(
        f"{key}: {_quote(value)}" for key, value in fields.items() if value is not None
    )
    negative = f"\n{_NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{settings}".strip()


def parse_infotext(text: str) -> ParsedInfotext | None:
    """Read an infotext; None if its last line is no line of settings.

    A line of settings has `Steps` and `Sampler`, or three settings, which is A1111's own rule.
    """
    *lines, last = text.strip().split("\n")
    fields = parse_settings(last)
    if len(fields) < 3 and not {"Steps", "Sampler"} <= fields.keys():
        return None
    prompt: list[str] = []
    negative: list[str] = []
    part = prompt
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            part = negative
            line = line[len(_NEGATIVE) :].strip()
        if line or part:
            part.append(line)
    return ParsedInfotext("\n".join(prompt), "\n".join(negative) or None, fields)


def parse_settings(line: str) -> dict[str, str]:
    """Read `Steps: 9, Model: "a, b"` as {"Steps": "9", "Model": "a, b"}; a repeated key has its last value."""
    return dict(_settings(line))


def _settings(line: str) -> Iterator[tuple[str, str]]:
    position = 0
    while run := _RUN.search(line, position):
        position = run.end()
        key = run[1].lstrip(" -/")
        if run[2] and len(key) > 1:
            value = _QUOTED.match(line, position) or _BARE.match(line, position)
            assert value is not None  # _BARE matches any text
            position = value.end()
            yield key, _unquote(value[1].strip())


def _quote(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


def _unquote(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
