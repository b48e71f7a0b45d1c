"""Read config.yaml: find it, say in which line it is wrong, and decide what a reload may change."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from promptdrop import names, yaml12
from promptdrop.config import Config, Folder, Section, parse
from promptdrop.errors import ConfigError

# Sections and keys that SIGHUP applies to jobs claimed from then on; the engine stays warm.
RELOADABLE = frozenset(
    {"watch", "inbox.encodings", "inbox.duplicates", "limits", "defaults", "folders", "output"}
    | {"prompt", "queue", "log"}
    | {
        f"engine.{key}"
        for key in (
            "image_timeout_seconds",
            "kill_grace_seconds",
            "stall_seconds",
            "load_timeout_seconds",
            "stop_seconds",
        )
    }
    | {f"engine.{key}" for key in ("max_attempts", "on_timeout", "empty_cache_every")}
)


def default_file() -> Path:
    """Find the configuration: $PROMPTDROP_CONFIG, ./config.yaml or /etc/promptdrop/config.yaml.

    Raises ConfigError: there is none of them.
    """
    if configured := os.environ.get("PROMPTDROP_CONFIG"):
        return Path(configured)
    for file in (Path("config.yaml"), Path("/etc/promptdrop/config.yaml")):
        if file.exists():
            return file
    raise ConfigError(
        "no configuration: $PROMPTDROP_CONFIG is not set, and neither ./config.yaml nor"
        " /etc/promptdrop/config.yaml is there; name one with --config FILE, or write one with:"
        " promptdrop init DIR"
    )


def load(file: Path) -> Config:
    """Read a configuration file.

    Raises ConfigError: it is unreadable or not YAML, a key is unknown, a value is out of range. The
    text names the file, the line, the key, the value and what was expected.
    """
    try:
        text = file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such configuration file; write one with: promptdrop init DIR"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read: {e}") from None
    try:
        trees = yaml12.documents(text)
    except yaml12.YamlError as e:
        raise ConfigError(f"{file}:{e.line or 1}: {e}") from None
    tree = trees[0] if trees else yaml12.Mapping()
    if len(trees) > 1 or not isinstance(tree, yaml12.Mapping):
        raise ConfigError(f"{file}: expected one mapping of sections such as `model:`")
    try:
        return parse(_values(tree), file)
    except ValidationError as e:
        first, *others = (_explain(file, tree, error) for error in e.errors())
        raise ConfigError(first, more_lines=others) from None


def reloaded(old: Config, new: Config) -> tuple[Config, list[str]]:
    """Return `old` with the reloadable keys of `new`, and the names of the other keys that differ."""
    merged: dict[str, Any] = {}
    needs_restart = []
    for name in Config.model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if name in RELOADABLE:
            merged[name] = after
        elif isinstance(before, Section):
            keys = {
                key: (getattr(before, key), getattr(after, key))
                for key in type(before).model_fields
            }
            taken = {key: b if f"{name}.{key}" in RELOADABLE else a for key, (a, b) in keys.items()}
            merged[name] = type(before).model_construct(**taken)
            needs_restart += [
                f"{name}.{key}"
                for key, (a, b) in keys.items()
                if a != b and f"{name}.{key}" not in RELOADABLE
            ]
        else:
            merged[name] = before
            if before != after and name != "file":
                needs_restart.append(name)
    return Config.model_construct(**merged), needs_restart


def _values(tree: yaml12.Mapping) -> dict[str, Any]:
    """Return plain values. Modes, ids and revisions stay text: as a number, 0664 would lose its zero."""
    values: dict[str, Any] = {}
    for key, node in tree.items.items():
        value = yaml12.plain(node)
        if isinstance(node, yaml12.Mapping) and isinstance(value, dict):
            for name in ("mode", "directory_mode", "revision", "id"):
                child = node.items.get(name)
                if isinstance(child, yaml12.Scalar) and child.value is not None:
                    value[name] = child.text
            value = {k: v for k, v in value.items() if v is not None or _may_be_null(key, k)}
        if value is not None:
            values[key] = value
    return values


def _may_be_null(section: str, key: str) -> bool:
    """Whether a null is left for the validation to judge.

    It is dropped only where null is allowed and is not the default.
    """
    field = Config.model_fields.get(section)
    kind = field.annotation if field else None
    known = (
        kind.model_fields.get(key) if isinstance(kind, type) and issubclass(kind, Section) else None
    )
    return known is None or known.default is None or type(None) not in get_args(known.annotation)


def _explain(file: Path, tree: yaml12.Mapping, error: ErrorDetails) -> str:
    path = [str(part).strip() for part in error["loc"]]
    key = ".".join(path)
    where = f"{file}:{_line(tree, path)}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{names.nearest(path[-1], _known_keys(path[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: {key!r} is required and has no default"
    expected = re.sub(r"^(Value error|Assertion failed), ", "", error["msg"])
    if not path:  # the error of several keys together, whose text names them
        return f"{file}: {expected}"
    return f"{where}: {key}: {error['input']!r}: {expected[:1].lower()}{expected[1:]}"


def _line(tree: yaml12.Mapping, path: list[str]) -> int:
    line, node = 1, tree
    for part in path:
        if not isinstance(node, yaml12.Mapping) or part not in node.items:
            break
        line = node.line_of(part) or line
        node = node.items[part]  # type: ignore[assignment]  # checked at the loop's head
    return line


def _known_keys(path: list[str]) -> Iterable[str]:
    section: type[BaseModel] = Config
    if path[:1] == ["folders"]:
        section, path = Folder, path[2:]
    for part in path:
        kind = section.model_fields[part].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return ()
        section = kind
    return [name for name in section.model_fields if name != "file"]
