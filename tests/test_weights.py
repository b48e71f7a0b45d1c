"""Finding a model's files offline, and the errors when they are missing."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from promptdrop import config as configuration
from promptdrop import weights
from promptdrop.config import Config
from promptdrop.errors import ModelError, UsageError

MODEL = "Tongyi-MAI/Z-Image-Turbo"
COMMIT = "0123456789abcdef" * 2 + "01234567"  # of the model that the hub below has
COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
}
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *(f"transformer/{shard}" for shard in SHARDS),
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both hubs' caches in one scratch folder."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def checkpoint(directory: Path) -> Path:
    """A checkpoint's files, with one small tensor in each safetensors file."""
    index = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.42.1", **COMPONENTS}
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for name in FILES:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        else:
            file.write_text("{}")
    (directory / "model_index.json").write_text(json.dumps(index))
    weight_map = {f"layer.{i}": shard for i, shard in enumerate(SHARDS)}
    (directory / FILES[7]).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def configured(**model: str | None) -> Config:
    return configuration.parse({"model": {"id": MODEL, **model}})


def test_a_whole_checkpoint_lacks_nothing(tmp_path: Path) -> None:
    """Every file model_index.json and the shard index ask for is there and whole."""
    assert weights.missing_files(checkpoint(tmp_path / "m")) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "empty"])
def test_each_missing_or_empty_file_is_named(tmp_path: Path, name: str, harm: str) -> None:
    """The error names the file, the folder, and what to do."""
    directory = checkpoint(tmp_path / "m")
    (directory / name).unlink()
    if harm == "empty":
        (directory / name).touch()

    assert weights.missing_files(directory) == [f"{name} ({harm})"]
    with pytest.raises(ModelError, match=name) as raised:
        weights.require(configured(path=str(directory)))
    assert str(directory) in str(raised.value)


def test_a_download_cut_short_is_noticed(tmp_path: Path) -> None:
    """The safetensors header says how long the file must be."""
    directory = checkpoint(tmp_path / "m")
    file = directory / "vae/diffusion_pytorch_model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)

    assert weights.missing_files(directory) == [
        f"vae/{file.name} (cut short: {size - 1} of {size} bytes)"
    ]


def test_a_git_lfs_pointer_is_not_weights(tmp_path: Path) -> None:
    """A clone without git-lfs leaves small text files under the weights' names."""
    directory = checkpoint(tmp_path / "m")
    file = directory / "vae/diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")

    assert "git-lfs pointer" in weights.missing_files(directory)[0]


def test_vocab_and_merges_are_a_tokenizer_too(tmp_path: Path) -> None:
    """A tokenizer is tokenizer.json, or vocab.json with merges.txt."""
    directory = checkpoint(tmp_path / "m")
    (directory / "tokenizer/tokenizer.json").unlink()
    (directory / "tokenizer/vocab.json").write_text("{}")
    (directory / "tokenizer/merges.txt").write_text("a b")

    assert weights.missing_files(directory) == []


MODELSCOPE_LAYOUTS = [
    "models/Tongyi-MAI--Z-Image-Turbo/snapshots/master",
    "models/Tongyi-MAI--Z-Image-Turbo/snapshots/main",
    "models/Tongyi-MAI--Z-Image-Turbo/snapshots/v1.0",
    "models/Tongyi-MAI/Z-Image-Turbo",
    "hub/models/Tongyi-MAI/Z-Image-Turbo",
    "hub/Tongyi-MAI/Z-Image-Turbo",
    "Tongyi-MAI/Z-Image-Turbo",
]


@pytest.mark.parametrize("layout", MODELSCOPE_LAYOUTS)
def test_modelscope_layouts(caches: Path, layout: str) -> None:
    """Every layout modelscope has used is found without it."""
    directory = checkpoint(caches / "ms" / layout)

    assert weights.require(configured()) == directory


