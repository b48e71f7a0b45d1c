"""The units on a real systemd: start, reload, watchdog, stop, restart, and what the sandbox denies."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import FAST, REPOSITORY, merged, needs_systemd_analyze, until
from machine import Machine, installation

SYSTEMD = REPOSITORY / "systemd"
README = REPOSITORY / "README.md"
PYTHON = "/opt/promptdrop/.venv/bin/python"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Machine]:
    """A machine with promptdrop installed as the README says, the model's place taken by a small one."""
    folder = tmp_path_factory.mktemp("machine")
    binds = {**installation(folder / "venv"), model: "/srv/models/Z-Image-Turbo"}
    machine = Machine(folder / "machine", binds)
    try:
        # A Python with a libpython of its own finds it by a path that ProtectHome may hide.
        machine.write("/etc/ld.so.conf.d/00-python.conf", "/opt/python/lib\n")
        machine.run("ldconfig")
        machine.run("/opt/promptdrop/systemd/install.sh", "--run", "/srv/models/Z-Image-Turbo")
        yield machine
    finally:
        machine.stop()


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
        """A drop-in: shorter times than the unit's, or another command."""
        self.machine.write(
            f"/etc/systemd/system/{self.unit}.d/test.conf", "\n".join(("[Service]", *lines, ""))
        )
        self.machine.run("systemctl", "daemon-reload")

    def systemctl(self, verb: str, check: bool = True) -> int:
        """The exit status of systemctl VERB."""
        return self.machine.run("systemctl", verb, self.unit, check=check).returncode

    def start(self) -> "Service":
        """Returns once systemd says that the service is up."""
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


@pytest.fixture
def service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[MakeService]:
    """`service({...changes...}, "line of the drop-in", ...)`, named after the test; stopped after it."""
    made: list[Service] = []

    def make(changes: dict[str, Any] | None = None, *lines: str) -> Service:
        name = re.sub(r"\W", "", request.node.name.removeprefix("test_"))[:40] + str(len(made))
        made.append(Service(machine, name, changes or {}))
        made[-1].override(*lines)
        return made[-1]

    yield make
    for one in made:
        one.override("TimeoutStopSec=1")
        one.systemctl("stop", check=False)


# --- the files ----------------------------------------------------------------------------------


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["promptdrop.service", "promptdrop@.service"])
def test_the_sandbox_scores_at_most_one(tmp_path: Path, name: str) -> None:
    """`systemd-analyze security`: 1.0 of 10 is what a service that needs a GPU can reach."""
    copy = tmp_path / name.replace("@", "@gpu0")
    copy.write_text(
        (SYSTEMD / name).read_text().replace("/opt/promptdrop/.venv/bin/promptdrop", "/bin/true")
    )
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=10", str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout


def test_the_template_is_the_service() -> None:
    """promptdrop@.service differs only where its name, configuration and folder stand."""
    single, template = (
        (SYSTEMD / name).read_text().splitlines()[2:]
        for name in ("promptdrop.service", "promptdrop@.service")
    )
    different = [line for line, other in zip(template, single, strict=True) if line != other]

    assert len(different) == 4
    assert all("%i" in line for line in different)


def test_the_installer_is_a_dry_run_by_default(machine: Machine) -> None:
    """It prints every command, and changes nothing."""
    before = machine.shell("find /etc/systemd /etc/promptdrop /srv/promptdrop | sort | md5sum")
    said = machine.run("/opt/promptdrop/systemd/install.sh").stdout

    assert "systemctl daemon-reload" in said
    assert "nothing was done" in said
    assert before == machine.shell(
        "find /etc/systemd /etc/promptdrop /srv/promptdrop | sort | md5sum"
    )


# --- a life -------------------------------------------------------------------------------------


