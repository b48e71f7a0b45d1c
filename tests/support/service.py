"""promptdrop as a service of a machine with a real systemd."""

import json
from collections.abc import Callable
from typing import Any

import yaml

from harness import FAST, merged, until
from machine import Machine

PYTHON = "/opt/promptdrop/.venv/bin/python"


class Service:
    """promptdrop@NAME on the machine: its configuration, its spool, its drop-in."""

    def __init__(self, machine: Machine, name: str, changes: dict[str, Any]) -> None:
        self.machine, self.unit = machine, f"promptdrop@{name}.service"
        self.home = f"/srv/promptdrop/{name}"
        self.config = f"/etc/promptdrop/{name}.yaml"
        self._settings = merged(FAST, {"root": f"{self.home}/spool", **changes})
        machine.shell(f"install -d -o promptdrop -g promptdrop -m 2755 {self.home}")
        self.configure({})

    def configure(self, changes: dict[str, Any]) -> None:
        """Write the configuration, with more changes."""
        self._settings = merged(self._settings, changes)
        self.machine.write(self.config, yaml.safe_dump(self._settings))

    def override(self, *lines: str) -> None:
        """Write a drop-in, with shorter times than the unit's, or another command."""
        self.machine.write(
            f"/etc/systemd/system/{self.unit}.d/test.conf", "\n".join(("[Service]", *lines, ""))
        )
        self.machine.run("systemctl", "daemon-reload")

    def systemctl(self, verb: str, check: bool = True) -> int:
        """Run systemctl VERB. Returns its exit status."""
        return self.machine.run("systemctl", verb, self.unit, check=check).returncode

    def start(self) -> "Service":
        """Start the service. Returns once systemd says that it is up."""
        self.systemctl("start")
        return self

    def show(self, key: str) -> str:
        """A property of the unit."""
        return self.machine.show(self.unit, key)

    def drop(self, name: str, text: str) -> None:
        """Put a job file into the inbox."""
        self.machine.write(f"{self.home}/spool/inbox/.{name}", text)
        self.machine.shell(f"cd {self.home}/spool/inbox && mv .{name} {name}")

    def log(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of one event, read from the journal."""
        entries = [json.loads(line) for line in self.machine.journal(self.unit) if line[:1] == "{"]
        return [entry for entry in entries if entry["event"] == event]

    def until_log(self, event: str, times: int = 1) -> list[dict[str, Any]]:
        """Wait until an event was logged so often; returns its lines."""

        def found() -> list[dict[str, Any]] | None:
            lines = self.log(event)
            return lines if len(lines) >= times else None

        lines: list[dict[str, Any]] = until(found, f"{times} x {event}")
        return lines

    def read(self, path: str) -> dict[str, Any]:
        """A JSON document below the spool, or an empty mapping."""
        text = self.machine.shell(f"cat {self.home}/spool/{path} 2>/dev/null || true")
        document: dict[str, Any] = json.loads(text or "{}")
        return document

    def until_done(self, job: str) -> dict[str, Any]:
        """Wait for job.json."""
        document: dict[str, Any] = until(lambda: self.read(f"outbox/{job}/job.json"), job)
        return document

    def until_begun(self) -> None:
        """Wait until the engine works on an image."""
        begun = f"ls {self.home}/spool/.promptdrop/active/*/*.begun 2>/dev/null || true"
        until(lambda: self.machine.shell(begun), "an image in hand")


MakeService = Callable[..., Service]
