"""Read YAML, JSON, JSONL and CSV. Every value keeps its line and its text as written."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator

from promptdrop import names
from promptdrop.errors import Problem, RequestError
from promptdrop.fields import TEXT_FIELDS
from promptdrop.request.problems import Problems, short
from promptdrop.yaml12 import Builder, Mapping, Node, Scalar, Sequence, YamlError, documents

_MAX_DIGITS = 400  # as in yaml12
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}\[\]]|[^\s,:{}\[\]"]++')  # of valid JSON


def yaml_documents(text: str) -> list[Node]:
    """Read the YAML documents that are not empty. Raises RequestError: see yaml12.documents."""
    try:
        return [node for node in documents(text) if not _is_null(node)]
    except YamlError as e:
        raise RequestError([Problem(str(e), e.line)]) from None


def json_document(text: str, first_line: int = 1) -> Node:
    """Read one JSON value. null gets an empty text, so that it is never taken for a prompt.

    Raises RequestError: it is not JSON, has NaN, Infinity, duplicate keys or too many values, or is
    nested deeper than 16.
    """
    try:
        _DECODER.decode(text)  # is it JSON at all?
    except json.JSONDecodeError as e:
        line = e.lineno + first_line - 1
        raise RequestError([Problem(f"not valid JSON: {e.msg} (column {e.colno})", line)]) from None
    except RecursionError:
        raise RequestError([Problem("nested deeper than 16", first_line)]) from None
    try:
        return _json_tree(text, first_line)
    except YamlError as e:
        raise RequestError([Problem(str(e), e.line)]) from None


def jsonl_documents(text: str, problems: Problems) -> Iterator[Node]:
    """Read one JSON value per line; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json_document(line, number)
        except RequestError as e:
            for problem in e.problems:
                problems.add(problem.message, problem.line)


def csv_documents(text: str, problems: Problems, fields: Collection[str]) -> Iterator[Node]:
    """Read one mapping per row under a header of `fields` and `meta.KEY`; blank rows are skipped."""
    rows = _rows(text, _separator(text), problems)
    line, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    _check_header(header, line, fields, problems)
    for line, row in rows:
        if len(row) > len(header):
            problems.add(
                f"{len(row)} cells where the header has {len(header)};"
                " put a text that contains the separator into double quotes",
                line,
            )
        else:
            yield _row_document(zip(header, row, strict=False), line, problems)


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _json_tree(text: str, line: int) -> Node:
    builder = Builder()
    root: Node | None = None
    counted = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if token == "{":
            builder.open(Mapping(line=line))
        elif token == "[":
            builder.open(Sequence(line=line))
        elif token in "}]":
            root = builder.close()
        else:
            root = builder.scalar(_json_scalar(token, line))
    assert root is not None  # json.loads found one value
    return root


def _json_scalar(token: str, line: int) -> Scalar:
    if token[0] == '"':
        return Scalar(json.loads(token) if "\\" in token else token[1:-1], False, line)
    if token in ("NaN", "Infinity", "-Infinity"):
        raise YamlError(f"{token} is not allowed in JSON; numbers are finite", line)
    if len(token) > _MAX_DIGITS:
        raise YamlError(f"a number of more than {_MAX_DIGITS} digits: {token[:20]}...", line)
    return Scalar("" if token == "null" else token, True, line)


def _separator(text: str) -> str:
    """Return the separator that is most frequent in the header."""
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n").partition("\n")[0])
    return max(",;\t", key=header.count)


def _rows(text: str, separator: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Read the rows that are not blank, each with the line on which it begins."""
    lines = (f"{line}\n" for line in text.split("\n"))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    line = 1
    try:
        for row in reader:
            if "".join(row).strip():
                yield line, row
            line = reader.line_num + 1
    except csv.Error as e:
        why = names.printable(str(e))  # it quotes the separator, which may be a tab
        problems.add(f"not valid CSV: {why}; is a double quote missing?", line)


def _check_header(
    header: list[str], line: int, fields: Collection[str], problems: Problems
) -> None:
    seen: set[str] = set()
    for name in header:
        if name in seen and name:
            problems.add(f"column {short(name)} stands twice in the header", line, name[:60])
        elif name and name not in fields and not name.startswith("meta."):
            hint = names.nearest(name[:60], fields)
            problems.add(
                f"unknown column {short(name)}{hint}"
                f"{'' if hint else '; expected a header row with any of ' + ', '.join(fields)}",
                line,
                name[:60],
            )
        seen.add(name)
    if "meta" in seen and any(name.startswith("meta.") for name in seen):
        problems.add("columns meta and meta.KEY cannot stand together", line, "meta")
    problems.raise_if_any()  # else every row would repeat it


def _row_document(cells: Iterable[tuple[str, str]], line: int, problems: Problems) -> Mapping:
    row, meta = Mapping(line=line), dict[str, Node]()
    for name, cell in cells:
        if not cell.strip():
            continue
        if not name:
            problems.add(f"{short(cell)} stands in a column without a name", line)
        elif name.startswith("meta."):
            meta[name.removeprefix("meta.")] = Scalar(cell, False, line)
        else:
            row.items[name] = _cell(name, cell, line)
    if meta:
        row.items["meta"] = Mapping(meta, line)
    row.key_lines = [line] * len(row.items)
    return row


def _cell(name: str, cell: str, line: int) -> Node:
    if name in ("prompt", "negative_prompt"):
        return Scalar(cell, False, line)
    words = cell.split()
    if name == "seed" and len(words) > 1:
        return Sequence([Scalar(word, True, line) for word in words], line)
    return Scalar(cell.strip(), name not in TEXT_FIELDS, line)
