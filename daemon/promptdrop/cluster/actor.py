"""The Ray actor on a host of the cluster, which says what version of promptdrop is installed there.

The gateway has Ray pickle this module by value, so that it runs on a host whose promptdrop has other
modules. For the same reason it imports nothing of promptdrop at its top, and `hello`
answers with types that every version can read.
"""

import os
import socket
from typing import Any


class HostActor:
    """Keeps an EngineHost, if promptdrop has the daemon's version here. Several calls may run at once."""

    def __init__(self, version: str) -> None:
        """version: the daemon's. Raises ImportError: the installed package is broken."""
        import promptdrop

        self._version = promptdrop.__version__
        self._host: Any = None
        if self._version == version:
            from promptdrop.cluster.host import EngineHost

            self._host = EngineHost()

    def hello(self) -> tuple[str, int, str]:
        """Return host name, process id and installed version. Answered once the actor has a host."""
        return socket.gethostname(), os.getpid(), self._version

    def attach(self, settings: Any) -> Any:
        """See EngineHost.attach."""
        return self._host.attach(settings)

    def tell(self, listener: int, requests: Any) -> None:
        """See EngineHost.tell."""
        self._host.tell(listener, requests)

    def listen(self, listener: int, seconds: float) -> Any:
        """See EngineHost.listen."""
        return self._host.listen(listener, seconds)

    def kill(self, listener: int) -> None:
        """See EngineHost.kill."""
        self._host.kill(listener)
