"""The files of a model: where they are on this disk, and whether all are there and whole.

No torch and no hub library is imported here: the supervisor, `doctor` and the command line use it.
Only `fetch` uses the network. The layouts are those of modelscope 1.40 (modelscope_hub/_download.py
and modelscope/hub/utils/utils.py) and huggingface_hub 1.x ("Understand caching" in its manual).
"""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from promptdrop.config import Config
from promptdrop.errors import ModelError, UsageError

Hub = Literal["modelscope", "huggingface"]

HUB_NAMES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}
PIPELINE_CLASS = "ZImagePipeline"
WEIGHT_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either set is enough
DEMO = Path(__file__).parent / "models" / "demo"  # trained by demo_model/ of the source tree


def resolve(config: Config) -> Path:
    """Find the model's directory: `model.path`, else `model.id` as a folder, else in a hub's cache.

    `model.hub` says which cache is looked at first. The first complete directory is taken, or the
    first incomplete one where none is complete.

    Raises ModelError: there is none; the text names every place looked at and the cure.
    """
    if path := config.model_path:
        if not path.is_dir():
            raise ModelError(
                f"model.path: {path}: no such folder; expected one with model_index.json and the"
                " folders it names: transformer, text_encoder, vae, tokenizer, scheduler"
            )
        return path
    if (folder := _folder_named(config)).is_dir():
        return folder
    places = cache_places(config.model.id, config.model.hub, config.model.revision)
    found = [place for place in places if _has_entries(place)]
    for directory in found:
        if not missing_files(directory):
            return directory
    if found:
        return found[0]
    if not places:
        raise ModelError(f"model.id: {config.model.id}: no such folder: {folder}")
    looked_at = [f"  {place}{_several(place)}" for place in [folder, *places]]
    raise ModelError(
        f"model.id: {config.model.id}: its files are not on this disk; fetch them with:"
        f" {fetch_command(config)}",
        more_lines=["looked at:", *looked_at],
    )


def require(config: Config) -> Path:
    """Find the model's directory, and check that it is complete.

    Raises ModelError: not found, or files are missing or cut short; the text names each of them.
    """
    directory = resolve(config)
    if missing := missing_files(directory):
        if config.model_path or directory == _folder_named(config):
            cure = "expected a whole checkpoint in diffusers' layout here"
        else:
            cure = f"fetch them with: {fetch_command(config)}"
        raise ModelError(
            f"{directory}: {len(missing)} of the model's files are missing or incomplete; {cure}",
            more_lines=[f"  {name}" for name in missing],
        )
    kind = _json(directory / "model_index.json").get("_class_name")
    if kind != PIPELINE_CLASS:
        raise ModelError(
            f"{directory}/model_index.json: _class_name: {kind!r}; expected {PIPELINE_CLASS!r}"
        )
    return directory


def missing_files(directory: Path) -> list[str]:
    """The files named by model_index.json that are not whole, as `vae/config.json (missing)`."""
    if trouble := _trouble(directory / "model_index.json"):
        return [f"model_index.json{trouble}"]
    index = _json(directory / "model_index.json")
    missing: list[str] = []
    for name, component in index.items():
        if not name.startswith("_") and isinstance(component, list) and len(component) == 2:
            library, kind = (str(part) for part in component)
            if component[0] is not None:  # [null, null]: an optional component left out
                missing += _missing_of_component(directory, name, library, kind)
    return missing


def fetch(model_id: str, hub: Hub, revision: str | None, destination: Path | None = None) -> Path:
    """Download a model into the hub's cache, or into `destination`. The only use of the network.

    Files that are there already and whole are not downloaded again.

    Raises ModelError: the hub cannot be reached, has no such model, or left files incomplete.
    Raises OSError: `destination` cannot be made.
    """
    if destination:
        destination.mkdir(parents=True, exist_ok=True)
    local_dir = str(destination.resolve()) if destination else None
    try:
        if hub == "modelscope":
            from modelscope.hub.snapshot_download import snapshot_download

            directory = snapshot_download(model_id, revision=revision, local_dir=local_dir)
        else:
            from huggingface_hub import snapshot_download

            directory = snapshot_download(model_id, revision=revision, local_dir=local_dir)
    except (
        Exception
    ) as e:  # the hubs' libraries raise errors of requests and httpx: all mean that it failed
        raise ModelError(
            f"{model_id}, revision {revision or 'default'}: could not be fetched from"
            f" {HUB_NAMES[hub]}; is the network reachable and the name right?"
            f" {type(e).__name__}: {e}"
        ) from e
    if missing := missing_files(Path(directory)):
        raise ModelError(f"{model_id}: fetched into {directory}, yet not whole: {missing}")
    return Path(directory)


def fetch_command(config: Config) -> str:
    """The command line that downloads the configured model."""
    return f"promptdrop model fetch {config.model.id}"


def revision_of(directory: Path) -> str | None:
    """The revision a directory was downloaded at, where its layout tells; else None."""
    if directory.parent.name == "snapshots":
        return directory.name
    # What huggingface_hub's snapshot_download(local_dir=) leaves beside the files.
    record = directory / ".cache/huggingface/download/model_index.json.metadata"
    try:
        return record.read_text("utf-8").split("\n", 1)[0].strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def side_of(directory: Path) -> int | None:
    """The side in pixels of the squares a model was made for, by its VAE's `sample_size`.

    None where that is missing or no side of an image."""
    try:
        side = _json(directory / "vae" / "config.json").get("sample_size")
    except (OSError, ValueError):
        return None
    return side if isinstance(side, int) and side in range(64, 2049, 16) else None