def test_the_readme_works_as_printed(machine: Machine) -> None:
    """From the installer on, command by command; a job dropped by a member of the group is rendered."""
    block = re.search(r"^```sh systemd\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert block
    commands = [line for line in block[1].splitlines() if "venv /opt" not in line]
    commands = [line for line in commands if "pip install" not in line]
    machine.shell("id me >/dev/null 2>&1 || useradd --create-home me")
    script = 'sudo() { "$@"; }; USER=me; cd /opt/promptdrop\n' + "\n".join(commands)
    said = machine.shell(script)
    machine.shell(
        "cd /tmp && setpriv --reuid me --regid me --init-groups sh -c 'umask 022;"
        ' echo "--prompt \\"a red fox\\" --size 128x128 --steps 2" > fox.txt;'
        " cp fox.txt /srv/promptdrop/spool/inbox/'"
    )
    job = "/srv/promptdrop/spool/outbox/fox/job.json"
    until(lambda: machine.shell(f"cat {job} 2>/dev/null || true"), "the job's end")
    status = machine.run("systemctl", "status", "--no-pager", "promptdrop", check=False).stdout
    owners = machine.shell(
        "cd /srv/promptdrop/spool/outbox && stat -c '%U %G %a' fox fox/fox-0001.png"
    )
    machine.run("systemctl", "disable", "--now", "promptdrop")

    assert "active (running)" in said
    assert json.loads(machine.shell(f"cat {job}"))["outcome"] == "done"
    assert 'Status: "ready' in status
    assert owners.splitlines() == ["promptdrop promptdrop 2775", "promptdrop promptdrop 664"]


def test_start_blocks_until_the_engine_is_warm(service: MakeService) -> None:
    """`systemctl start` returns after engine.ready, not before; the status says what is going on."""
    one = service({"model": {"revision": "!load-slow 1"}}).start()

    assert one.show("ActiveState") == "active"
    assert one.log("engine.ready")
    assert until(lambda: one.show("StatusText").startswith("ready"), "the status")


def test_a_reload_keeps_the_engine_warm(service: MakeService) -> None:
    """The same engine process serves jobs under the new configuration."""
    one = service().start()
    (before,) = one.log("engine.starting")
    one.configure({"defaults": {"width": 128}})
    one.systemctl("reload")
    until(lambda: one.log("config.reloaded"), "the reload")
    one.drop("a.txt", "a cat\n")
    one.until_done("a")

    assert one.read("outbox/a/a-0001.json")["image"]["width"] == 128
    assert [entry["pid"] for entry in one.log("engine.starting")] == [before["pid"]]


def test_a_hung_daemon_is_killed_and_its_job_survives(service: MakeService) -> None:
    """No WATCHDOG=1 from the loop: systemd kills daemon and engine, starts anew, the image is rendered."""
    one = service({}, "WatchdogSec=1", "TimeoutAbortSec=1", "RestartSec=0").start()
    one.drop("a.txt", "!slow 0.7 a cat\n")
    one.until_begun()
    first = one.show("MainPID")
    one.machine.run("kill", "-STOP", first)
    job = one.until_done("a")

    assert job["outcome"] == "done"
    assert one.show("MainPID") != first
    assert one.show("NRestarts") == "1"
    assert one.read("outbox/a/a-0001.json")["job"]["attempt"] == 1


def test_a_stop_in_the_middle_of_an_image(service: MakeService) -> None:
    """In time, exit status 0, the job put back; the next start renders it."""
    one = service({"engine": {"stop_seconds": 1}}).start()
    one.drop("a.txt", "!slow 600 a cat\n")
    one.until_begun()
    began = time.monotonic()
    one.systemctl("stop")
    took = time.monotonic() - began
    left = one.machine.shell(
        f"ls {one.home}/spool/.promptdrop/pending {one.home}/spool/.promptdrop/active"
    )

    assert took < 60  # TimeoutStopSec
    assert (one.show("Result"), one.show("ExecMainStatus")) == ("success", "0")
    assert one.log("daemon.stopped")
    assert re.search(r"\d{8}T\d{12}-", left)


def test_a_start_that_keeps_failing_is_given_up(service: MakeService) -> None:
    """Five times within the hour, then start-limit-hit, with the reason in the journal."""
    one = service({"model": {"revision": "!load-raise"}}, "RestartSec=0")
    one.systemctl("start", check=False)
    until(lambda: one.show("ActiveState") == "failed", "the end of all tries")

    assert one.show("NRestarts") == "5"
    assert len(one.log("daemon.started")) == 5
    assert one.systemctl("start", check=False) != 0


def test_a_wrong_configuration_is_not_tried_again(service: MakeService) -> None:
    """Exit 78, no restart."""
    one = service({}, "RestartSec=0")
    one.configure({"whatch": {}})
    one.systemctl("start", check=False)
    until(lambda: one.show("ActiveState") == "failed", "the failure")

    assert (one.show("ExecMainStatus"), one.show("NRestarts")) == ("78", "0")
    assert "did you mean 'watch'" in "".join(one.machine.journal(one.unit))


def test_a_second_daemon_is_not_tried_again(service: MakeService) -> None:
    """Exit 75, no restart, and the first goes on."""
    one = service().start()
    other = service({"root": f"{one.home}/spool"}, "RestartSec=0", f"ReadWritePaths={one.home}")
    other.systemctl("start", check=False)
    until(lambda: other.show("ActiveState") == "failed", "the failure")

    assert (other.show("ExecMainStatus"), other.show("NRestarts")) == ("75", "0")
    assert one.show("ActiveState") == "active"


def test_an_engine_that_is_killed_does_not_stop_the_service(service: MakeService) -> None:
    """The daemon replaces it; OOMPolicy=continue: also where the kernel killed it for its memory."""
    one = service().start()
    main = one.show("MainPID")
    one.drop("a.txt", "!slow 0.7 a cat\n")
    one.until_begun()
    one.machine.run("kill", "-KILL", str(one.log("engine.starting")[0]["pid"]))
    job = one.until_done("a")

    assert job["outcome"] == "done"
    assert (one.show("OOMPolicy"), one.show("MainPID")) == ("continue", main)
    assert len(one.log("engine.starting")) == 2


def test_the_journal_has_json_lines(service: MakeService) -> None:
    """Every line of a whole life is one JSON object with time, level and event."""
    one = service().start()
    one.drop("a.txt", "a cat\n")
    one.until_done("a")
    one.systemctl("stop")
    lines = [json.loads(line) for line in one.machine.journal(one.unit)]

    assert {"daemon.started", "engine.ready", "image.published", "daemon.stopped"} <= {
        line["event"] for line in lines
    }
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)


