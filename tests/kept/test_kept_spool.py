"""A spool kept from 0.1.0 goes on: its jobs keep their recorded seeds and settings, each image once.

The spool was made by that version (make_spool.py) and is unpacked here for today's daemon, whose
configuration differs from the recorded one in all that a job keeps.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness import Daemon

ARCHIVE = Path(__file__).with_name("spool-0.1.0.tar.gz")
TODAY: dict[str, Any] = {
    "watch": {"settle_seconds": 0.02, "rescan_seconds": 0.1, "give_up_seconds": 0.05},
    "engine": {"warmup": [], "max_attempts": 1, "image_timeout_seconds": 50},
    "prompt": {"max_tokens": 512, "overflow": "keep_head"},
    "defaults": {"width": 64, "height": 96, "steps": 5},
    "output": {"format": "png", "quality": 92, "name": "{job}-{image:04d}", "mode": "0664"},
}
# A prompt `!once-FAULT FLAG ...` does no more harm once the file FLAG is there.
CURED = ("charged", "inhand", "told", "returning", "partly", "stopped", "failing")
DONE = {"finished", "unsummed"}  # jobs of which no image is left to render
RENDERED = {  # folder in the outbox -> images that 0.1.0 left to be rendered
    "inhand": [2, 3, 4],
    "unnamed": [3],
    "sub/bare": [3],
    "waiting": [1, 2, 3, 4, 5, 6, 7],
    "told": [1],
    "returning": [2],
    "claimed": [1],
    "later": [1],
}
PARKED = {  # ... and those that wait for `retry`
    "sub/partly": [2],
    "stopped": [2, 3],
    "failing": [2],
    "sub/unwanted": [1],
    "withdrawn": [1],
}
TODAYS = {"claimed", "later"}  # jobs of which nothing was recorded
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def kept(make_daemon: Callable[..., Daemon]) -> Daemon:
    """Today's daemon, not started, on the spool of 0.1.0."""
    daemon = make_daemon(TODAY)
    with tarfile.open(ARCHIVE) as archive:
        # Like filter="data", which Python has since 3.11.4: owners do not matter.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(daemon.root)
        for member in archive:  # the filter makes folders as the umask says
            os.chmod(daemon.root / member.name, member.mode)
    for flag in CURED:
        (daemon.home / f"{flag}.flag").touch()
    return daemon


