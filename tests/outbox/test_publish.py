"""Publishing an image: it becomes visible whole and once, its sidecar after it."""

import errno
import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import crash_at
from promptdrop import fs
from promptdrop.nouns import FORMATS, Request
from promptdrop.outbox import publish
from promptdrop.picture import read_parameters
from promptdrop.spool import claim, record
from promptdrop.spool.detail import Settled
from promptdrop.spool.job import Job
from promptdrop.spool.outbox import FolderLost
from promptdrop.spool.spool import Spool
from specs import spec
from spools import (
    SETTINGS,
    claimed_job,
    files_below,
    make_spool,
    publication,
    recovered,
    sidecar_of,
)


def job_in_hand(spool: Spool, images: int = 1) -> Job:
    """A job whose first image was begun."""
    job = claimed_job(spool, "cat.txt", images=images)
    claim.take(job)
    record.begin_image(job, 1)
    return job


def prepared(job: Job, **changes: Any) -> str:
    """Write the first image and its record, and no more; returns the temporary's name."""
    one = publication(job, **changes)
    one.prepare(job.outbox_folder)
    (temporary,) = (name for name in os.listdir(job.outbox_folder) if name.startswith("."))
    return temporary


def next_life(spool: Spool) -> Job:
    """Recover the spool, complete half-published images, and return its one job."""
    (job,), _ = recovered(spool)
    publish.recover(job, spool.outbox)
    return job


def test_an_image_comes_with_its_sidecar(spool: Spool) -> None:
    """The sidecar describes these bytes, the picture has these pixels; the image is no longer in hand."""
    job = job_in_hand(spool)
    file = publication(job).run(spool.outbox)
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
    file = publication(job, rendering=None, engine_name=None, error="too slow").run(spool.outbox)
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
        died = crash_at.dies_before(n, partial(publication(job).run, spool.outbox))
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
        died = crash_at.dies_before(n, partial(publication(job).run, spool.outbox))
        job = next_life(spool)
        if job.todo():
            rendered_again += 1
            assert job.deaths(1) == 1
            publication(job, attempt=2).run(spool.outbox)
        again = next_life(spool)

        assert again.todo() == []
        assert files_below(job.outbox_folder) == ["cat-0001.json", "cat-0001.png"]
        sidecar_of(job.outbox_folder / "cat-0001.png")
        assert not again.record_path(1, "publishing").exists()
    assert 0 < rendered_again < n - 1


def test_an_image_that_was_taken_before_its_sidecar_came_is_made_again(spool: Spool) -> None:
    """A reader who took it then has no sidecar: it never counted as published."""
    job = job_in_hand(spool)
    temporary = prepared(job)
    (job.outbox_folder / temporary).rename(spool.paths.root / "fetched.png")
    left = next_life(spool)

    assert left.todo() == [1]
    assert files_below(job.outbox_folder) == []
    assert not left.record_path(1, "publishing").exists()


def test_an_image_whose_folder_was_taken_before_its_sidecar_came_is_made_again(
    spool: Spool,
) -> None:
    """It is published into a folder that is made anew."""
    job = job_in_hand(spool)
    prepared(job)
    job.outbox_folder.rename(spool.paths.root / "fetched")
    left = next_life(spool)
    spool.outbox.renew(left)
    publication(left, attempt=2).run(spool.outbox)

    assert files_below(left.outbox_folder) == ["cat-0001.json", "cat-0001.png"]


def test_an_image_that_was_taken_after_its_sidecar_came_is_not_made_again(spool: Spool) -> None:
    """A sidecar of this image says that they stood together, also to the next life."""
    job = job_in_hand(spool)
    publication(job).run(spool.outbox)
    job.record_path(1, "published").rename(job.record_path(1, "publishing"))
    (job.outbox_folder / "cat-0001.png").rename(spool.paths.root / "fetched.png")
    left = next_life(spool)

    assert left.todo() == []
    assert files_below(job.outbox_folder) == ["cat-0001.json"]


def test_a_sidecar_is_written_once(spool: Spool) -> None:
    """An existing sidecar, written just before a crash, is kept as it is."""
    job = job_in_hand(spool)
    publication(job).run(spool.outbox)
    job.record_path(1, "published").rename(job.record_path(1, "publishing"))
    before = os.stat(job.outbox_folder / "cat-0001.json")
    left = next_life(spool)

    assert left.todo() == []
    assert os.stat(job.outbox_folder / "cat-0001.json") == before


