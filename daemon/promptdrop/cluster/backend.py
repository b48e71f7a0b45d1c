"""Engines on the hosts of a Ray cluster: `engine.backend: ray`. The daemon itself imports no ray."""

import pickle
import secrets
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from promptdrop import fs, log
from promptdrop.config import Config
from promptdrop.errors import ConfigError
from promptdrop.loop import reason_of
from promptdrop.pool.link import EngineLink
from promptdrop.pool.messages import PACKET, Connected, Kill, Open, Release, Trouble
from promptdrop.pool.pool import Slot

KNOCK_SECONDS = 1.0  # for the head to answer, and between two checks that it does
RELEASE_SECONDS = 10.0  # for the gateway to give the devices back
CONNECT_SECONDS = 180.0  # for the gateway to connect: Ray itself gives up sooner
SILENCE_SECONDS = 15.0  # a gateway that has not said anything for so long counts as hung


def require_ray() -> None:
    """Raise ConfigError where ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError("engine.backend: ray: ray is not installed; pip install promptdrop[ray]")


def knock(address: str) -> None:
    """Connect to HOST:PORT and close again. Raises OSError: nobody listens there."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def actor_prefix(own: Path) -> str:
    """Return the prefix of the names of a spool's actors, by which the daemon's next life finds them.

    It is random and kept in the spool, because the names of machines are not unique and may change.

    Raises OSError: it can be neither read nor written.
    """
    file = own / "cluster"
    if not file.exists():
        fs.write_durably(file, secrets.token_hex(8).encode())
    return file.read_text()


class RemoteLife:
    """A Life on another host. It has ended when its socket is closed, by whichever end."""

    is_lost = True  # unless the relay reports that the engine alone has ended

    def __init__(self, link: socket.socket, cluster: "RayCluster", actor: str) -> None:
        self.socket = link
        self.socket.setblocking(False)
        self._cluster, self._actor = cluster, actor

    def ends(self) -> list[int]:
        return []

    def has_ended(self) -> bool:
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def how_it_ended(self) -> str:
        return "the way into the Ray cluster is lost"

    def kill(self) -> None:
        try:
            self._cluster.tell(Kill(self._actor))
        except OSError:
            pass  # the gateway is full or gone; losing it ends this life too

    def reap(self, seconds: float) -> bool:
        """Close the socket only: the engine stays warm for the daemon's next life."""
        self.socket.close()
        return True


