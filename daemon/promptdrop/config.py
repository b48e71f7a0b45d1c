"""config.yaml to a frozen Config. Every key, range and default is written here, once."""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from promptdrop import names, yaml12
from promptdrop.errors import ConfigError
from promptdrop.nouns import FORMATS, SCHEDULERS

Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]
Size = Annotated[str, Field(pattern=r"^\d{2,4}x\d{2,4}$", examples=["1024x1024"])]
_PART = r"[0-9]{1,4}(\.[0-9]{1,4})?"
SIZE = rf"^\s*([0-9]{{1,5}}\s*[xX×]\s*[0-9]{{1,5}}|{_PART}\s*:\s*{_PART})\s*$"  # WxH or a ratio
Pixels = Annotated[int, Field(ge=64, le=4096, multiple_of=16)]
Mode = Annotated[str, Field(pattern=r"^[0-7]{3,4}$")]

# Keys of jobs claimed from now on: SIGHUP applies these, the engine stays warm.
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


class Section(BaseModel):
    """A mapping of config.yaml: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Paths(Section):
    outbox: Path | None = None
    failed: Path | None = None


class InboxSection(Section):
    encodings: tuple[str, ...] = ("utf-8",)
    recursive: bool = True
    duplicates: Literal["render", "refuse"] = "render"

    @field_validator("encodings")
    @classmethod
    def _known(cls, encodings: tuple[str, ...]) -> tuple[str, ...]:
        for encoding in encodings:
            try:
                "".encode(encoding)
            except LookupError:
                raise ValueError(f"{encoding!r} is not an encoding Python knows") from None
        return encodings


class Watch(Section):
    mode: Literal["auto", "inotify", "poll"] = "auto"
    settle_seconds: Annotated[float, Field(ge=0, le=3600)] = 1.0
    rescan_seconds: Annotated[float, Field(ge=0.05, le=3600)] = 5.0
    give_up_seconds: Annotated[float, Field(ge=0, le=86400)] = 10.0
    writer_seconds: Annotated[float, Field(ge=0, le=86400)] = 60.0
    ready_suffix: Annotated[str, Field(min_length=1, max_length=32)] | None = None

    @field_validator("ready_suffix")
    @classmethod
    def _is_a_suffix(cls, suffix: str | None) -> str | None:
        if suffix and ("/" in suffix or "\0" in suffix or names.is_job_name(f"a{suffix}")):
            raise ValueError(f"{suffix!r} must end a name beside the job file's, such as '.done'")
        return suffix


class Queue(Section):
    policy: Literal["fair", "fifo"] = "fair"


class Model(Section):
    id: Annotated[str, Field(min_length=1)]
    hub: Literal["modelscope", "huggingface"] = "modelscope"
    revision: str | None = None
    path: Path | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _id_of_path(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("path") and not data.get("id"):
            return {**data, "id": Path(str(data["path"])).name}
        return data


class EngineSection(Section):
    backend: Literal["process", "ray"] = "process"
    workers: Annotated[int, Field(ge=1, le=512)] | Literal["auto"] = 1
    compile: Literal["auto", "off", "on"] = "auto"
    quantization: Literal["none", "fp8"] = "none"
    offload: Literal["auto", "none", "text_encoder", "model"] = "auto"
    warmup: tuple[Size, ...] = ("1024x1024",)
    batch: Annotated[int, Field(ge=1, le=64)] = 1
    image_timeout_seconds: Seconds = 60.0
    kill_grace_seconds: Seconds = 5.0
    stall_seconds: Seconds | None = None
    load_timeout_seconds: Seconds = 900.0
    stop_seconds: Annotated[float, Field(ge=0, le=86400)] = 30.0
    unload_after_seconds: Seconds | None = None
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    on_timeout: Literal["fail", "placeholder"] = "fail"
    empty_cache_every: Annotated[int, Field(ge=1)] = 10
    reserve_memory_mib: Annotated[int, Field(ge=1)] | None = None

    @field_validator("warmup")
    @classmethod
    def _renderable(cls, warmup: tuple[str, ...]) -> tuple[str, ...]:
        for size in warmup:
            if any(side % 16 or not 64 <= side <= 4096 for side in width_height(size)):
                raise ValueError(f"{size!r}: both sides must be multiples of 16 in [64, 4096]")
        return warmup


class Prompt(Section):
    max_tokens: Annotated[int, Field(ge=16, le=4096)] = 512
    overflow: Literal["keep_head", "keep_tail", "refuse"] = "keep_head"


class Defaults(Section):
    width: Pixels = 1024
    height: Pixels = 1024
    steps: Annotated[int, Field(ge=1, le=100)] = 9
    guidance_scale: Annotated[float, Field(ge=0, le=20)] = 0.0
    scheduler: Literal[SCHEDULERS] = "euler"  # type: ignore[valid-type]  # one list, in job.py
    negative_prompt: Annotated[str, Field(max_length=20_000)] | None = None
    count: Annotated[int, Field(ge=1)] = 1
    priority: Annotated[int, Field(ge=-100, le=100)] = 0


class Folder(Section):
    """The defaults of one sub-folder of the inbox, and of those below it: a preset. None: not said."""

    size: Annotated[str, Field(pattern=SIZE)] | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    steps: Annotated[int, Field(ge=1, le=100)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=20)] | None = None
    scheduler: Literal[SCHEDULERS] | None = None  # type: ignore[valid-type]  # one list, in job.py
    negative_prompt: Annotated[str, Field(max_length=20_000)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    format: Literal[FORMATS] | None = None  # type: ignore[valid-type]  # one list, in job.py
    timeout_seconds: Seconds | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> "Folder":
        if self.size and (self.width or self.height):
            raise ValueError("size and width or height cannot stand together; keep one")
        return self


class Output(Section):
    format: Literal[FORMATS] = "png"  # type: ignore[valid-type]  # one list, in job.py
    quality: Annotated[int, Field(ge=1, le=100)] = 92
    name: Annotated[str, Field(min_length=1, max_length=100)] = "{job}-{image:04d}"
    embed_metadata: bool = True
    mode: Mode = "0664"
    directory_mode: Mode = "2775"

    @field_validator("name")
    @classmethod
    def _distinct(cls, name: str) -> str:
        try:
            one, two = (name.format(job="job", image=image, seed=7) for image in (1, 2))
        except (KeyError, IndexError, ValueError, AttributeError) as e:
            raise ValueError(f"{name!r} may use {{job}}, {{image}} and {{seed}}: {e}") from None
        if one == two:
            raise ValueError(f"{name!r} must contain {{image}}, or all images get one name")
        if name.format(job="", image=1, seed=11) == name.format(job="", image=11, seed=1):
            raise ValueError(
                f"{name!r} gives image 1 with seed 11 and image 11 with seed 1 one name;"
                " put something between {seed} and {image}"
            )
        if "/" in one or "\0" in one or not names.is_stem(one):
            raise ValueError(f"{name!r} must give a plain file name, not {one!r}")
        return name


class Limits(Section):
    megapixels: Annotated[float, Field(gt=0, le=16.8)] = 4.2
    images_per_job: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    job_file_kib: Annotated[int, Field(ge=1, le=65_536)] = 1024
    priority: Annotated[int, Field(ge=-100, le=100)] = 100
    min_free_disk_mib: Annotated[int, Field(ge=0)] = 1024


class Metrics(Section):
    window: Annotated[int, Field(ge=1, le=100_000)] = 50
    listen: Annotated[str, Field(pattern=r"^[^\s:]*:\d{1,5}$")] | None = None


class Ray(Section):
    """Of `engine.backend: ray` alone."""

    address: Annotated[str, Field(pattern=r"^(auto|[^\s:]+:\d{1,5})$")] = "auto"


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(Section):
    """The whole configuration; `file` is where it came from, relative paths are relative to it."""

    root: Path = Path("spool")
    paths: Paths = Paths()
    inbox: InboxSection = InboxSection()
    watch: Watch = Watch()
    queue: Queue = Queue()
    model: Model
    engine: EngineSection = EngineSection()
    prompt: Prompt = Prompt()
    defaults: Defaults = Defaults()
    folders: dict[str, Folder] = {}
    output: Output = Output()
    limits: Limits = Limits()
    metrics: Metrics = Metrics()
    ray: Ray = Ray()
    log: Log = Log()
    file: Path | None = Field(default=None, exclude=True)

    @property
    def spool(self) -> Path:
        """The absolute root of the spool."""
        return self._absolute(self.root)

    @property
    def outbox(self) -> Path:
        """Where images are published."""
        return self._absolute(self.paths.outbox) if self.paths.outbox else self.spool / "outbox"

    @property
    def failed(self) -> Path:
        """Where refused and failed job files go."""
        return self._absolute(self.paths.failed) if self.paths.failed else self.spool / "failed"

    @property
    def state(self) -> Path:
        """The state folder, which only the daemon writes; spool/paths.py says what lies in it."""
        return self.spool / ".promptdrop"

    @property
    def cache(self) -> Path:
        """What is made again when it is gone."""
        return self.state / "cache"

    @property
    def model_path(self) -> Path | None:
        """`model.path` made absolute, if given."""
        return self._absolute(self.model.path) if self.model.path else None

    @field_validator("folders")
    @classmethod
    def _are_sub_folders(cls, folders: dict[str, Folder]) -> dict[str, Folder]:
        for name in folders:
            parts = name.split("/")
            if any(part in ("", ".", "..") or names.is_ignored_folder(part) for part in parts):
                raise ValueError(
                    f"{name!r} must name a sub-folder of the inbox, such as wallpapers or clients/acme"
                )
        return folders

    @model_validator(mode="after")
    def _fp8_gives_bfloat16(self) -> "Config":
        if self.engine.quantization == "fp8" and self.model.dtype != "bfloat16":
            raise ValueError(
                f"engine.quantization: fp8 with model.dtype: {self.model.dtype}; expected bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _folders_can_be_rendered(self) -> "Config":
        for name in self.folders:
            defaults = self.in_folder(name).defaults
            width, height = defaults.width, defaults.height
            if not all(64 <= side <= 4096 and side % 16 == 0 for side in (width, height)):
                raise ValueError(
                    f"folders.{name}: a size of {width}x{height};"
                    " expected multiples of 16 in [64, 4096]"
                )
            if width * height > self.limits.megapixels * 1e6:
                raise ValueError(
                    f"folders.{name}: {width}x{height} is more than limits.megapixels:"
                    f" {self.limits.megapixels:g}"
                )
            if defaults.priority > self.limits.priority:
                raise ValueError(
                    f"folders.{name}: priority {defaults.priority} is above limits.priority:"
                    f" {self.limits.priority}"
                )
        return self

    def in_folder(self, sub: str) -> "Config":
        """What a file dropped into this sub-folder is read with: presets, outermost first.

        Names are compared as a share's clients do: without case, in NFC.
        """
        presets = {names.fold(name): preset for name, preset in self.folders.items()}
        config, above = self, ""
        for part in names.fold(sub).split("/") if presets else ():
            above = f"{above}/{part}" if above else part
            if above in presets:
                config = config._with(presets[above])
        return config

    def _with(self, preset: Folder) -> "Config":
        given = preset.model_dump(exclude_none=True)
        elsewhere: dict[str, Section] = {}
        if size := given.pop("size", None):
            given["width"], given["height"] = self.sides(size)
        if "format" in given:
            elsewhere["output"] = self.output.model_copy(update={"format": given.pop("format")})
        if "timeout_seconds" in given:
            seconds = {"image_timeout_seconds": given.pop("timeout_seconds")}
            elsewhere["engine"] = self.engine.model_copy(update=seconds)
        defaults = self.defaults.model_copy(update=given)
        return self.model_copy(update={"defaults": defaults, **elsewhere})

    def sides(self, size: str) -> tuple[int, int]:
        """Width and height in pixels; a ratio at the default's area, in multiples of 16."""
        if ":" not in size:
            width, height = re.split("[xX×]", size)
            return int(width), int(height)
        across, down = map(float, size.split(":"))
        if not across or not down:
            return 0, 0
        area = self.defaults.width * self.defaults.height
        exact = math.sqrt(area * across / down), math.sqrt(area * down / across)  # px
        width, height = (round(side / 16) * 16 for side in exact)
        if width * height > self.limits.megapixels * 1e6:  # too large only by rounding
            width, height = (int(side / 16) * 16 for side in exact)
        return width, height

    def _absolute(self, path: Path) -> Path:
        base = self.file.parent if self.file else Path.cwd()
        return Path(os.path.normpath(base.absolute() / path.expanduser()))


