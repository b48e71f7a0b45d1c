"""The daemon's connection to a Ray cluster, in a process of its own.

Ray ends a driver whose cluster is lost; here it ends only this process. The daemon starts it as
`python -m promptdrop.cluster.gateway FD ADDRESS PREFIX`. FD is a socket of packets, on which the daemon
says which engines to open and to kill. Each engine has a socket of its own, on which this process speaks
as an engine process does.
"""

import logging
import mmap
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at import

import ray
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]  # generated
from ray.exceptions import GetTimeoutError, RayError
from ray.util import list_named_actors

from promptdrop.clock import Presence
from promptdrop.cluster import actor as actor_module
from promptdrop.cluster import host as host_module
from promptdrop.cluster.backend import KNOCK_SECONDS, knock
from promptdrop.cluster.host import Host, Said
from promptdrop.engines.worker import die_with_parent
from promptdrop.pool.messages import (
    PACKET,
    Answer,
    Beat,
    Cancelled,
    CannotStart,
    Connected,
    Failed,
    Gone,
    Kill,
    Open,
    Placed,
    Release,
    Render,
    Rendered,
    Request,
    Stage,
    Trouble,
)
from promptdrop.version import __version__

ray.cloudpickle.register_pickle_by_value(actor_module)  # type: ignore[no-untyped-call]  # ray
# An actor that a daemon of 0.1.0 has left answers `hello` with a class of this module.
sys.modules["promptdrop.ray_host"] = host_module

NAMESPACE = "promptdrop"
LISTEN_SECONDS = 5.0  # an actor waits so long for something to report; after twice that it is lost
PLACE_SECONDS = 2.0  # between two looks whether a host was found
HELLO_SECONDS = 10.0  # an actor that has a host and does not answer for so long hangs
KNOCKS = 5  # the head is given up after so many failures in a row
KILL_SECONDS = 5.0  # until a host that does not kill its engine is killed itself


def main(fd: int, address: str, prefix: str) -> None:
    """Entry point of the gateway process. An exception that escapes in any thread ends it."""
    die_with_parent()
    threading.excepthook = _end
    control = socket.socket(fileno=fd)
    try:
        connect(address)
        found = actors(prefix)
    except (RayError, RuntimeError, OSError, ValueError) as e:
        control.send(pickle.dumps(Trouble(reason_of(e))))
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ray.init has set its own
        signal.signal(number, signal.SIG_IGN)
    control.send(pickle.dumps(Connected(found)))
    threading.Thread(target=_watch_head, args=(control,), name="watch", daemon=True).start()
    relays: dict[str, Relay] = {}
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, PACKET, 1)
        if not data:
            os._exit(0)  # the daemon is gone; its engines stay warm
        message = pickle.loads(data)
        if isinstance(message, Open):
            actor = before.left if (before := relays.get(message.actor)) else None
            relays[message.actor] = Relay(message, socket.socket(fileno=descriptors[0]), actor)
        elif isinstance(message, Kill) and (relay := relays.get(message.actor)):
            relay.kill()
        elif isinstance(message, Release):
            release(message.actors)


def _end(unknown: threading.ExceptHookArgs) -> None:
    """Thread excepthook: end the process. The daemon restarts the gateway."""
    sys.__excepthook__(unknown.exc_type, unknown.exc_value or Exception(), unknown.exc_traceback)
    os._exit(1)


def connect(address: str) -> None:
    """Become a driver of the cluster. Raises RayError, RuntimeError, OSError, ValueError."""
    if ":" in address:
        knock(address)  # ray.init would try for a minute and a half
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except ConnectionError as e:  # Ray says no more than that
        raise ConnectionError(
            f"{e}; somebody listens there: is the token of RAY_AUTH_TOKEN_PATH the cluster's,"
            f" and its Ray {ray.__version__}?"
        ) from e


