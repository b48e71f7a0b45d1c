"""Files that clients drop into a sub-folder of one daemon, and the count at the end of each test."""

import json
from pathlib import Path

from harness import Daemon, until

SETTLE_SECONDS = 1.0
IMAGES = 12  # a line each: half a file would be fewer
TEXT = "".join(f"a red fox, number {n}\n" for n in range(IMAGES))
JSON = json.dumps({"prompts": TEXT.splitlines()})
BIG = json.dumps({"prompts": ["a red fox " * 1900] * 50})  # 950 kB; cut anywhere, it does not parse
JUNK = ("Thumbs.db", ".DS_Store", "~$cat.txt", "cat.txt~", "photo.png", ".cat.txt.swp", "4913")
SETTINGS = {
    "watch": {"settle_seconds": SETTLE_SECONDS, "rescan_seconds": 0.5, "give_up_seconds": 1.5},
    "defaults": {"width": 64, "height": 64, "steps": 1},
}


ALL = {"one": IMAGES, "two_words": IMAGES, "deeper/drei_ü": IMAGES}


def count(daemon: Daemon, inbox: Path, jobs: dict[str, int], refused: int = 0) -> None:
    """Assert that just these jobs were claimed, each once, and done with so many images."""
    sub = inbox.name
    for name, images in jobs.items():
        summary = daemon.job(f"{sub}/{name}")
        assert (summary["outcome"], summary["totals"]["images"]) == ("done", images), name
    failed = daemon.failed / sub
    until(lambda: len(list(failed.rglob("*.error.json"))) >= refused, f"{refused} refusals")
    until(lambda: not _job_files(inbox), "an inbox without jobs")
    claims = [e for e in daemon.log("job.claimed") if e["file"].startswith(f"{sub}/")]
    summaries = list((daemon.outbox / sub).rglob("job.json"))

    assert len(list(failed.rglob("*.error.json"))) == refused
    assert (len(claims), len(summaries)) == (len(jobs), len(jobs))


def _job_files(inbox: Path) -> list[Path]:
    return [
        p for p in inbox.rglob("*")
        if p.suffix in (".txt", ".json", ".yaml") and p.name not in JUNK and p.name[0] != "."
    ]  # fmt: skip


def reason(daemon: Daemon, inbox: Path, file: str) -> str:
    """Why a file was refused."""
    return str(daemon.error(f"{inbox.name}/{file}")["error"])
