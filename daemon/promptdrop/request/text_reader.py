"""Read .txt and .prompt: a prompt per line, lines of arguments, or one infotext of A1111."""

import re
from collections.abc import Iterator

from promptdrop.errors import Problem, RequestError
from promptdrop.fields import TEXT_FIELDS
from promptdrop.nouns import SCHEDULERS
from promptdrop.request.infotext import SAMPLERS, ParsedInfotext, parse_infotext, parse_settings
from promptdrop.request.problems import Problems, short
from promptdrop.yaml12 import Mapping, Node, Scalar

ALIASES = {
    "cfg_scale": "guidance_scale",
    "sampler_name": "scheduler",
    "n_iter": "count",
    "batch_size": "count",
}
SETTINGS = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size"}

_SCHEDULES = re.compile(
    r"( (automatic|karras|exponential|polyexponential|(sgm |ddim )?uniform|simple|normal|beta"
    r"|kl optimal|align your steps))+$"
)  # https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.0/modules/sd_schedulers.py
_ARGUMENTS = re.compile(r"--[A-Za-z]")
_KEY = re.compile(r"--([A-Za-z][\w.-]*+)(=?)(.*)", re.DOTALL)
_WORD = re.compile(r"""(?:[^\s'"\\]++|\\.|'[^']*+'|"(?:[^"\\]|\\.)*+")++""")
_PIECE = re.compile(r"""\\(.)|'([^']*+)'|"((?:[^"\\]|\\.)*+)"|([^'"\\]++)""")


def text_documents(text: str, problems: Problems) -> Iterator[Node]:
    """Read one mapping per line. Numbers stay text here; yaml12 resolves them."""
    parsed = parse_infotext(text)
    if parsed and {"Steps", "Sampler"} <= parsed.fields.keys():
        yield _infotext_document(text, parsed, problems)
        return
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line == "#" or line.startswith(("# ", "#\t")):
            continue
        if not _ARGUMENTS.match(line):
            yield _mapping({"prompt": Scalar(line, False, number)}, number)
            continue
        try:
            yield _arguments_document(line, number)
        except RequestError as e:
            for problem in e.problems:
                problems.add(problem.message, problem.line, problem.field)


def scheduler_of(sampler: str) -> str | None:
    """Return the scheduler that A1111 calls `sampler`: dpmpp_2m for `DPM++ 2M Karras`; None: unknown."""
    name = _SCHEDULES.sub("", " ".join(sampler[:100].lower().split()))
    known = {title.lower(): scheduler for scheduler, title in SAMPLERS.items()}
    return known.get(name) or (name if name in SCHEDULERS else None)


def words(line: str) -> list[str]:
    """Split a line into words, quoted as in a POSIX shell (2.2 Quoting of XCU); nothing is expanded.

    shlex.split gives the same words, but takes minutes for a word of 1 MiB.
    Raises ValueError: a quote is not closed, or nothing follows the last backslash.
    """
    found, position = [], 0
    while position < len(line):
        if line[position].isspace():
            position += 1
        elif word := _WORD.match(line, position):
            found.append("".join(_unquoted(piece) for piece in _PIECE.finditer(word[0])))
            position = word.end()
        elif line[position] == "\\":
            raise ValueError("nothing follows the last backslash")
        else:
            rest = short(line[position : position + 30], 20)
            raise ValueError(f"the quote at column {position + 1} is not closed: {rest}")
    return found


def _unquoted(piece: re.Match[str]) -> str:
    escaped, single, double, bare = piece.groups()
    if double is not None:
        return re.sub(r'\\(["\\])', r"\1", double)
    return escaped or single or bare or ""


def _arguments_document(line: str, number: int) -> Mapping:
    try:
        rest = words(line)
    except ValueError as e:
        raise RequestError([Problem(str(e), number)]) from None
    items: dict[str, Node] = {}
    spelled: dict[str, str] = {}
    rest.reverse()
    while rest:
        name, value = _argument(rest, number)
        key = ALIASES.get(name, name)
        if key in items:
            both = " and ".join(dict.fromkeys((short(spelled[key]), short(name))))
            raise RequestError([Problem(f"{key[:60]} is given twice, as {both}", number, key[:60])])
        spelled[key] = name
        if name == "sampler_name":
            value = _scheduler(name, value, number)
        items[key] = Scalar(value, key not in TEXT_FIELDS and value != "", number)
    return _mapping(items, number)


def _argument(rest: list[str], number: int) -> tuple[str, str]:
    """Take one `--key value` or `--key=value` from the end of `rest`."""
    word = rest.pop()
    match = _KEY.fullmatch(word)
    if not match:
        message = f"unexpected {short(word)}; put a text with blanks into double quotes"
        raise RequestError([Problem(message, number)])
    name = match[1].replace("-", "_")
    if match[2]:
        return name, match[3]
    if match[3] or not rest or _ARGUMENTS.match(rest[-1]):
        raise RequestError([Problem(f"{short(word)} needs a value", number, name[:60])])
    return name, rest.pop()


def _infotext_document(text: str, parsed: ParsedInfotext, problems: Problems) -> Mapping:
    lines = text.rstrip().split("\n")
    last = len(lines)
    for line in lines[:-1]:
        if line.startswith("Steps:") and "Sampler" in parse_settings(line):
            problems.add("a second infotext in one file; put each into a file of its own", last)
            break
    items: dict[str, Node] = {"prompt": Scalar(parsed.prompt, False, 1)}
    if parsed.negative_prompt:
        number = next(
            n for n, line in enumerate(lines, 1) if line.strip().startswith("Negative prompt:")
        )
        items["negative_prompt"] = Scalar(parsed.negative_prompt, False, number)
    for setting, key in SETTINGS.items():
        value = parsed.fields.get(setting)
        if value and not (key == "seed" and value == "-1"):  # A1111's -1: a new seed
            items[key] = Scalar(value, key not in TEXT_FIELDS, last)
    try:
        scheduler = _scheduler("Sampler", parsed.fields["Sampler"], last)
        items["scheduler"] = Scalar(scheduler, False, last)
    except RequestError as e:
        problems.add(e.problems[0].message, last, "scheduler")
    return _mapping(items, 1, last)


def _scheduler(name: str, sampler: str, number: int) -> str:
    scheduler = scheduler_of(sampler)
    if scheduler is None:
        message = f"{name}={short(sampler)} is not one of {', '.join(SAMPLERS.values())}"
        raise RequestError([Problem(message, number, "scheduler")])
    return scheduler


def _mapping(items: dict[str, Node], line: int, last: int | None = None) -> Mapping:
    return Mapping(items, line, [node.line or last for node in items.values()])
