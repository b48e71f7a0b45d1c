"""The order in which an engine renders images, as the engine itself notes it."""

from harness import Daemon


def noted(daemon: Daemon, name: str) -> str:
    """Return a prompt whose image is noted under this name when it is rendered."""
    return f"!note {daemon.home}/order {name}"


def rendered_in_order(daemon: Daemon) -> list[str]:
    """Return the names noted so far, one for each image."""
    return (daemon.home / "order").read_text().split()