def test_modelscope_default_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MODELSCOPE_CACHE the cache is ~/.cache/modelscope."""
    monkeypatch.delenv("MODELSCOPE_CACHE")
    monkeypatch.setenv("HOME", str(caches / "home"))
    directory = checkpoint(caches / "home/.cache/modelscope" / MODELSCOPE_LAYOUTS[0])

    assert weights.require(configured()) == directory
    assert weights.revision_of(directory) == "master"


def test_two_unnamed_revisions_are_not_guessed(caches: Path) -> None:
    """model.revision chooses; without it the names are listed."""
    snapshots = caches / "ms/models/Tongyi-MAI--Z-Image-Turbo/snapshots"
    for revision in ("v1", "v2"):
        checkpoint(snapshots / revision)

    with pytest.raises(ModelError, match="v1, v2"):
        weights.resolve(configured())
    assert weights.require(configured(revision="v2")) == snapshots / "v2"


@pytest.mark.parametrize("revision", [None, "beta", "5e8f"])
def test_hugging_face_layout(caches: Path, revision: str | None) -> None:
    """refs/NAME leads to snapshots/COMMIT; a commit may be named itself."""
    repository = caches / "hf/hub/models--Tongyi-MAI--Z-Image-Turbo"
    directory = checkpoint(repository / "snapshots/5e8f")
    (repository / "refs").mkdir()
    for name in ("main", "beta"):
        (repository / "refs" / name).write_text("5e8f")

    assert weights.require(configured(revision=revision)) == directory
    assert weights.revision_of(directory) == "5e8f"


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_the_configured_hub_comes_first(caches: Path, hub: str) -> None:
    """Where both caches hold the model, model.hub decides."""
    repository = caches / "hf/hub/models--Tongyi-MAI--Z-Image-Turbo"
    places = {
        "huggingface": checkpoint(repository / "snapshots/5e8f"),
        "modelscope": checkpoint(caches / "ms" / MODELSCOPE_LAYOUTS[0]),
    }
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("5e8f")

    assert weights.resolve(configured(hub=hub)) == places[hub]


def test_a_whole_copy_is_preferred_to_a_broken_one(caches: Path) -> None:
    """An interrupted download in the first cache does not hide a complete one elsewhere."""
    broken = checkpoint(caches / "ms" / MODELSCOPE_LAYOUTS[0])
    (broken / "vae/config.json").unlink()
    whole = checkpoint(caches / "ms" / MODELSCOPE_LAYOUTS[-1])

    assert weights.resolve(configured()) == whole


def test_not_found_names_every_place_and_the_command(caches: Path) -> None:
    """The error lists every place that was looked at, and the command that fetches the model."""
    with pytest.raises(ModelError) as raised:
        weights.require(configured())

    text = str(raised.value)
    assert f"promptdrop model fetch {MODEL}" in text
    for layout in MODELSCOPE_LAYOUTS[:2] + MODELSCOPE_LAYOUTS[3:]:
        assert str(caches / "ms" / layout) in text
    assert str(caches / "hf/hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/main") in text


def test_an_incomplete_cache_names_the_command(caches: Path) -> None:
    """The error names the missing files and the command that fetches the rest."""
    directory = checkpoint(caches / "ms" / MODELSCOPE_LAYOUTS[0])
    (directory / "transformer" / SHARDS[1]).unlink()

    with pytest.raises(ModelError, match=SHARDS[1]) as raised:
        weights.require(configured())
    assert f"promptdrop model fetch {MODEL}" in str(raised.value)


def test_model_id_may_be_a_folder(tmp_path: Path) -> None:
    """`init --model` writes a path or an id; a path is relative to the configuration file."""
    directory = checkpoint(tmp_path / "etc/m")
    relative = configuration.parse({"model": {"id": "m"}}, tmp_path / "etc/config.yaml")

    assert weights.require(relative) == directory
    assert weights.require(configured(id=str(directory))) == directory
    with pytest.raises(ModelError, match="no such folder"):
        weights.require(configured(id=str(tmp_path / "nowhere")))


def test_another_pipeline_is_refused(tmp_path: Path) -> None:
    """A Stable Diffusion checkpoint is whole and still the wrong model."""
    directory = checkpoint(tmp_path / "m")
    (directory / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')

    with pytest.raises(ModelError, match="'StableDiffusionPipeline'; expected 'ZImagePipeline'"):
        weights.require(configured(path=str(directory)))


def test_resolving_imports_nothing_heavy() -> None:
    """The supervisor and the command line stay light."""
    code = (
        "import sys; import promptdrop.weights, promptdrop.engines.engine, promptdrop.engines.gradient\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'modelscope', 'huggingface_hub'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_demonstration_model_never_overwrites(tmp_path: Path) -> None:
    """An empty folder is filled, the same bytes every time; anything else is left alone."""
    again = tmp_path / "again"
    again.mkdir()
    weights.copy_demo(again)

    files = [file.relative_to(again) for file in again.rglob("*") if file.is_file()]
    assert all((again / file).read_bytes() == (weights.DEMO / file).read_bytes() for file in files)
    assert [child.name for child in tmp_path.iterdir()] == ["again"]
    with pytest.raises(UsageError, match="not an empty folder"):
        weights.copy_demo(again)


class Hub(BaseHTTPRequestHandler):
    """The part of Hugging Face's HTTP interface that a download uses; `Hub.model` is what it has."""

    protocol_version = "HTTP/1.1"
    model: Path

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        """Print no line on stderr for each request."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = [file for file in self.model.rglob("*") if file.is_file()]
        names = {str(file.relative_to(self.model)): file for file in files}
        if "/resolve/" in path:
            body = names[path.split("/resolve/")[1].partition("/")[2]].read_bytes()
        elif "/tree/" in path:
            body = json.dumps([
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
                for name, file in names.items()
            ]).encode()  # fmt: skip
        else:
            siblings = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "demo/shapes", "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.mark.timeout(120)
def test_fetch_to_a_folder(tmp_path: Path) -> None:
    """`model fetch ID --to DIR`: a whole model in DIR, made with its parents; nothing in a cache."""
    Hub.model = checkpoint(tmp_path / "published")
    folder = tmp_path / "srv/models/shapes"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-m", "promptdrop", "model", "fetch", "demo/shapes",
             "--hub", "huggingface", "--to", str(folder)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                 "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
                 "HF_HUB_OFFLINE": "0"},  # other tests of this process have imported the engine
        )  # fmt: skip
        server.shutdown()

    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    assert weights.require(configured(path=str(folder))) == folder
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_fetch_to_a_file_is_refused(tmp_path: Path) -> None:
    """It is refused before anything is asked of the network, and the error names the path."""
    (tmp_path / "model").touch()
    done = subprocess.run(
        [sys.executable, "-m", "promptdrop", "model", "fetch", MODEL,
         "--to", str(tmp_path / "model")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (1, f"promptdrop: {tmp_path}/model: File exists\n")
