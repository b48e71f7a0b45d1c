"""The sandbox of the units denies what it should, and torch works in it."""

import json

import pytest

from harness import REPOSITORY
from service import PYTHON, MakeService

SYSTEMD = REPOSITORY / "systemd"
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
