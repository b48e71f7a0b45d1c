"""The configuration, frozen: its sections, their keys, ranges and defaults.

config_file.py reads it. The keys of `defaults` and `folders` are fields of job files, see fields.py.
"""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from promptdrop import names
from promptdrop.fields import FIELDS, PRIORITIES, SIDES, SIDES_IN_WORDS, SIZE, type_of
from promptdrop.nouns import FORMATS

Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]
Size = Annotated[str, Field(pattern=r"^\d{2,4}x\d{2,4}$", examples=["1024x1024"])]
Mode = Annotated[str, Field(pattern=r"^[0-7]{3,4}$")]


class Section(BaseModel):
    """A section of config.yaml. Unknown keys are refused."""

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
            if any(side not in SIDES for side in width_height(size)):
                raise ValueError(f"{size!r}: both sides must be {SIDES_IN_WORDS}")
        return warmup


class Prompt(Section):
    max_tokens: Annotated[int, Field(ge=16, le=4096)] = 512
    overflow: Literal["keep_head", "keep_tail", "refuse"] = "keep_head"


def _configured(optional: bool) -> dict[str, Any]:
    """The keys of `defaults` and their types; all of them optional for the preset of a folder."""
    keys: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if field.configured:
            default = None if optional else field.default
            kind = type_of(name) if default is not None else type_of(name) | None
            keys[name] = (kind, default)
    return keys


class Defaults(create_model("Defaults", __base__=Section, **_configured(optional=False))):  # type: ignore[misc]  # its base is made of FIELDS
    """`defaults`: the values of fields that a job file does not give."""


class Folder(create_model("Folder", __base__=Section, **_configured(optional=True))):  # type: ignore[misc]  # its base is made of FIELDS
    """A preset: the defaults for one sub-folder of the inbox and those below it.

    A key that is not given is None.
    """

    size: Annotated[str, Field(pattern=SIZE)] | None = None
    format: Literal[FORMATS] | None = None  # type: ignore[valid-type]  # one list, in nouns.py
    timeout_seconds: Seconds | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> "Folder":
        if self.size and (self.width or self.height):
            raise ValueError("size and width or height cannot stand together; keep one")
        return self


class Output(Section):
    format: Literal[FORMATS] = "png"  # type: ignore[valid-type]  # one list, in nouns.py
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
    timeout_seconds: Seconds = 600.0
    priority: Annotated[int, Field(ge=PRIORITIES[0], le=PRIORITIES[-1])] = PRIORITIES[-1]
    min_free_disk_mib: Annotated[int, Field(ge=0)] = 1024


class Metrics(Section):
    window: Annotated[int, Field(ge=1, le=100_000)] = 50
    listen: Annotated[str, Field(pattern=r"^[^\s:]*:\d{1,5}$")] | None = None


class Ray(Section):
    """`ray`: settings that only `engine.backend: ray` uses."""

    address: Annotated[str, Field(pattern=r"^(auto|[^\s:]+:\d{1,5})$")] = "auto"


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(Section):
    """The whole configuration. Relative paths are relative to the folder of `file`."""

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
        """The absolute path of the folder in which images are published."""
        return self._absolute(self.paths.outbox) if self.paths.outbox else self.spool / "outbox"

    @property
    def failed(self) -> Path:
        """The absolute path of the folder for refused and failed job files."""
        return self._absolute(self.paths.failed) if self.paths.failed else self.spool / "failed"

    @property
    def state(self) -> Path:
        """The state folder, which only the daemon writes; spool/paths.py says what lies in it."""
        return self.spool / ".promptdrop"

    @property
    def cache(self) -> Path:
        """The folder for what can be deleted at any time, since it is made again."""
        return self.state / "cache"

    @property
    def model_path(self) -> Path | None:
        """`model.path` as an absolute path; None if it is not given."""
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
            if width not in SIDES or height not in SIDES:
                raise ValueError(
                    f"folders.{name}: a size of {width}x{height}; expected {SIDES_IN_WORDS}"
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
        """Return the configuration for a file in this sub-folder, presets of its folders included.

        The innermost preset wins. Names are compared as clients of a share do: without case, in NFC.
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
        """Turn `size` into width and height in pixels.

        A ratio gets the area of the default size, in multiples of 16; (0, 0) if a part of it is 0.
        """
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
    """Turn `1024x768` into (1024, 768), pixels."""
    width, _, height = size.partition("x")
    return int(width), int(height)


def parse(values: dict[str, Any], file: Path | None = None) -> Config:
    """Make a Config of plain values. Raises pydantic.ValidationError."""
    if "file" in values:
        values = {**values, "file ": values["file"]}  # a key `file` is unknown like any other
    return Config.model_validate({**values, "file": file.absolute() if file else None})