def test_a_strangers_file_under_the_name_of_a_sidecar_stays(spool: Spool) -> None:
    """The image, which has its name already, is given the next one, so that both have one stem."""
    job = job_in_hand(spool)
    temporary = prepared(job)
    (job.outbox_folder / temporary).rename(job.outbox_folder / "cat-0001.png")
    (job.outbox_folder / "cat-0001.json").write_text("mine")
    left = next_life(spool)

    assert left.todo() == []
    assert (job.outbox_folder / "cat-0001.json").read_text() == "mine"
    assert files_below(job.outbox_folder) == ["cat-0001.json", "cat-0001~2.json", "cat-0001~2.png"]


def test_a_folder_that_moves_while_an_image_is_published_has_both(spool: Spool) -> None:
    """Image and sidecar stand together where the folder is by then, and no temporary stays."""
    job, fetched = job_in_hand(spool), spool.paths.root / "fetched"
    with spool.outbox.folder(job) as folder:
        publication(job).prepare(folder)
        job.outbox_folder.rename(fetched)
        publish.complete(job, 1, folder)

    assert files_below(fetched) == ["cat-0001.json", "cat-0001.png"]
    assert job.todo() == []


def test_a_reader_may_take_both_as_soon_as_they_stand_together(spool: Spool) -> None:
    """It is published, and not again, though nothing of it is left, nor the folder."""
    job, fetched = job_in_hand(spool), spool.paths.root / "fetched"
    fetched.mkdir()
    taking = threading.Thread(target=take_pair, args=(job.outbox_folder, fetched))
    taking.start()
    file = publication(job).run(spool.outbox)
    taking.join()

    assert job.states[1].file == file
    assert files_below(fetched) == ["cat-0001.json", "cat-0001.png"]
    assert not job.outbox_folder.exists()


def take_pair(folder: Path, target: Path) -> None:
    """Take an image and its sidecar in the moment in which that comes, and remove the folder."""
    sidecar = folder / "cat-0001.json"
    while not sidecar.exists():
        pass
    for path in (sidecar.with_suffix(".png"), sidecar):
        path.rename(target / path.name)
    folder.rmdir()


def test_a_folder_that_is_another_jobs_by_now_is_left_alone(spool: Spool) -> None:
    """What is published later goes to a folder of another name."""
    job = job_in_hand(spool, images=2)
    publication(job, 1).run(spool.outbox)
    job.outbox_folder.rename(spool.paths.root / "fetched")
    job.outbox_folder.mkdir()
    (job.outbox_folder / "job.json").write_text('{"schema": "promptdrop.job/1", "id": "another"}')
    second = publication(job, 2)
    with pytest.raises(FolderLost):
        second.run(spool.outbox)
    spool.outbox.renew(job)
    second.run(spool.outbox)

    assert job.folder == "cat~2"
    assert os.listdir(spool.paths.outbox / "cat") == ["job.json"]
    assert files_below(job.outbox_folder) == ["cat~2-0002.json", "cat~2-0002.png"]


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
    file = publication(job).run(spool.outbox)

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
    files = [publication(job, number).run(spool.outbox) for number in (1, 2)]

    assert [Path(file).stem for file in files] == ["cat", "cat~2"]
    for file in files:
        sidecar_of(job.outbox_folder / file)


def test_trouble_with_the_disk_leaves_nothing_in_the_outbox(spool: Spool) -> None:
    """While its record cannot be written, retries must not fill the outbox with temporaries."""
    job = job_in_hand(spool)
    one = publication(job)
    home = job.home
    home.rename(spool.paths.root / "away")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            one.run(spool.outbox)
    written = files_below(job.outbox_folder)
    (spool.paths.root / "away").rename(home)
    file = one.run(spool.outbox)

    assert written == []
    assert files_below(job.outbox_folder) == ["cat-0001.json", "cat-0001.png"]
    assert file == one.run(spool.outbox)  # the whole run may be repeated


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


def test_what_has_stood_is_not_published_again_after_trouble(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder could not be flushed after the sidecar came, and a reader has taken both since."""
    job, sync = job_in_hand(spool), fs.sync_directory
    one = publication(job)

    def sync_until_the_sidecar_comes(folder: Path) -> None:
        if (folder / "cat-0001.json").exists():
            raise OSError(errno.EMFILE, "too many open files", str(folder))
        sync(folder)

    monkeypatch.setattr(fs, "sync_directory", sync_until_the_sidecar_comes)
    with pytest.raises(OSError, match="too many open files"):
        one.run(spool.outbox)
    monkeypatch.setattr(fs, "sync_directory", sync)
    stood = files_below(job.outbox_folder)
    shutil.rmtree(job.outbox_folder)

    assert stood == ["cat-0001.json", "cat-0001.png"]
    assert one.run(spool.outbox) == "cat-0001.png"
    assert not job.outbox_folder.exists()
