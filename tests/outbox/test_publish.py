"""Publishing an image: it becomes visible whole and once, its sidecar after it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import crash_at
from promptdrop.nouns import FORMATS, Request
from promptdrop.outbox import publish
from promptdrop.picture import read_parameters
from promptdrop.spool import claim, record, recovery
from promptdrop.spool.detail import Settled
from promptdrop.spool.job import Job
from promptdrop.spool.spool import Spool
from specs import spec
from spools import SETTINGS, claimed_job, files_below, make_spool, publication, sidecar_of


def job_in_hand(spool: Spool, images: int = 1) -> Job:
    """A job whose first image was begun."""
    job = claimed_job(spool, "cat.txt", images=images)
    claim.take(job)
    record.begin_image(job, 1)
    return job


def prepared(job: Job, **changes: Any) -> str:
    """Write the first image and its record, and no more; returns the temporary's name."""
    one = publication(job, **changes)
    one.prepare()
    (temporary,) = (name for name in os.listdir(job.outbox_folder) if name.startswith("."))
    return temporary


def next_life(spool: Spool) -> Job:
    """Recover the spool, complete half-published images, and return its one job."""
    (job,), _ = recovery.recover(spool)
    publish.recover(job)
    return job


def test_an_image_comes_with_its_sidecar(spool: Spool) -> None:
    """The sidecar describes these bytes, the picture has these pixels; the image is no longer in hand."""
    job = job_in_hand(spool)
    file = publication(job).run()
    image = job.outbox_folder / file
    sidecar = sidecar_of(image)

    assert files_below(job.outbox_folder) == ["cat-0001.json", "cat-0001.png"]
    assert sidecar["outcome"] == "rendered"
    assert sidecar["request"]["seed"] == job.specs[0].seed
    assert sidecar["time"]["published"]
    with Image.open(image) as picture:
        assert picture.tobytes() == bytes([1]) * (64 * 64 * 3)
    assert "Seed: 7" in (read_parameters(image) or "")
    assert job.states[1].file == file
    assert job.todo() == []
    assert not job.record_path(1, "begun").exists()


def test_a_placeholder_says_so(spool: Spool) -> None:
    """Its sidecar says so and has no figures of a rendering; the error is kept for job.json."""
    job = job_in_hand(spool)
    file = publication(job, rendering=None, engine_name=None, error="too slow").run()
    sidecar = sidecar_of(job.outbox_folder / file)

    assert sidecar["outcome"] == "placeholder"
    assert (sidecar["evaluations"], sidecar["latency_ms"]["render"]) == (0, None)
    assert "error" not in sidecar
    assert (job.states[1].outcome, job.states[1].error) == ("placeholder", "too slow")


def test_nothing_is_visible_before_it_is_whole(spool: Spool) -> None:
    """At every change to the disk an image under its name is whole, and a sidecar has its image."""
    n, died, seen = 0, True, set()
    while died:
        n += 1
        job = claimed_job(spool, f"cat{n}.txt")
        claim.take(job)
        died = crash_at.dies_before(n, publication(job).run)
        visible = [name for name in files_below(job.outbox_folder) if not name.startswith(".")]
        seen.add(tuple(Path(name).suffix for name in visible))
        images = [name for name in visible if name.endswith(".png")]
        for name in images:
            with Image.open(job.outbox_folder / name) as picture:
                picture.load()
        for name in visible:
            assert name in images or f"{Path(name).stem}.png" in images

    assert seen == {(), (".png",), (".json", ".png")}


def test_a_publication_that_is_cut_short_is_completed_once(tmp_path: Path) -> None:
    """Whenever the daemon dies, the same image is published, or, before its record, another attempt is made."""
    n, died, rendered_again = 0, True, 0
    while died:
        n += 1
        spool = make_spool(tmp_path / str(n))
        spool.folders.init()
        job = job_in_hand(spool)
        died = crash_at.dies_before(n, publication(job).run)
        job = next_life(spool)
        if job.todo():
            rendered_again += 1
            assert job.deaths(1) == 1
            publication(job, attempt=2).run()
        again = next_life(spool)

        assert again.todo() == []
        assert files_below(job.outbox_folder) == ["cat-0001.json", "cat-0001.png"]
        sidecar_of(job.outbox_folder / "cat-0001.png")
        assert not again.record_path(1, "publishing").exists()
    assert 0 < rendered_again < n - 1


