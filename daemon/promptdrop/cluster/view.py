"""The questions of `promptdrop cluster` to a Ray cluster, asked in the command's own process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from promptdrop.cluster import gateway
from promptdrop.cluster.gateway import connect, reason_of
from promptdrop.errors import PromptdropError


@dataclass(frozen=True, slots=True)
class Node:
    """A host of the cluster, alive or dead."""

    name: str
    address: str
    alive: bool
    gpus: int
    cores: int


def nodes(address: str) -> list[Node]:
    """List every host that the cluster knows, living ones first, without earlier lives of a host.

    Raises PromptdropError: the cluster cannot be reached.
    """
    with _connected(address):
        found = [_node(node) for node in ray.nodes()]  # type: ignore[no-untyped-call]  # ray's
    alive = [node for node in found if node.alive]
    dead = {node.address: node for node in found} | {node.address: None for node in alive}
    known = [*alive, *(node for node in dead.values() if node)]
    return sorted(known, key=lambda node: (not node.alive, node.name, node.address))


def release(address: str, prefix: str) -> int:
    """End the engines that a daemon left warm; returns how many there were.

    Raises PromptdropError: the cluster cannot be reached.
    """
    with _connected(address):
        named = gateway.actors(prefix)
        gateway.release(named)
    return len(named)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        connect(address)
        yield
    except (RayError, RuntimeError, OSError, ValueError) as e:
        raise PromptdropError(
            f"the Ray cluster at {address} cannot be reached: {reason_of(e)}"
        ) from e
    finally:
        ray.shutdown()


def _node(node: dict[str, Any]) -> Node:
    resources = node["Resources"]
    return Node(
        node["NodeManagerHostname"],
        node["NodeManagerAddress"],
        node["Alive"],
        int(resources.get("GPU", 0)),
        int(resources.get("CPU", 0)),
    )