class RayCluster:
    """A Backend that owns the gateway process, and restarts it when the cluster was lost."""

    def __init__(self, settings: Config, outlives: bool = True) -> None:
        """outlives: engines stay warm for the daemon's next life.

        Raises ConfigError: ray is not installed.
        """
        require_ray()
        self._workers = settings.engine.workers
        self._address = settings.ray.address
        self._retry_seconds = settings.watch.rescan_seconds
        self._gpus = 0.0 if settings.model.device == "cpu" else 1.0
        self._outlives = outlives
        self._own = settings.state
        self._prefix = ""  # of the actors' names; known once there is a gateway
        self._found: set[str] = set()  # actors that the daemon's earlier lives have left
        self._links: dict[str, EngineLink] = {}  # the last link to each actor
        self._left = 0  # the highest number of an actor that was left
        self.may_begin = False  # not before the gateway is connected
        self.trouble: str | None = None
        self._reason: str | None = None  # why the cluster is lost, by the gateway
        self._gateway: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._begin_at = 0.0
        self._silent_at = 0.0  # when the gateway is given up unless it says something

    def wanted(self, slots: list[Slot]) -> int:
        """Count the slots. With `auto`, one more than have found a host: that one waits for the next.

        Never fewer than the actors that earlier lives left, so that all of them are found again.
        """
        if self._workers != "auto":
            return self._workers
        return max(self._left, sum(1 for slot in slots if slot.link and slot.link.host) + 1)

    def begin(self, slot: Slot, settings: Config) -> EngineLink:
        settings = settings.model_copy(
            update={"folders": {}}
        )  # engines need no presets, and there may be any number
        if settings.model.device != "cpu":  # Ray shows each engine the device that it is to use
            model = settings.model.model_copy(update={"device": "cuda"})
            settings = settings.model_copy(update={"model": model})
        actor = f"{self._prefix}-{slot.number}"
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.tell(Open(actor, settings, self._gpus, self._outlives), theirs.fileno())
            except OSError:
                ours.close()
                raise
        link = EngineLink(RemoteLife(ours, self, actor), started=time.monotonic(), loads_since=None)
        self._links[actor] = link
        return link

    def is_hopeless(self, slots: list[Slot]) -> bool:
        """Return False: a host may come at any time."""
        return False

    def readers(self) -> list[int]:
        return [self._control.fileno()] if self._control else []

    def hear(self, now: float) -> None:
        if self._gateway is None:
            if now >= self._begin_at:
                self._begin(now)
            return
        if self._control is None:
            return
        try:
            while data := self._control.recv(PACKET):
                self._silent_at = now + SILENCE_SECONDS
                self._heed(pickle.loads(data))
        except BlockingIOError:
            if now < self._silent_at:
                return
            self._reason = "the way there hangs"
        except OSError:
            pass  # the gateway's end has reset the connection
        self._lose(now)

    def next_deadline(self) -> float:
        return self._begin_at if self._gateway is None else self._silent_at

    def move_deadlines(self, seconds: float) -> None:
        self._silent_at += seconds

    def tell(self, message: object, *descriptors: int) -> None:
        """Send a message to the gateway. Raises OSError: it does not take it."""
        if self._control:
            socket.send_fds(self._control, [pickle.dumps(message)], descriptors)

    def close(self) -> None:
        if self._gateway and self._control:
            if self.may_begin and (leaving := self._leaving()):
                try:
                    self.tell(Release(leaving))
                    self._control.shutdown(socket.SHUT_WR)
                    self._gateway.wait(RELEASE_SECONDS)
                except (OSError, subprocess.TimeoutExpired):
                    log.get().error("cluster.not_released", reason="the gateway did not answer")
            self._gateway.kill()
            self._gateway.wait()
            self._control.close()

    def _leaving(self) -> tuple[str, ...]:
        """Return the actors to end with the daemon.

        An actor that waits for a host is always one of them: it would take the host from others.
        """
        if not self._outlives:
            return tuple(self._found | self._links.keys())
        return tuple(actor for actor, link in self._links.items() if link.host is None)

    def _begin(self, now: float) -> None:
        """Start a gateway, from the daemon's main thread: the kernel ends it with that thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._prefix = actor_prefix(self._own)
            with theirs:
                self._gateway = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "promptdrop.cluster.gateway",
                        str(theirs.fileno()),
                        self._address,
                        self._prefix,
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    start_new_session=True,
                )
        except OSError as e:
            ours.close()
            self.trouble = f"the way into the Ray cluster cannot be opened: {reason_of(e)}"
            self._begin_at = now + self._retry_seconds
            return
        ours.setblocking(False)
        self._control = ours
        self._silent_at = now + CONNECT_SECONDS

    def _heed(self, message: object) -> None:
        """Act on a message of the gateway."""
        if isinstance(message, Connected):
            self.may_begin, self.trouble, self._reason = True, None, None
            log.get().info("cluster.connected", address=self._address)
            self._find(message.actors)
        elif isinstance(message, Trouble):
            self._reason = message.reason

    def _find(self, actors: tuple[str, ...]) -> None:
        """Remember which actors earlier lives have left, and end those beyond `engine.workers`."""
        numbers = {actor: int(actor.rpartition("-")[2]) for actor in actors}
        self._found |= numbers.keys()
        self._left = max(numbers.values(), default=0)
        if self._workers != "auto":
            workers = self._workers
            self.tell(Release(tuple(actor for actor, n in numbers.items() if n > workers)))

    def _lose(self, now: float) -> None:
        """Give the gateway up, and begin another one later."""
        assert self._gateway
        assert self._control
        self._gateway.kill()
        self._gateway.wait()
        self._control.close()
        self._gateway = self._control = None
        self.may_begin, self._begin_at = False, now + self._retry_seconds
        told = self.trouble
        self.trouble = f"the Ray cluster at {self._address} cannot be reached"
        if self._reason:
            self.trouble += f": {self._reason}"
        if self.trouble != told:
            log.get().error("cluster.lost", reason=self.trouble)
