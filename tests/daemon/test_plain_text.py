"""Text that looks like a template, a path or markup stays text through the whole daemon."""

import json

import pytest

import parsers
from harness import Daemon
from promptdrop import picture
from promptdrop.errors import RequestError
from promptdrop.request import parse


@pytest.mark.parametrize("suffix", [".txt", ".yaml", ".json"])
def test_templates_in_prompts_and_names_stay_text(daemon: Daemon, suffix: str) -> None:
    """Braces and percent signs, paths and markup mean nothing to us: they come back as they were."""
    prompt = "{job} {0.__class__.__mro__} %s %(prompt)s ${HOME} `id` ../../etc </x:xmpmeta><script>"
    text = {".txt": prompt, ".yaml": f"prompt: '{prompt}'", ".json": json.dumps({"prompt": prompt})}
    daemon.drop(f"{{seed}}%s..${{HOME}}{suffix}", text[suffix])
    daemon.drain()
    (folder,) = (path.name for path in daemon.outbox.iterdir() if path.is_dir())
    (sidecar,) = daemon.sidecars(folder)

    assert sidecar["request"]["prompt"] == prompt
    assert sidecar["image"]["file"] == f"{folder}-0001.png"
    assert prompt in (picture.read_parameters(daemon.outbox / folder / f"{folder}-0001.png") or "")
    assert not set(folder) & set("{}%$/")
    assert not any("Traceback" in line for line in daemon.log_file.read_text().splitlines())


def test_no_field_names_a_path(daemon: Daemon) -> None:
    """Only the dropped name, made safe, reaches a path; fields that look like paths are refused or text."""
    for field in ("format", "scheduler", "size"):
        with pytest.raises(RequestError):
            parse.parse(
                json.dumps({"prompt": "a", field: "../../x"}).encode(), ".json", parsers.CONFIG
            )
    daemon.drop("a.json", json.dumps({"prompt": "../x", "meta": {"../../y": "/etc/passwd"}}))
    daemon.drain()

    assert daemon.tree() == [
        "outbox/a/a-0001.json", "outbox/a/a-0001.png", "outbox/a/job.json", "outbox/a/request.json",
    ]  # fmt: skip
    assert daemon.sidecars("a")[0]["request"]["meta"] == {"../../y": "/etc/passwd"}