def width_height(size: str) -> tuple[int, int]:
    """`1024x768` -> (1024, 768), pixels."""
    width, _, height = size.partition("x")
    return int(width), int(height)


def default_file() -> Path:
    """`$PROMPTDROP_CONFIG`, then ./config.yaml, then /etc/promptdrop/config.yaml.

    Raises ConfigError: there is none.
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

    Raises ConfigError: unreadable, not YAML, an unknown key or a value out of range; the text
    names file, line, key, value and what was expected.
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
        raise ConfigError("\n".join(_explain(file, tree, error) for error in e.errors())) from None


def parse(values: dict[str, Any], file: Path | None = None) -> Config:
    """A Config of plain values. Raises pydantic.ValidationError."""
    if "file" in values:
        values = {**values, "file ": values["file"]}  # a key `file` is unknown like any other
    return Config.model_validate({**values, "file": file.absolute() if file else None})


def reloaded(old: Config, new: Config) -> tuple[Config, list[str]]:
    """What SIGHUP makes of `old`: the reloadable keys of `new`, and the other keys that differ."""
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
    """Plain values, with the text as written where a mode such as 0664 would lose its zero."""
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
    """Whether null says something for this key; elsewhere it is a value forgotten."""
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
    if not path:  # of several keys together: the text names them
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