def actors(prefix: str) -> tuple[str, ...]:
    """List the names of all actors with this prefix, with a host or without. Raises RayError."""
    return tuple(sorted(name for name in list_named_actors() if name.startswith(prefix)))


def release(names: Iterable[str]) -> None:
    """End the actors with these names; a name that is not there is ignored."""
    found = []
    for name in names:
        try:
            found.append(ray.get_actor(name))
        except (RayError, ValueError):
            pass  # it is not there
    end(found)


def end(actors: list[Any]) -> None:
    """Kill actors and wait until they are dead: ray.kill does not wait."""
    for actor in actors:
        ray.kill(actor)
    if asked := [actor.hello.remote() for actor in actors]:  # an error once the actor is dead
        ray.wait(asked, num_returns=len(asked), timeout=KILL_SECONDS, fetch_local=False)


def _watch_head(control: socket.socket) -> None:
    """Watch the head, in a thread. Ray itself takes a minute, and then ends the process silently."""
    address, failures = ray.get_runtime_context().gcs_address, 0
    while failures < KNOCKS:
        time.sleep(KNOCK_SECONDS)
        try:
            control.send(pickle.dumps(Beat()))
            knock(address)
            failures = 0
        except OSError as e:
            failures, reason = failures + 1, f"the head at {address} does not answer: {e}"
    control.send(pickle.dumps(Trouble(reason)))
    os._exit(1)


