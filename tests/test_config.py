"""config.yaml: ranges, unknown keys, null, what SIGHUP may change."""

import json
import textwrap
from pathlib import Path

import pytest

from promptdrop import config, config_file
from promptdrop.cli.main import main
from promptdrop.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent


def load(tmp_path: Path, text: str) -> config.Config:
    """Read a configuration of this text."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return config_file.load(file)


def test_the_shipped_file_holds_every_key_with_its_default() -> None:
    """config.yaml loads as it stands, and says nothing that is not the default."""
    shipped = config_file.load(REPOSITORY / "config.yaml")
    defaults = config.parse({"model": {"id": "Tongyi-MAI/Z-Image-Turbo"}})

    assert shipped.model_dump() == defaults.model_dump()
    text = (REPOSITORY / "config.yaml").read_text()
    sections = [s for s in config.Config.model_fields if s not in ("file", "root", "folders")]
    for section in sections:
        for key in type(getattr(shipped, section)).model_fields:
            assert f"  {key}:" in text, f"{section}.{key}"


def test_init_writes_the_models_own_size(tmp_path: Path) -> None:
    """`init --model DIR` writes the size that the model's VAE was made for, 1024 if it has none."""
    vae = {"sides": {"sample_size": 256}, "none": {}, "odd": {"sample_size": 100}}
    for name, values in vae.items():
        (tmp_path / "of" / name / "vae").mkdir(parents=True)
        (tmp_path / "of" / name / "vae" / "config.json").write_text(json.dumps(values))
        status = main(["init", str(tmp_path / name), "--model", str(tmp_path / "of" / name)])
        written = config_file.load(tmp_path / name / "config.yaml")
        side = 256 if name == "sides" else 1024

        assert status == 0
        assert written.model_path == tmp_path / "of" / name
        assert written.model.id == name
        assert (written.defaults.width, written.defaults.height) == (side, side)
        assert written.engine.warmup == (f"{side}x{side}",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root: x", ":1: 'model' is required and has no default"),
        ("model: {id: x}\nwatch:\n  setle_seconds: 1", ":3: unknown key 'watch.setle_seconds'; did you mean 'settle_seconds'?"),
        ("modle: {id: x}", ":1: unknown key 'modle'; did you mean 'model'?"),
        ("model: {id: x}\nfile: y", ":2: unknown key 'file'"),
        ("model: {id: x}\nwatch: {mode: events}", ":2: watch.mode: 'events': input should be 'auto', 'inotify' or 'poll'"),
        ("model: {id: x}\nengine: {batch: 0}", ":2: engine.batch: 0: input should be greater than or equal to 1"),
        ("model: {id: x}\nengine:\n  warmup: [100x100]", "multiples of 16 in [64, 4096]"),
        ("model: {id: x}\ndefaults: {width: 100}", ":2: defaults.width: 100: input should be a multiple of 16"),
        ("model: {id: x}\noutput: {name: '{job}'}", "must contain {image}"),
        ("model: {id: x}\noutput: {name: '{image}/{job}'}", "plain file name"),
        ("model: {id: x}\noutput: {name: '{image.__class__}'}", "must contain {image}"),
        ("model: {id: x}\noutput: {name: '{seed}{image}'}", "image 1 with seed 11 and image 11 with seed 1"),
        ("model: {id: x}\nwatch: {ready_suffix: .txt}", "such as '.done'"),
        ("model: {id: x}\ninbox: {encodings: [klingon]}", "'klingon' is not an encoding"),
        ("model: {id: x}\nfolders:\n  a:\n    stpes: 9", ":4: unknown key 'folders.a.stpes'; did you mean 'steps'?"),
        ("model: {id: x}\nfolders: {a: {steps: 0}}", "folders.a.steps: 0: input should be greater than or equal to 1"),
        ("model: {id: x}\nfolders: {../a: {steps: 9}}", "must name a sub-folder of the inbox"),
        ("model: {id: x}\nfolders: {a: {size: 4096x4096}}", "folders.a: 4096x4096 is more than limits.megapixels: 4.2"),
        ("model: {id: x}\nfolders: {a: {size: 1:99}}", "folders.a: a size of"),
        ("model: {id: x}\nfolders: {a: {size: 16:9, width: 64}}", "size and width or height cannot stand together"),
        ("model: {id: x}\nfolders: {a: {priority: 9}}\nlimits: {priority: 5}", "folders.a: priority 9 is above limits.priority: 5"),
        ("model: {id: x}\nlimits: {timeout_seconds: 0}", ":2: limits.timeout_seconds: 0: input should be greater than 0"),
        ("model: {id: x}\nmodel: {id: y}", ":2: duplicate key 'model'"),
        ("model: &a {id: x}", "anchors are not allowed"),
        ("- model", "expected one mapping"),
        ("model: [", ":2: not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_names_line_key_and_value(tmp_path: Path, text: str, words: str) -> None:
    """The exit status is 78; the words name the key, the value and what was expected."""
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)

    assert words in str(raised.value)
    assert raised.value.exit_status == 78


def test_yaml_means_what_it_looks_like(tmp_path: Path) -> None:
    """`compile: off` is a word, `mode: 0644` keeps its zero, null stands for the default."""
    loaded = load(
        tmp_path, "model: {id: x}\nengine: {compile: off}\noutput: {mode: 0644}\nlimits: null\n"
    )

    assert loaded.engine.compile == "off"
    assert loaded.output.mode == "0644"
    assert loaded.limits.megapixels == 4.2


def test_a_sub_folder_is_a_preset(tmp_path: Path) -> None:
    """Its keys win over `defaults`, and an inner folder's over an outer one's; names match in any case and
    in NFD."""
    text = """
        model: {id: x}
        defaults: {steps: 5}
        folders:
          Wände: {size: "16:9", steps: 9, format: jpeg}
          Wände/groß: {width: 2048, height: 1024, timeout_seconds: 5}
    """
    loaded = load(tmp_path, textwrap.dedent(text))
    outer, inner = (loaded.in_folder(sub) for sub in ("wa\u0308nde/x", "WÄNDE/GROSS/y"))

    assert loaded.in_folder("") is loaded
    assert loaded.in_folder("other/Wände") is loaded
    assert (outer.defaults.width, outer.defaults.height, outer.defaults.steps) == (1360, 768, 9)
    assert (outer.output.format, outer.engine.image_timeout_seconds) == ("jpeg", 60)
    assert (inner.defaults.width, inner.defaults.height, inner.defaults.steps) == (2048, 1024, 9)
    assert (inner.output.format, inner.engine.image_timeout_seconds) == ("jpeg", 5)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """Paths do not depend on the folder in which the daemon is started."""
    loaded = load(tmp_path, "root: a\npaths: {outbox: ../b}\nmodel: {path: m}\n")

    assert loaded.spool == tmp_path / "a"
    assert loaded.outbox == tmp_path.parent / "b"
    assert loaded.failed == tmp_path / "a" / "failed"
    assert loaded.model_path == tmp_path / "m"
    assert loaded.model.id == "m"


def test_a_reload_takes_some_keys_and_names_the_others() -> None:
    """SIGHUP applies the contract's list; the engine's own settings need a restart."""
    old = config.parse({"model": {"id": "x"}})
    new = config.parse({
        "model": {"id": "y"}, "watch": {"settle_seconds": 3}, "defaults": {"steps": 4},
        "engine": {"max_attempts": 9, "batch": 2}, "inbox": {"recursive": False, "encodings": ["gb18030"]},
    })  # fmt: skip

    merged, needs_restart = config_file.reloaded(old, new)

    assert needs_restart == ["inbox.recursive", "model.id", "engine.batch"]
    assert merged.watch.settle_seconds == 3
    assert merged.defaults.steps == 4
    assert (merged.engine.max_attempts, merged.engine.batch) == (9, 1)
    assert (merged.inbox.encodings, merged.inbox.recursive) == (("gb18030",), True)
    assert merged.model.id == "x"