def cache_places(model_id: str, hub: Hub, revision: str | None) -> list[Path]:
    """Every directory in which the hubs' libraries keep this model, the configured hub's first."""
    if model_id.count("/") != 1 or model_id.startswith(("/", ".", "~")):
        return []  # a path, never a repository
    places = {
        "modelscope": list(_modelscope_places(model_id, revision)),
        "huggingface": list(_huggingface_places(model_id, revision)),
    }
    first = places.pop(hub)
    return first + next(iter(places.values()))


def _modelscope_places(model_id: str, revision: str | None) -> Iterator[Path]:
    """The places where modelscope 1.40 looks, in its order: folders of 1.37, snapshots, older folders."""
    base = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    owner, name = model_id.split("/")
    safe = name.replace(".", "___")  # modelscope <= 1.37 wrote dots so
    snapshots = base / "models" / f"{owner}--{name}" / "snapshots"
    default = [snapshots / "master", snapshots / "main", *_only_folder(snapshots)]
    yield from dict.fromkeys([
        base / "models" / owner / safe,
        base / "hub" / "models" / owner / safe,
        *([snapshots / revision] if revision else default),
        base / owner / name,
        base / owner / safe,
        base / "hub" / owner / name,
        base / "hub" / owner / safe,
        base / "models" / owner / name,
    ])  # fmt: skip


def _huggingface_places(model_id: str, revision: str | None) -> Iterator[Path]:
    """The folder of a revision: `refs/NAME` holds the commit whose files are in `snapshots/COMMIT`."""
    environ = os.environ
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    hub = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    cache = Path(os.path.expandvars(hub)).expanduser()
    repository = cache / f"models--{model_id.replace('/', '--')}"
    name = revision or "main"
    try:
        commit = (repository / "refs" / name).read_text("utf-8").strip()
    except OSError:
        commit = ""
    yield repository / "snapshots" / (commit or name)


def _folder_named(config: Config) -> Path:
    """The folder that `model.id` names, relative to the configuration file like every path."""
    base = config.file.parent if config.file else Path.cwd()
    return base / Path(config.model.id).expanduser()


def _only_folder(snapshots: Path) -> list[Path]:
    """Return the only revision there is, to be used if none is named; empty if there are several."""
    folders = _folders(snapshots)
    return folders if len(folders) == 1 else []


def _several(place: Path) -> str:
    """Return a hint that lists the revisions there are, where only the wanted one is missing."""
    if place.parent.name != "snapshots" or not (folders := _folders(place.parent)):
        return ""
    return f" (model.revision may be: {', '.join(folder.name for folder in folders)})"


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(child for child in parent.iterdir() if _has_entries(child))
    except OSError:
        return []


def _has_entries(directory: Path) -> bool:
    try:
        return next(directory.iterdir(), None) is not None
    except OSError:
        return False


def _missing_of_component(directory: Path, name: str, library: str, kind: str) -> list[str]:
    folder = directory / name
    if "Scheduler" in kind:
        wanted = [folder / "scheduler_config.json"]
    elif "Tokenizer" in kind or "Processor" in kind:
        sets = [[folder / file for file in files] for files in TOKENIZER_FILES]
        files = next((files for files in sets if not any(map(_trouble, files))), sets[0])
        wanted = [folder / "tokenizer_config.json", *files]
    else:
        wanted = [folder / "config.json", *_weight_files(folder, library)]
    troubles = [(file.relative_to(directory), _trouble(file)) for file in wanted]
    return [f"{file}{trouble}" for file, trouble in troubles if trouble]


def _weight_files(folder: Path, library: str) -> list[Path]:
    """The weight files of a component: every shard of its index, or the one file."""
    stem = WEIGHT_STEMS.get(library, "model")
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        sharded = next(folder.glob(f"{stem}-*-of-*.safetensors"), None)
        return [index] if sharded else [folder / f"{stem}.safetensors"]
    if _trouble(index):
        return [index]
    weight_map: dict[str, str] = _json(index)["weight_map"]
    return [folder / shard for shard in sorted(set(weight_map.values()))]


def _trouble(file: Path) -> str | None:
    """Why a file cannot be used, as ` (reason)`; None if it is whole."""
    try:
        size = file.stat().st_size
        if size == 0:
            return " (empty)"
        if file.suffix == ".safetensors":
            return _trouble_of_safetensors(file, size)
        if file.name.endswith(".index.json"):
            _json(file)["weight_map"]
        elif file.suffix == ".json":
            _json(file)
    except FileNotFoundError:
        return " (missing)"
    except OSError as e:
        return f" ({e.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        return f" (not what it should be: {type(e).__name__}: {e})"
    return None


def _trouble_of_safetensors(file: Path, size: int) -> str | None:
    """Compare a file's size with the end of its last tensor, which its header names.

    Source: huggingface/safetensors, README, "Format".
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return " (a git-lfs pointer, not the file itself)"
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + header_bytes > size:
            return f" (cut short: {size} bytes)"
        header = json.loads(stream.read(header_bytes))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + header_bytes + max(ends, default=0)
    return None if size == expected else f" (cut short: {size} of {expected} bytes)"


def _json(file: Path) -> Mapping[str, Any]:
    """Read a JSON mapping. Raises OSError, ValueError."""
    value = json.loads(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value


def copy_demo(directory: Path) -> None:
    """Copy the demonstration model (15 MB, diffusers' layout) to `directory`: all of it or nothing.

    Raises UsageError: `directory` exists and is not an empty folder.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory}: exists and is not an empty folder; nothing was written")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        unfinished = Path(scratch) / "model"
        shutil.copytree(DEMO, unfinished, copy_function=shutil.copyfile)
        unfinished.rename(directory)  # onto an empty folder too, rename(2)