class Relay:
    """Carries one engine's link over the cluster, until the daemon or the engine ends."""

    def __init__(self, opened: Open, link: socket.socket, actor: Any) -> None:
        """actor: the one that an earlier engine has left, or None."""
        # The actor, kept for the next engine: Ray ends one without handles, unless it is detached.
        self.left: Any = None
        self._opened = opened
        self._link = link
        self._connection = Connection(link.fileno())
        self._sending = threading.Lock()
        self._is_closed = False  # the daemon has closed its end
        self._memories: dict[int, tuple[int, int]] = {}  # by ticket: descriptor, bytes
        self._actor: Any = actor
        self._listener: int | None = None
        threading.Thread(target=self._run, name=opened.actor, daemon=True).start()

    def kill(self) -> None:
        """Have the actor kill its engine; if it does not, kill the actor. Returns at once."""
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        try:
            if self._listener is not None:
                ray.get(self._actor.kill.remote(self._listener), timeout=KILL_SECONDS)
                return
        except RayError:
            pass
        self._is_closed = True
        if self._actor:  # else `_place` ends it
            end([self._actor])

    def _run(self) -> None:
        """Run the relay, in its own thread: place the actor, relay until one end closes, clean up."""
        inbound = threading.Thread(target=self._pass_on, name="inbound", daemon=True)
        try:
            if host := self._place():
                self._relay(host, inbound)
        except (RayError, OSError, ValueError) as e:  # ValueError: the named actor has just died
            self._send(Gone(reason_of(e), is_lost=True))
        self._listener = None
        self._link.shutdown(socket.SHUT_RDWR)
        if inbound.ident:
            inbound.join()
        for ticket in list(self._memories):
            self._forget(ticket)
        self._connection.close()
        self._link.detach()

    def _place(self) -> Host | None:
        """Find the actor, or make it and wait until it has a host.

        Returns None if the daemon has closed the link, or the actor does not answer.
        """
        gpus = self._opened.gpus
        if not self._actor:
            actor: Any = ray.remote(actor_module.HostActor)
            self._actor = actor.options(
                name=self._opened.actor,
                lifetime="detached" if self._opened.outlives else None,
                get_if_exists=True,
                max_restarts=0,
                max_concurrency=16,
                num_gpus=gpus,
                num_cpus=0 if gpus else 1,
                scheduling_strategy="SPREAD",
            ).remote(__version__)
        hello = self._actor.hello.remote()
        silent, stage = 0.0, f"waiting for a host with a free {'GPU' if gpus else 'core'}"
        while not self._is_closed and silent < HELLO_SECONDS:
            try:
                answer = ray.get(hello, timeout=PLACE_SECONDS)
                return answer if isinstance(answer, Host) else Host(*answer)
            except GetTimeoutError:
                # Private, but Ray Data uses it, too; the only public way is Ray's dashboard.
                has_host = self._actor._get_local_state() == ActorTableData.ActorState.ALIVE
                silent = silent + PLACE_SECONDS if has_host else 0.0
                if stage and not has_host:
                    self._send(Stage(stage))
                    stage = ""
        end([self._actor])
        reason = f"its actor has a host and did not answer for {silent:g} s"
        self._send(Gone(reason, is_lost=True))
        return None

    def _relay(self, host: Host, inbound: threading.Thread) -> None:
        """Attach to the actor, and pass its answers on until it or the daemon ends."""
        self._send(Placed(host.name, host.pid))
        if host.version != __version__:
            # The actor has loaded that version: another one needs a new process.
            end([self._actor])
            theirs, ours = host.version, __version__
            reason = f"runs promptdrop {theirs}, this daemon {ours}; install the same version there"
            self._send(CannotStart(f"{host.name} {reason}", 1))
            self._send(Gone(f"{host.name} {reason}", is_lost=True))
            return
        self._listener = ray.get(self._actor.attach.remote(self._opened.settings))
        inbound.start()
        while not self._is_closed:
            for answer, pixels in self._listen(host):
                if isinstance(answer, CannotStart):
                    answer = CannotStart(f"{host.name}: {answer.error}", answer.exit_status)
                elif isinstance(answer, (Rendered, Failed, Cancelled)):
                    self._forget(answer.ticket, pixels)
                if isinstance(answer, Gone) and not answer.is_lost:
                    self.left = self._actor
                self._send(answer)
                if isinstance(answer, Gone):
                    return

    def _listen(self, host: Host) -> list[Said]:
        """Return what the engine has said. A host that does not answer is reported as lost."""
        heard = self._actor.listen.remote(self._listener, LISTEN_SECONDS)
        silence = 2 * LISTEN_SECONDS
        presence = Presence(time.monotonic())
        while True:
            try:
                said: list[Said] = ray.get(heard, timeout=silence)
                return said
            except GetTimeoutError:
                if not presence.away(time.monotonic(), silence):  # else it was we who stood still
                    reason = f"{host.name} did not answer for {silence:g} s"
                    return [(Gone(reason, is_lost=True), None)]

    def _pass_on(self) -> None:
        """Pass the daemon's requests on, in order, as many at once as have come."""
        try:
            while True:
                requests = self._requests()
                ray.get(self._actor.tell.remote(self._listener, requests))
        except (EOFError, OSError):
            self._is_closed = True
        except RayError:
            pass  # the other thread has the same error, and reports it

    def _requests(self) -> list[Request]:
        """Wait for at least one request, and return all that have come."""
        requests: list[Request] = []
        while not requests or self._connection.poll():
            request: Request = self._connection.recv()
            if isinstance(request, Render):
                memory = recv_handle(self._connection)
                self._memories[request.ticket] = (
                    memory,
                    request.spec.height * request.spec.width * 3,
                )
            requests.append(request)
        return requests

    def _forget(self, ticket: int, pixels: bytes | None = None) -> None:
        """Close the memory of an image that has ended; its pixels, if any, are written there first."""
        memory, size = self._memories.pop(ticket)
        if pixels is not None:
            with mmap.mmap(memory, size) as ours:
                ours[:] = pixels
        os.close(memory)

    def _send(self, answer: Answer) -> None:
        try:
            with self._sending:
                self._connection.send(answer)
        except OSError:
            self._is_closed = True


def reason_of(error: Exception) -> str:
    """Return the line of one of Ray's errors that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "Error: " in lines[-1]:  # a traceback's end
        return lines[-1]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