# --- the sandbox --------------------------------------------------------------------------------

PROBE = """
import ctypes, json, os, socket, subprocess, sys

def tried(action):
    try:
        return f"done: {action()!r}"
    except OSError as e:
        return type(e).__name__

def connect(address):
    with socket.create_connection(address, 2) as connection:
        return connection

def call(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)

home = sys.argv[1]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
found = {
    "network": tried(lambda: connect(("127.0.0.1", int(sys.argv[2])))),
    "netlink": tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "root's home": tried(lambda: os.listdir("/root")),
    "a user's home": tried(lambda: os.listdir("/home/me")),
    "write /etc": tried(lambda: open("/etc/promptdrop/new", "w")),
    "write /srv": tried(lambda: open("/srv/new", "w")),
    "write /var": tried(lambda: open("/var/tmp/../lib/new", "w")),
    "write another's spool": tried(lambda: open("/srv/promptdrop/new", "w")),
    "become root": tried(lambda: os.setuid(0)),
    "mount": tried(lambda: call("mount", b"t", b"/mnt", b"tmpfs", 0, None)),
    "namespace": tried(lambda: call("unshare", 0x10000000)),
    "raw disk": tried(lambda: os.mknod(home + "/disk", 0o60600, os.makedev(8, 0))),
    "others' processes": "done" if os.path.exists("/proc/1") else "hidden",
    "capabilities": status["CapBnd"].strip(),
    "no new privileges": status["NoNewPrivs"].strip(),
    "own spool": tried(lambda: open(home + "/own", "w").write("x")),
    "tmp": tried(lambda: open("/tmp/own", "w").write("x")),
    "meminfo": tried(lambda: len(open("/proc/meminfo").read()) > 0),
    "all processors": tried(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
    "setgid folder": tried(lambda: (os.mkdir(home + "/g"), os.chmod(home + "/g", 0o2775))),
}
if sys.argv[3:]:
    import torch
    f = torch.compile(lambda x: torch.sin(x) * 2 + x)
    x = torch.linspace(0, 1, 64)
    found["torch.compile"] = bool(torch.allclose(f(x), torch.sin(x) * 2 + x))
    from torch._dynamo.utils import counters
    found["frames compiled"] = counters["frames"]["ok"]
json.dump(found, open(home + "/probe.json", "w"))
"""


@pytest.mark.timeout(400)  # g++ takes 40 s for its first file of torch
def test_the_sandbox_denies_and_lets_torch_compile(service: MakeService) -> None:
    """Network, homes, all but its own folder and privileges are closed; compiling still works."""
    one = service()
    one.machine.write("/opt/promptdrop/probe.py", PROBE)
    one.machine.shell("id me >/dev/null 2>&1 || useradd --create-home me")
    one.machine.shell(
        f"{PYTHON} -c 'import socket; s = socket.create_server((\"127.0.0.1\", 9)); s.accept()' >/dev/null 2>&1 &"
        " ip link set lo up 2>/dev/null || true"
    )
    one.override(
        "Type=oneshot", "Restart=no", "WatchdogSec=0", "ExecStart=",
        f"ExecStart={PYTHON} /opt/promptdrop/probe.py {one.home} 9 torch",
    )  # fmt: skip
    started = one.systemctl("start", check=False)
    assert started == 0, "\n".join(one.machine.journal(one.unit))
    found = json.loads(one.machine.shell(f"cat {one.home}/probe.json"))
    allowed = {"own spool", "tmp", "meminfo", "all processors", "setgid folder"}
    said = {name: text for name, text in found.items() if isinstance(text, str)}

    assert {name for name, text in said.items() if text.startswith("done")} == allowed
    assert found["capabilities"].strip("0") == ""
    assert found["no new privileges"] == "1"
    assert found["torch.compile"]
    assert found["frames compiled"] >= 1


