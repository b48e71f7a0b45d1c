"""A machine with a real systemd, booted in namespaces for a test module and taken down with it."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import until

SCRIPT = Path(__file__).with_name("machine.sh")
SYSTEMD = Path("/lib/systemd/systemd")
BOOT_SECONDS = 60.0
CHECKOUT = "/usr/src/promptdrop"
SUDO = """#!/bin/sh
[ "$1" != -u ] || { user=$2; shift 2; exec runuser -u "$user" -- "$@"; }
exec "$@"
"""
FILES = ("systemd", "docs", "README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")


def why_not() -> str | None:
    """Return the reason why no machine can boot here, or None."""
    if os.geteuid() != 0:
        return "namespaces and cgroups need root"
    if not SYSTEMD.exists():
        return f"{SYSTEMD} is not there: apt-get install systemd"
    for tool in ("unshare", "nsenter", "setpriv", "pivot_root"):
        if not shutil.which(tool):
            return f"no {tool}: apt-get install util-linux"
    known = Path("/proc/filesystems").read_text().split()
    for kind in ("overlay", "cgroup2"):
        if kind not in known:
            return f"the kernel has no {kind}"
    probe = "mkdir u w r && mount -t tmpfs t u && mkdir u/f u/w && mount -t overlay -o lowerdir=/,upperdir=u/f,workdir=u/w o r && mount -t cgroup2 c w"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--net", "--cgroup",
         "bash", "-c", f"cd $(mktemp -d) && {probe}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces, overlay or cgroup2 are refused: {done.stderr}" if done.returncode else None


class Machine:
    """A booted machine. The root of its file system is an overlay of ours."""

    def __init__(self, folder: Path, binds: dict[Path, str]) -> None:
        if reason := why_not():
            pytest.skip(reason)
        self.folder = folder
        folder.mkdir()
        (folder / "log").touch()
        with (folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                ["env", "STAGE=begin", "bash", str(SCRIPT), str(folder),
                 *(f"{source}:{target}" for source, target in binds.items())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.pid = 0  # of its systemd, as this system counts
        until(self._is_up, f"systemd; {folder}/log", BOOT_SECONDS)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        self.pid = self.pid or self._find_init()
        if not self.pid:
            return False
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def _find_init(self) -> int:
        """Find the outermost child that is systemd: it may have children of its own by now."""
        pid = self._process.pid
        while children := _children(pid):
            pid = children[0]
            try:
                if Path(f"/proc/{pid}/exe").resolve() == SYSTEMD.resolve():
                    return pid
            except OSError:
                return 0  # it has ended meanwhile
        return 0

    def run(
        self, *command: str, check: bool = True, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root on the machine."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-p", "-m", "-u", "-i", "-n", "-C", "--root", "--wd",
             "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", *command],
            capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done

    def shell(self, script: str, check: bool = True) -> str:
        """Run a line of sh on the machine. Returns what it prints."""
        return self.run("sh", "-ec", script, check=check).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file on the machine."""
        subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "--root", "--wd", "sh", "-ec",
             'mkdir -p "${1%/*}"; cat > "$1"', "sh", path],
            input=text, text=True, check=True,
        )  # fmt: skip

    def show(self, unit: str, key: str) -> str:
        """Return one property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", key, unit).stdout.strip()

    def journal(self, unit: str) -> list[str]:
        """Return the lines that the unit's own processes wrote to the journal."""
        self.run("journalctl", "--sync")
        done = self.run("journalctl", "-u", unit, "-o", "cat", "_TRANSPORT=stdout")
        return done.stdout.splitlines()

    def stop(self) -> None:
        """Take the machine down and wait until nothing of it is left."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # the PID 1 of its namespace: all go with it
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()


@contextmanager
def booted(folder: Path, model: Path) -> Iterator[Machine]:
    """A machine that has the package, the checkout, `sudo` and, as Z-Image-Turbo, a small model."""
    folder.mkdir()
    binds = {**installation(folder / "venv"), model: "/srv/models/Z-Image-Turbo"}
    machine = Machine(folder / "machine", binds)
    try:
        # A Python with a libpython of its own finds it by a path that ProtectHome may hide.
        machine.write("/etc/ld.so.conf.d/00-python.conf", "/opt/python/lib\n")
        machine.run("ldconfig")
        machine.write("/usr/sbin/sudo", SUDO)
        machine.run("chmod", "755", "/usr/sbin/sudo")
        yield machine
    finally:
        machine.stop()


def installation(folder: Path) -> dict[Path, str]:
    """Binds that put this Python, its packages and our package where the README installs them.

    /opt is where the unit looks; /root and /home, where they may really lie, are closed to it.
    What the installer needs of the checkout is in CHECKOUT.
    """
    source = Path(__file__).parents[2]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    bin_folder = folder / "bin"
    site = folder / f"lib/{version}/site-packages"
    for path in (bin_folder, site):
        path.mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
    (bin_folder / "python").symlink_to(f"/opt/python/bin/{version}")
    for command, module in (
        ("promptdrop", "promptdrop.__main__"),
        ("ray", "ray.scripts.scripts"),
    ):
        (bin_folder / command).write_text(
            "#!/opt/promptdrop/.venv/bin/python\nimport sys\n"
            f"from {module} import main\nsys.exit(main())\n"
        )
        (bin_folder / command).chmod(0o755)
    (site / "promptdrop.pth").write_text("/opt/promptdrop/daemon\n/opt/promptdrop/packages\n")
    return {
        Path(sys.base_prefix): "/opt/python",
        packages: "/opt/promptdrop/packages",
        source / "daemon": "/opt/promptdrop/daemon",
        folder: "/opt/promptdrop/.venv",
        **{source / name: f"{CHECKOUT}/{name}" for name in FILES},
    }


def _children(pid: int) -> list[int]:
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in listed.split()]
