"""WebDAV against the running daemon."""

import http.client
import time
from pathlib import Path

import servers
from clients import BIG, IMAGES, TEXT, count, reason
from harness import Daemon, until


def test_webdav(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """A client closes an empty file first and sends the content later; the file is taken whole."""
    with servers.webdav(running.inbox, tmp_path / "dav") as port:
        for name, pause in (("quick.txt", 0.0), ("slow.txt", 0.3)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest("PUT", f"/{inbox.name}/{name}")
            connection.putheader("Content-Length", str(len(TEXT)))
            connection.endheaders()
            for start in range(0, len(TEXT), 50):
                connection.send(TEXT[start : start + 50].encode())
                time.sleep(pause)
            assert connection.getresponse().status == 201
            connection.close()

        cut = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        cut.putrequest("PUT", f"/{inbox.name}/cut.json")
        cut.putheader("Content-Length", str(len(BIG)))
        cut.endheaders()
        cut.send(BIG[: len(BIG) // 2].encode())
        until((inbox / "cut.json").exists, "a part of it")
        cut.close()

        count(running, inbox, {"quick": IMAGES, "slow": IMAGES}, refused=1)
    assert "JSON" in reason(running, inbox, "cut.json")
