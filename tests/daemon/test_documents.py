"""The documents that the daemon writes for programs: status.json, sidecars, job.json."""

import json
import subprocess
import sys
from typing import Any

from harness import Daemon, jsonl

SIDECAR: dict[str, Any] = {
    "schema": None, "outcome": None,
    "job": {"id", "name", "file", "image", "images", "attempt"},
    "image": {"file", "format", "width", "height", "bytes", "sha256"},
    "request": {"prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance_scale", "scheduler", "meta"},
    "prompt": {"text", "tokens", "truncated"},
    "model": {"id", "revision", "dtype", "quantization", "compiled"},
    "evaluations": None, "batch": None,
    "latency_ms": {"queued", "encode", "denoise", "decode", "transfer", "render", "save", "total"},
    "steps_ms": None,
    "window": {"images", "p50_ms", "p95_ms", "p99_ms", "images_per_second", "utilization_percent"},
    "device": {"name", "utilization_percent", "memory_allocated_mib", "memory_reserved_mib", "memory_peak_mib"},
    "time": {"claimed", "started", "published"},
    "host": None, "version": None,
}  # fmt: skip


def test_status_json_is_what_the_schema_says(daemon: Daemon) -> None:
    """Every required key is there and no unknown one; without a daemon the exit status is 1."""
    go = daemon.home / "go"
    daemon.drop("a.jsonl", jsonl("first", f"!wait {go}"))
    daemon.start()
    daemon.until_status("image 2 in hand", lambda s: s["current"] and s["current"]["image"] == 2)
    shown = daemon.run("status", "--json")
    people = daemon.run("status")
    go.touch()
    printed = subprocess.run(
        [sys.executable, "-m", "promptdrop", "schema", "status"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    schema = json.loads(printed.stdout)
    document = json.loads(shown.stdout)
    daemon.stop()
    alone = daemon.run("status")

    assert (shown.returncode, people.returncode) == (0, 0)
    assert set(schema["required"]) <= set(document) <= set(schema["properties"])
    assert document["schema"] == "promptdrop.status/1"
    assert document["current"]["file"] == "a.jsonl"
    for key in ("engine", "queue", "window"):
        name = schema["properties"][key]["$ref"].rpartition("/")[2]
        assert set(document[key]) == set(schema["$defs"][name]["properties"])
    assert "a.jsonl 2/2" in people.stdout
    assert alone.returncode == 1
    assert "no daemon" in alone.stderr


def test_sidecar_and_summary_have_the_contract_s_keys(daemon: Daemon) -> None:
    """The keys are those of sections 2 and 4 of the contract, in their order."""
    daemon.drop(
        "a.yaml", 'prompt: "a cat"\nmeta: {who: me, n: 3}\nnegative_prompt: dull\ncount: 2\n'
    )
    daemon.drain()
    job = daemon.job("a")
    first, second = daemon.sidecars("a")
    names = sorted(p.name for p in (daemon.outbox / "a").iterdir())

    for sidecar in (first, second):
        assert set(SIDECAR) <= set(sidecar)
        for key, keys in SIDECAR.items():
            assert keys is None or keys <= set(sidecar[key]), key
    assert names == [
        "a-0001.json", "a-0001.png", "a-0002.json", "a-0002.png", "job.json", "request.yaml",
    ]  # fmt: skip
    assert first["request"]["meta"] == {"who": "me", "n": 3}
    assert first["job"] == {
        "id": job["id"], "name": "a", "file": "a.yaml", "image": 1, "images": 2, "attempt": 1,
    }  # fmt: skip
    assert first["latency_ms"]["total"] >= first["latency_ms"]["render"]
    assert len(first["steps_ms"]) == first["evaluations"] == 3
    assert first["device"]["memory_peak_mib"] is None
    assert job["schema"] == "promptdrop.job/1"
    assert [i["file"] for i in job["images"]] == ["a-0001.png", "a-0002.png"]
    assert {"image", "file", "seed", "outcome", "error"} <= set(job["images"][0])


def test_one_sidecar_for_each_image(daemon: Daemon) -> None:
    """A stranger's JSON under a sidecar's name stays; the image and its sidecar take the next."""
    daemon.run("pause")
    daemon.start().until_ready()
    daemon.drop("a.txt", "a cat\n")
    daemon.until_log("job.claimed")
    stranger = daemon.outbox / "a" / "a-0001.json"
    stranger.write_text("{}")
    daemon.run("resume")
    files = [image["file"] for image in daemon.job("a")["images"]]

    assert files == ["a-0001~2.png"]
    assert (daemon.outbox / "a" / "a-0001~2.json").exists()
    assert stranger.read_text() == "{}"
    assert daemon.stop() == 0


def test_the_status_counts_evaluations(daemon: Daemon) -> None:
    """While heun renders, the status says step k of 2N - 1. It is slow, as the status is written every second."""
    daemon.start()
    daemon.drop("a.yaml", "prompt: '!slow 0.6 a cat'\nscheduler: heun\nsteps: 4\n")
    current = daemon.until_status(
        "an image at step 5", lambda s: s["current"] and s["current"]["step"] >= 5
    )["current"]

    assert current["steps"] == 7