def test_an_image_that_was_taken_away_is_not_made_again(spool: Spool) -> None:
    """If a reader fetched it before its sidecar was written, it counts as published."""
    job = job_in_hand(spool)
    temporary = prepared(job)
    (job.outbox_folder / temporary).rename(spool.paths.root / "fetched.png")
    left = next_life(spool)

    assert left.todo() == []
    assert left.states[1].file == "cat-0001.png"
    assert files_below(job.outbox_folder) == []


def test_a_folder_that_was_taken_away_takes_its_image_with_it(spool: Spool) -> None:
    """An image whose record was written counts as published, even if its folder is gone."""
    job = job_in_hand(spool)
    prepared(job)
    job.outbox_folder.rename(spool.paths.root / "fetched")

    assert next_life(spool).todo() == []


def test_a_sidecar_is_written_once(spool: Spool) -> None:
    """An existing sidecar, written just before a crash, is kept as it is."""
    job = job_in_hand(spool)
    temporary = prepared(job)
    (job.outbox_folder / temporary).rename(job.outbox_folder / "cat-0001.png")
    (job.outbox_folder / "cat-0001.json").write_text("mine")
    left = next_life(spool)

    assert left.todo() == []
    assert (job.outbox_folder / "cat-0001.json").read_text() == "mine"


def test_a_torn_record_is_another_attempt(spool: Spool) -> None:
    """If a disk that lied about fsync tore it, the image is rendered again; its temporary is removed."""
    job = job_in_hand(spool)
    prepared(job)
    job.record_path(1, "publishing").write_text('{"image": ')
    left = next_life(spool)

    assert left.todo() == [1]
    assert files_below(job.outbox_folder) == []
    assert not left.record_path(1, "publishing").exists()


def test_somebodys_file_under_the_name_stays(spool: Spool) -> None:
    """The image is NAME~2, and so is its sidecar."""
    job = job_in_hand(spool)
    (job.outbox_folder / "cat-0001.png").write_text("mine\n")
    file = publication(job).run()

    assert file == "cat-0001~2.png"
    assert (job.outbox_folder / "cat-0001.png").read_text() == "mine\n"
    sidecar_of(job.outbox_folder / file)


@pytest.mark.parametrize("format_", FORMATS)
def test_one_stem_has_one_sidecar(spool: Spool, format_: str) -> None:
    """An image whose stem is taken by an image of another format gets another stem."""
    (spool.paths.inbox / "cat.txt").write_text("a\n")
    other = "jpeg" if format_ == "png" else "png"
    specs = spec(format=format_), spec(image=2, format=other)
    same_name = SETTINGS.output.model_copy(update={"name": "cat"})
    claimed = claim.claim(spool, "", "cat.txt")
    job = claim.resolve(
        spool,
        claimed,
        Request(specs),
        Settled(0.0, spool.boot),
        settings=type(SETTINGS)(SETTINGS.prompt, same_name, 3, "fail"),
    )
    files = [publication(job, number).run() for number in (1, 2)]

    assert [Path(file).stem for file in files] == ["cat", "cat~2"]
    for file in files:
        sidecar_of(job.outbox_folder / file)


def test_trouble_with_the_disk_writes_the_pixels_once(spool: Spool) -> None:
    """While its record cannot be written, retries must not fill the outbox with temporaries."""
    job = job_in_hand(spool)
    one = publication(job)
    home = job.home
    home.rename(spool.paths.root / "away")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            one.run()
    written = files_below(job.outbox_folder)
    (spool.paths.root / "away").rename(home)
    file = one.run()

    assert len(written) == 1
    assert files_below(job.outbox_folder) == ["cat-0001.json", "cat-0001.png"]
    assert file == one.run()  # the whole run may be repeated


def test_the_sidecar_has_what_was_recorded_before_the_crash(spool: Spool) -> None:
    """The next life does not know the engine, so the record holds the whole sidecar."""
    job = job_in_hand(spool)
    prepared(job, engine_name="engine-7", attempt=3)
    recorded = json.loads(job.record_path(1, "publishing").read_bytes())
    next_life(spool)
    sidecar = sidecar_of(job.outbox_folder / "cat-0001.png")

    assert (sidecar["device"]["engine"], sidecar["job"]["attempt"]) == ("engine-7", 3)
    assert sidecar["window"] == recorded["window"]
    assert sidecar["image"]["sha256"] == recorded["image"]["sha256"]
