"""`promptdrop cluster status` and `release`: show the hosts of `engine.backend: ray`, end engines."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from promptdrop.cli import options
from promptdrop.cli.status import place
from promptdrop.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from promptdrop.cluster.view import Node
    from promptdrop.config import Config
    from promptdrop.records import StatusEngine


def declare_action(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of each action."""
    parser.add_argument("--config", type=Path, metavar="FILE")


def status(arguments: argparse.Namespace) -> None:
    """Print the cluster's hosts, then the daemon's engines and what each renders."""
    from promptdrop.cli import client, terminal
    from promptdrop.spool.spool import Spool

    settings = _config(arguments)
    from promptdrop.cluster import view  # imports ray

    nodes = view.nodes(settings.ray.address)
    daemon = client.read_status(Spool(settings))
    _print_hosts(nodes)
    _print_engines(daemon.engines if daemon else ())
    if daemon is None:
        terminal.complain("no daemon runs on this spool")


def release(arguments: argparse.Namespace) -> None:
    """End the engines that this spool's last daemon left on the hosts.

    Raises UsageError: a daemon runs and uses them.
    """
    from promptdrop.cli import terminal
    from promptdrop.cluster.backend import actor_prefix
    from promptdrop.spool.spool import Spool

    settings = _config(arguments)
    if (pid := Spool(settings).lock.daemon_pid()) is not None:
        raise UsageError(f"a daemon runs on this spool (pid {pid}) and uses its engines; stop it")
    from promptdrop.cluster import view  # imports ray

    count = view.release(settings.ray.address, actor_prefix(settings.state))
    terminal.say(f"{count} engine{'s' * (count != 1)} released")


def _config(arguments: argparse.Namespace) -> "Config":
    """Load the configuration. Raises ConfigError: it names no cluster, or ray is missing."""
    from promptdrop.cluster.backend import require_ray

    settings = options.config(arguments)
    if settings.engine.backend != "ray":
        raise ConfigError("engine.backend: process: no cluster is configured; expected ray")
    require_ray()
    return settings


def _print_hosts(nodes: Sequence["Node"]) -> None:
    from promptdrop.cli import terminal

    rows = [
        (
            node.name,
            node.address,
            "alive" if node.alive else "dead",
            str(node.gpus),
            str(node.cores),
        )
        for node in nodes
    ]
    terminal.table(("host", "address", "state", "GPUs", "cores"), rows)


def _print_engines(engines: Sequence["StatusEngine"]) -> None:
    from promptdrop.cli import terminal

    rows = [
        (
            engine.name,
            engine.host or "",
            engine.device or "",
            engine.reason or engine.stage,
            place(engine.current) if engine.current else "",
        )
        for engine in engines
    ]
    if rows:
        terminal.table(("engine", "host", "device", "state", "rendering"), rows)
