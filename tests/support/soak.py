"""A long night in minutes: thousands of images, hundreds of SIGKILLs, people, and everything counted at the end.

    make soak                                    # 10,000 images, 500 kills, 3 engines, people
    python tests/support/soak.py --people --workers 3 --images 300 --kills 12 --seed 7

One seed decides what is dropped and what happens in which order; when it happens depends on the
machine. With --people other users drop, take, move and delete, if root runs it; else one user plays
them all. Short campaigns run in the suite (test_crash.py).
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accounts import ledger
from campaign import MEMORY_MIB, SETTINGS, Campaign
from crowded import CrowdedCampaign, crowded, is_flat
from gauges import Gauges
from harness import Daemon, merged

QUIET_IMAGES = 1500  # of the last phase, in which nothing is killed and the memory is watched


def main() -> None:
    """A campaign, then a quiet life; prints what was done and what was measured."""
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleaned up
    print(f"seed {given.seed}", flush=True)
    changes = {"engine": {"workers": given.workers}}
    began = time.monotonic()
    kind = _crowded if given.people else _alone
    with kind(given, changes) as campaign:
        campaign.deadline = began + given.minutes * 60
        try:
            campaign.run()
            lasted = time.monotonic() - began
            if isinstance(campaign, CrowdedCampaign):
                figures = _of_people(campaign, given.quiet)
            else:
                figures = _of_one(campaign, given.quiet)
        except BaseException:
            print(campaign.daemon.log_file.read_text()[-20000:], file=sys.stderr)
            status = campaign.daemon.status()
            told = {k: status.get(k) for k in ("state", "reason", "queue", "waiting")}
            print(json.dumps(told), json.dumps(campaign.done), file=sys.stderr)
            raise
    summary = {"seed": given.seed, "workers": given.workers, "kills": campaign.killed()}
    summary["deaths_of_the_daemon"] = len(campaign.deaths)
    print(json.dumps(summary | {"seconds": round(lasted), "did": campaign.done} | figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=45, help="stop making trouble after these")
    parser.add_argument("--workers", type=int, default=1, help="engines")
    parser.add_argument("--quiet", type=int, default=QUIET_IMAGES, help="images of the quiet life")
    parser.add_argument("--people", action="store_true", help="with other users around")
    parser.add_argument(
        "--without",
        default="",
        help="what people leave out, methods of crowd.py: take_lane,withdraw",
    )
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    return parser.parse_args()


@contextmanager
def _alone(given: argparse.Namespace, changes: dict[str, Any]) -> Iterator[Campaign]:
    with tempfile.TemporaryDirectory(prefix="promptdrop-soak-") as home:
        daemon = Daemon(Path(home), merged(SETTINGS, changes))
        try:
            yield Campaign(daemon, given.seed, given.images, given.kills)
        finally:
            if daemon.process and daemon.process.poll() is None:
                daemon.kill()


@contextmanager
def _crowded(given: argparse.Namespace, changes: dict[str, Any]) -> Iterator[Campaign]:
    with crowded(given.seed, given.images, given.kills, changes, given.without) as campaign:
        if not campaign.crowd.are_users:
            print("one user plays all people: only root can become others", flush=True)
        yield campaign


def _of_one(campaign: Campaign, quiet: int) -> dict[str, Any]:
    grown = campaign.growth_mib(quiet)
    assert grown <= MEMORY_MIB, f"the memory grew by {grown} MiB"
    return {
        "files": len(campaign.asked),
        "images": campaign.images_asked(),
        "grown_mib_in_last_half": round(grown, 1),
    }


def _of_people(campaign: CrowdedCampaign, quiet: int) -> dict[str, Any]:
    figures: dict[str, Any] = dict(campaign.figures)
    before, after = campaign.quiet_life(quiet)
    lives = [life for life in campaign.lives.values() if life]
    figures["lives"] = len(lives)
    figures["people"] = Counter(line["doing"] for line in ledger(campaign.daemon.home))
    figures["most_in_a_life"] = asdict(_most([gauges for life in lives for gauges in life]))
    figures["quiet_life"] = {"images": quiet, "before": asdict(before), "after": asdict(after)}
    assert is_flat(before, after), figures["quiet_life"]
    return figures


def _most(all_of_them: list[Gauges]) -> Gauges:
    return Gauges(
        max(one.rss_mib for one in all_of_them),
        *(
            max(getattr(one, n) for one in all_of_them)
            for n in ("descriptors", "threads", "watches")
        ),
    )


if __name__ == "__main__":
    main()