def records(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """The request.json that 0.1.0 recorded of each job, by the job's folder in the outbox."""
    read = [json.loads(p.read_bytes()) for p in daemon.own.glob("*/*/request.json")]
    return {record["folder"]: record for record in read}


def pictures(daemon: Daemon) -> dict[str, bytes]:
    """Every visible image in the outbox, by its path there."""
    return {
        str(path.relative_to(daemon.outbox)): path.read_bytes()
        for path in daemon.outbox.rglob("*.*")
        if path.suffix in (".webp", ".png") and not path.name.startswith(".")
    }


def sidecars(daemon: Daemon) -> dict[str, dict[int, dict[str, Any]]]:
    """Every sidecar, by folder and number of the image, each of them once."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in daemon.outbox.rglob("*.json"):
        sidecar = json.loads(path.read_bytes())
        if sidecar["schema"] == "promptdrop.image/1":
            images = found.setdefault(str(path.parent.relative_to(daemon.outbox)), {})
            assert sidecar["job"]["image"] not in images, f"{path}: twice"
            images[sidecar["job"]["image"]] = sidecar
    return found


def rendered(daemon: Daemon, *jobs: dict[str, list[int]]) -> list[tuple[str, int]]:
    """The images that today's daemon has rendered itself, in order, or would render of these jobs."""
    if jobs:
        return sorted((folder, n) for some in jobs for folder in some for n in some[folder])
    return sorted((file.rpartition("/")[0], image) for file, image in daemon.published())


def drain(daemon: Daemon) -> None:
    """Run today's daemon until nothing is left to do, and nothing hidden either."""
    done = daemon.drain()
    hidden = [*daemon.root.rglob(".promptdrop-*"), *daemon.own.glob("finished/*")]

    assert done.returncode == 0, done.stderr[-4000:]
    assert (daemon.unfinished(), hidden) == ([], [])
    assert list((daemon.own / "control").iterdir()) == [], "a command was not obeyed"


def assert_as_recorded(daemon: Daemon, record: dict[str, Any], numbers: list[int]) -> None:
    """Assert that a job's folder has just these images, under the recorded names and as recorded."""
    folder, output, texts = record["folder"], record["settings"]["output"], record["texts"]
    found = sidecars(daemon).get(folder, {})
    assert sorted(found) == numbers, folder
    for number in numbers:
        spec, sidecar = record["images"][number - 1], found[number]
        name = output["name"].format(job=folder.rpartition("/")[2], seed=spec["seed"], image=number)
        path = daemon.outbox / folder / f"{name}.{spec['format']}"
        data = path.read_bytes()
        same = ("seed", "width", "height", "steps", "guidance_scale", "scheduler")
        assert [sidecar["request"][key] for key in same] == [spec[key] for key in same], path
        assert sidecar["request"]["prompt"] == texts[spec["prompt"]]
        assert sidecar["job"]["id"] == record["id"]
        assert sidecar["image"]["file"] == path.name
        assert sidecar["image"]["sha256"] == hashlib.sha256(data).hexdigest(), path
        assert path.stat().st_mode & 0o777 == int(output["mode"], 8), path
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (spec["width"], spec["height"]), path
            assert image.format == spec["format"].upper(), path


def assert_gone_on(daemon: Daemon, made: dict[str, dict[str, Any]], old: dict[str, bytes]) -> None:
    """Assert that every recorded job was completed once, as recorded, and older files are unchanged."""
    outcomes = {
        str(path.parent.relative_to(daemon.outbox)): json.loads(path.read_bytes())["outcome"]
        for path in daemon.outbox.rglob("job.json")
    }
    now = pictures(daemon)

    assert rendered(daemon) == rendered(daemon, RENDERED)
    assert {path: now.get(path) for path in old} == old, "rendered again"
    for folder, record in made.items():
        numbers = set(range(1, len(record["images"]) + 1)) - set(PARKED.get(folder, []))
        assert_as_recorded(daemon, record, sorted(numbers))
    assert {folder for folder in outcomes if outcomes[folder] == "done"} == {*RENDERED, *DONE}
    assert {folder for folder in outcomes if outcomes[folder] != "done"} == {*PARKED}
    partial = {folder for folder in PARKED if outcomes[folder] == "partial"}
    cancelled = {folder for folder in PARKED if outcomes[folder] == "cancelled"}
    assert partial == {"sub/partly", "failing"}
    assert cancelled == {"stopped", "sub/unwanted", "withdrawn"}
    assert sum(map(len, sidecars(daemon).values())) == len(now)


def change_records(daemon: Daemon, pattern: str, change: Change) -> None:
    """Change JSON of the daemon's own, in place."""
    found = list(daemon.own.glob(pattern))
    assert found, pattern
    for path in found:
        record = json.loads(path.read_bytes())
        change(record)
        path.write_text(json.dumps(record))


def test_a_kept_spool_goes_on(kept: Daemon) -> None:
    """Published images stay as they are; what is missing comes out once, with the recorded seed, size,
    steps, format, name, mode, prompt limit and attempts; what was half done is completed; commands are
    obeyed; a claim that was not resolved, and a drop that was not claimed, get today's settings."""
    made, old = records(kept), pictures(kept)
    (claimed,) = (path.parents[1].name for path in kept.own.glob("pending/*/drop/claimed.txt"))
    (half,) = (path.read_bytes() for path in kept.outbox.glob("unnamed/.promptdrop-*"))

    drain(kept)
    images, waiting = sidecars(kept), made["waiting"]

    assert_gone_on(kept, made, old)
    assert (kept.outbox / "unnamed" / "unnamed-200-2.webp").read_bytes() == half
    assert images["inhand"][2]["job"]["attempt"] == 2, "a charged attempt was forgotten"
    assert images["waiting"][6]["job"]["attempt"] == 2, "the recorded max_attempts is 2"
    assert images["waiting"][7]["prompt"] == {
        "text": "three four five six seven eight nine ten", "tokens": 16, "truncated": True,
    }  # fmt: skip
    assert [images["waiting"][n]["request"]["seed"] for n in range(1, 8)] == [
        seed_of(waiting["id"], 1), 2**63 - 1, *(seed_of(waiting["id"], n) for n in (3, 4, 5)), 5, 6,
    ]  # fmt: skip
    assert images["waiting"][2]["request"]["meta"] == {"shot": 2}
    assert images["waiting"][4]["request"]["negative_prompt"] == "no"
    assert images["claimed"][1]["request"]["seed"] == seed_of(claimed, 1)
    for folder in TODAYS:
        request = images[folder][1]["request"]
        assert [request[key] for key in ("width", "height", "steps")] == [64, 96, 5]
        assert images[folder][1]["image"]["file"] == f"{folder}-0001.png"
    assert sorted(p.name for p in kept.failed.rglob("*") if p.suffix != ".json") == [
        "failing.yaml", "partly.yaml", "refused.yaml", "refusing.yaml", "stopped.yaml", "sub",
        "unwanted.txt", "withdrawn.txt",
    ]  # fmt: skip
    assert kept.error("refusing.yaml")["outcome"] == "refused"
    assert kept.error("failing.yaml")["missing"] == [2]


def seed_of(job: str, image: int) -> int:
    """The seed of an image that names none, as 0.1.0 documents it."""
    return int.from_bytes(hashlib.sha256(f"{job}:{image}".encode()).digest()[:4], "big")


def test_what_is_parked_waits_for_retry(kept: Daemon) -> None:
    """It renders only what is missing, into the same folder, with the same id, seeds and settings; a
    refused file is read afresh, under today's settings."""
    made = records(kept)
    drain(kept)
    old, before = pictures(kept), len(kept.published())
    (kept.failed / "refused.yaml").write_text("prompt: now everybody knows it\n")
    names = ["sub/partly.yaml", "stopped.yaml", "failing.yaml", "sub/unwanted.txt", "withdrawn.txt"]

    told = kept.run("retry", *names, "refused.yaml")
    drain(kept)
    now = pictures(kept)
    new = sorted((file.rpartition("/")[0], n) for file, n in kept.published()[before:])

    assert told.returncode == 0, told.stderr
    assert new == rendered(kept, PARKED, {"refused": [1]})
    assert {path: now.get(path) for path in old} == old, "rendered again"
    for folder, record in made.items():
        assert_as_recorded(kept, record, list(range(1, len(record["images"]) + 1)))
        job = kept.job(folder)
        assert (job["id"], job["outcome"]) == (record["id"], "done")
    assert sidecars(kept)["refused"][1]["image"]["file"] == "refused-0001.png"
    assert sorted(p.name for p in kept.failed.glob("**/*.*")) == [
        "refusing.yaml",
        "refusing.yaml.error.json",
    ]
    assert list((kept.own / "parked").iterdir()) == []


def test_what_a_record_lacks_has_a_default(kept: Daemon) -> None:
    """Keys that no picture, name or place depends on may be missing, as a key added later is."""
    made, old = records(kept), pictures(kept)

    def thin(record: dict[str, Any]) -> None:
        for key in ("inode", "priority", "settled"):
            del record[key]
        for image in record["images"]:
            del image["negative_prompt"], image["meta"]

    def only(*keys: str) -> Change:
        def change(record: dict[str, Any]) -> None:
            for key in record.keys() - set(keys):
                del record[key]

        return change

    def thin_failing(plan: dict[str, Any]) -> None:
        for key in ("problems", "id", "folder", "missing"):
            del plan["record"][key]

    change_records(kept, "*/*/request.json", thin)
    change_records(kept, "*/*/*.published", only("outcome", "image"))
    change_records(kept, "*/*/*.begun", only())
    change_records(kept, "*/*/*.failed", only())
    change_records(kept, "*/*/failing.json", thin_failing)
    drain(kept)

    assert_gone_on(kept, made, old)


def test_what_a_later_version_added_is_passed_over(kept: Daemon) -> None:
    """Unknown keys in any record are ignored if the spool has the same version."""
    made, old = records(kept), pictures(kept)

    def thicken(record: dict[str, Any]) -> None:
        for value in list(record.values()):
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, dict):
                    thicken(inner)
        record["of_a_later_version"] = {"a": 1}

    change_records(kept, "*/*/request.json", thicken)
    for kind in ("published", "publishing", "begun", "failed"):
        change_records(kept, f"*/*/*.{kind}", thicken)
    change_records(kept, "*/*/failing.json", thicken)
    change_records(kept, "control/*.json", thicken)
    change_records(kept, "status.json", thicken)
    drain(kept)

    assert_gone_on(kept, made, old)


@pytest.mark.parametrize("key", ["seed", "width", "texts", "max_attempts"])
def test_a_record_that_lacks_what_has_no_default_is_read_again(kept: Daemon, key: str) -> None:
    """It is treated like a torn record: the file is read again, and other jobs are not affected."""

    def tear(record: dict[str, Any]) -> None:
        if record["file"] == "waiting.jsonl":
            for piece in (record, record["settings"], record["images"][2]):
                piece.pop(key, None)

    made, old = records(kept), pictures(kept)
    del made["waiting"]
    (kept.home / "waiting.flag").touch()  # today's max_attempts is 1
    change_records(kept, "pending/*/request.json", tear)
    drain(kept)
    (again,) = (s for folder, s in sidecars(kept).items() if folder.startswith("waiting"))
    now = pictures(kept)

    assert sorted(again) == RENDERED["waiting"]
    assert again[1]["request"]["height"] == 96
    assert {path: now.get(path) for path in old} == old, "rendered again"
    for folder, record in made.items():
        numbers = set(range(1, len(record["images"]) + 1)) - set(PARKED.get(folder, []))
        assert_as_recorded(kept, record, sorted(numbers))