def test_metrics_stay_on_this_machine(service: MakeService) -> None:
    """The sandbox has no network: metrics.listen is refused. metrics.conf opens loopback, and no more."""
    one = service({"metrics": {"listen": "127.0.0.1:9464"}})
    one.systemctl("start", check=False)
    refused = one.show("ExecMainStatus")
    get = f"{PYTHON} -c 'import urllib.request as u; print(u.urlopen(\"http://127.0.0.1:9464\", timeout=5).read().decode())'"
    one.machine.shell("ip link set lo up")
    one.override(*(SYSTEMD / "metrics.conf").read_text().split("[Service]\n")[1].splitlines())
    one.start()
    opened = one.machine.run("sh", "-c", get, check=False)
    denied, allowed = (set(one.show(f"IPAddress{key}").split()) for key in ("Deny", "Allow"))

    assert refused == "78"
    assert denied == {"0.0.0.0/0", "::/0"}
    assert allowed == {"127.0.0.0/8", "::1/128"}
    assert "promptdrop_engine_ready" in opened.stdout, opened.stderr


# --- a cluster ----------------------------------------------------------------------------------


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["promptdrop-ray-head.service", "promptdrop-ray-worker.service"])
def test_the_units_of_a_cluster(tmp_path: Path, name: str) -> None:
    """Hardened as far as a network allows, a token asked for, no statistics, no dashboard, no open port."""
    text = (SYSTEMD / name).read_text()
    copy = tmp_path / name
    copy.write_text(text.replace("/opt/promptdrop/.venv/bin/ray", "/bin/true"))
    score = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(copy)]
    verify = ["systemd-analyze", "verify", "--man=no", str(copy)]
    scored = subprocess.run(score, capture_output=True, text=True, check=False)
    verified = subprocess.run(verify, capture_output=True, text=True, check=False)

    assert scored.returncode == 0, scored.stdout
    assert (verified.returncode, verified.stderr) == (0, "")
    for wanted in (
        "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/etc/promptdrop/ray.token", "--block",
        "RAY_USAGE_STATS_ENABLED=0", "--disable-usage-stats", "--node-manager-port=6380",
        "--object-manager-port=6381", "--min-worker-port=6400", "KillMode=control-group",
    ):  # fmt: skip
        assert wanted in text
    assert "ray stop" not in re.sub(r"#.*", "", text)


def test_a_cluster_under_its_units(machine: Machine, service: MakeService) -> None:
    """docs/cluster.md on one machine: head, token, the daemon with cluster.conf; an image comes out.

    The engine has no GPU here, so it asks for a core, which the head's own command does not offer.
    """
    pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
    one = service({
        "model": {"device": "cpu"},
        "engine": {"backend": "ray"},
        "ray": {"address": "127.0.0.1:6379"},
    })  # fmt: skip
    ask = (
        *("runuser", "-u", "promptdrop", "--", "env"),
        *("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/etc/promptdrop/ray.token"),
        *("RAY_TMPDIR=/run/promptdrop-ray", "/opt/promptdrop/.venv/bin/promptdrop", "cluster"),
    )
    machine.write("/etc/promptdrop/ray.env", "PROMPTDROP_ADDRESS=127.0.0.1\n")
    machine.shell(
        "umask 077; head -c 32 /dev/urandom | base64 -w0 > /etc/promptdrop/ray.token;"
        "chown promptdrop: /etc/promptdrop/ray.token;"
        "cd /opt/promptdrop/systemd; install -m 644 promptdrop-ray-head.service /etc/systemd/system/;"
        f"install -D -m 644 cluster.conf /etc/systemd/system/{one.unit}.d/cluster.conf;"
        "sed -i s/--num-cpus=0/--num-cpus=1/ /etc/systemd/system/promptdrop-ray-head.service;"
        "systemctl daemon-reload"
    )
    try:
        machine.run("systemctl", "start", "promptdrop-ray-head")
        one.start()
        one.drop("a.txt", "a cat\n")
        job = one.until_done("a")
        status = one.read(".promptdrop/status.json")
        shown = machine.run(*ask, "status", "--config", one.config).stdout
        one.systemctl("stop")
        released = machine.run(*ask, "release", "--config", one.config)

        assert job["outcome"] == "done"
        assert status["engine"]["host"]
        assert "alive" in shown
        assert "engine-1" in shown
        assert "1 engine released" in released.stdout + released.stderr
        assert machine.show("promptdrop-ray-head.service", "ActiveState") == "active"
    finally:
        one.systemctl("stop", check=False)
        machine.run("systemctl", "stop", "promptdrop-ray-head", check=False)
