"""Make the spool's folders, and check whether they can be used now."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from promptdrop import fs, log, mounts
from promptdrop.config import Config
from promptdrop.errors import ConfigError, DiskTrouble, PromptdropError
from promptdrop.spool.lock import Lock
from promptdrop.spool.paths import STATES, Paths, State
from promptdrop.spool.permissions import (
    OWN_MODE,
    describe_permissions,
    make_folder,
    refuse_link,
    try_modes,
)
from promptdrop.trust import NotOurs

_VERSION_BYTES = 64
VERSION = 1  # of the state folder's format


class Folders:
    """Inbox, outbox, failed and state folder. Remembers which of them have been mount points."""

    def __init__(self, config: Config, paths: Paths, lock: Lock) -> None:
        self._paths, self._lock = paths, lock
        self._to_make = [  # a configured one may be a mount point: only `init` makes it
            path
            for path, configured in (
                (paths.outbox, config.paths.outbox),
                (paths.failed, config.paths.failed),
            )
            if configured is None
        ]
        self._shared = {"inbox": paths.inbox, "outbox": paths.outbox, "failed": paths.failed}
        self._mounts: list[str] = []  # which of these have been mount points
        self._inner: list[str] = []  # mount points below outbox and failed: outbox/SUB
        self._named: set[str] = set()  # folders among our jobs that are not ours and were named
        self._output = config.output

    # --- at the start -------------------------------------------------------------------------

    def init(self) -> None:
        """Make every folder, configured ones too. For `promptdrop init`."""
        make_folder(self._paths.root, OWN_MODE)
        for path in (self._paths.outbox, self._paths.failed):
            make_folder(path, self._output.shared_folder_mode)
        self.prepare()

    def require_mount(self) -> None:
        """Raise PromptdropError if there is no spool yet and its place in /etc/fstab is not mounted.

        An empty mount point would make a fine new spool, and hide the real one's jobs.
        """
        root = self._paths.root
        if not self._paths.state.is_dir() and (place := mounts.missing_mount(root)):
            raise PromptdropError(
                f"{root}: there is no spool here: {place} is in /etc/fstab and not mounted"
            )

    def prepare(self) -> None:
        """Make the folders that `run` may make, which are never a configured outbox or failed.

        Raises ConfigError: the folders cannot work together, a newer promptdrop wrote them, or others may
        write where only we may.
        """
        paths = self._paths
        self._refuse_nesting()
        make_folder(paths.root, OWN_MODE)  # nobody else may put another inbox or state in its place
        make_folder(paths.inbox)
        own = (paths.cache, *map(paths.of_state, STATES))
        refuse_link(paths.state)
        make_folder(paths.state, OWN_MODE)
        for path in (paths.control, *own):
            refuse_link(path)
        paths.trust.owner, paths.trust.asks_modes = try_modes(paths.state)
        self._make_own(paths.state, OWN_MODE)
        for path in own:
            self._make_own(path, self._output.record_folder_mode)
        make_folder(paths.control)
        for path in self._to_make:
            make_folder(path, self._output.shared_folder_mode)
        self._check_version()
        recorded = paths.trust.read_json(paths.mounts)
        known, inner = (recorded.get(key) for key in ("mounts", "inner"))
        self._mounts = [name for name in self._shared if isinstance(known, list) and name in known]
        self._inner = [str(one) for one in inner] if isinstance(inner, list) else []
        if os.stat(paths.inbox).st_dev != os.stat(paths.state).st_dev:
            raise ConfigError(
                f"{paths.inbox} and {paths.state} are on different file systems; a claim is one"
                f" rename, so mount the file system on {paths.root} instead"
            )

    def _make_own(self, path: Path, mode: int) -> None:
        """Make a folder of our own; of one that is there keep from others what `mode` keeps from them.

        Raises ConfigError: somebody else could change what lies there.
        """
        make_folder(path, mode)
        status, owner = os.stat(path), self._paths.trust.owner
        if status.st_uid not in (owner, 0):
            raise ConfigError(
                f"{describe_permissions(path)} belongs to another user, and what we make there to uid {owner};"
                f" if this spool was moved or its user has changed: chown -R {owner} {self._paths.state}"
            )
        if not self._paths.trust.asks_modes or not status.st_mode & ~mode & 0o077:
            return
        try:
            os.chmod(path, stat.S_IMODE(status.st_mode) & (mode | 0o7700))
        except PermissionError:
            if status.st_mode & 0o022:
                raise ConfigError(
                    f"{describe_permissions(path)} can be written by others, who could forge our records;"
                    f" to give it to us: chown -R {owner} {self._paths.state}"
                ) from None
            return
        log.get().warning("spool.closed", folder=str(path), mode=f"{status.st_mode & 0o7777:04o}")

    def _refuse_nesting(self) -> None:
        paths = self._paths
        for name, path in (("outbox", paths.outbox), ("failed", paths.failed)):
            for other, inside in (("inbox", paths.inbox), (".promptdrop", paths.state)):
                if path.resolve().is_relative_to(inside.resolve()):
                    raise ConfigError(
                        f"paths.{name}: {path} lies inside the {other} {inside}: what is written"
                        " there would be taken as a job; choose a folder beside it"
                    )
                if inside.resolve().is_relative_to(path.resolve()):
                    raise ConfigError(
                        f"paths.{name}: {path} contains the {other} {inside}; choose a folder beside it"
                    )
        if paths.outbox.resolve() == paths.failed.resolve():
            raise ConfigError(f"paths.outbox and paths.failed are one folder: {paths.outbox}")

    def _check_version(self) -> None:
        path = self._paths.version
        try:
            found = int(self._paths.trust.read(path, _VERSION_BYTES))
        except FileNotFoundError:
            fs.write_durably(path, f"{VERSION}\n".encode(), self._output.record_mode)
            return
        except NotOurs as e:
            raise ConfigError(f"{e}; expected a file of ours with the number {VERSION}") from None
        except ValueError:
            raise ConfigError(f"{path}: expected the number {VERSION}") from None
        if found > VERSION:
            raise ConfigError(
                f"{path}: this spool is of version {found}, written by a newer promptdrop; this one knows up to {VERSION}"
            )

    # --- while the daemon works ---------------------------------------------------------------

    def homes(self, *states: State) -> Iterator[str]:
        """Yield the folders of all our jobs in these states, as `Paths.homes` does, and leave others alone.

        One that is not ours is named in the log, once. Raises OSError: a state cannot be listed.

        Thread: clerk.
        """
        for home in self._paths.homes(*states):
            try:
                why = self._paths.trust.why_not_home(home)
            except FileNotFoundError:
                continue
            if why is None:
                yield home
            elif home not in self._named:
                self._named.add(home)
                log.get().warning(
                    "spool.not_ours", folder=home, reason=why, cure="promptdrop doctor"
                )

    def require(self) -> None:
        """Raise DiskTrouble if a folder is missing, or is a mount point without its mount.

        Thread: any.
        """
        self._lock.require()
        for name, path in self._shared.items():
            if not path.is_dir():
                raise DiskTrouble(f"{name} {path} is missing; waiting for it")
            if name == "inbox" and path.stat().st_dev != self._paths.state.stat().st_dev:
                raise DiskTrouble(
                    f"{name} {path}: another file system is mounted over it, and a claim is one"
                    f" rename; waiting until it is gone, or mounted on {self._paths.root} instead"
                )
            mounted = os.path.ismount(path)
            if name in self._mounts and not mounted:
                raise DiskTrouble(
                    f"{name} {path} was a mount point and is not mounted; waiting for it"
                )
            if mounted and name not in self._mounts:
                self._mounts.append(name)
                self._record_mounts()

    def require_inner(self, name: Literal["outbox", "failed"], path: str) -> None:
        """Raise OSError if a path below outbox or failed lies below a mount point that is not mounted now.

        What is written there then would be hidden once it is mounted again.

        Thread: any.
        """
        for inner in self._inner:
            if not f"{name}/{path}/".startswith(f"{inner}/"):
                continue
            place = self._shared[name].resolve() / inner.removeprefix(f"{name}/")
            if str(place) not in mounts.mount_points():
                why = f"was a mount point and is not mounted; waiting for it ({self._paths.mounts})"
                raise OSError(errno.ENODEV, why, str(place))

    def _note_inner(self) -> None:
        """Remember the mount points below outbox and failed."""
        there = mounts.mount_points()
        for name in ("outbox", "failed"):
            root = f"{self._shared[name].resolve()}/"
            found = (f"{name}/{place[len(root) :]}" for place in there if place.startswith(root))
            if new := sorted(set(found).difference(self._inner)):
                self._inner += new
                self._record_mounts()

    def _record_mounts(self) -> None:
        document = json.dumps({"mounts": self._mounts, "inner": self._inner})
        fs.write_durably(self._paths.mounts, document.encode(), self._output.record_mode)

    def require_space(self, min_free_mib: int) -> None:
        """Raise DiskTrouble if a folder cannot be written or its disk is nearly full.

        Thread: scanner.
        """
        self.require()
        self._note_inner()
        self._share_group()
        for name, path in {**self._shared, "state": self._paths.state}.items():
            if not os.access(path, os.W_OK | os.X_OK):
                raise DiskTrouble(f"{name} {describe_permissions(path)} cannot be written")
            if (free := mounts.free_mib(path)) < min_free_mib:
                raise DiskTrouble(
                    f"{name} {path} has {free:.0f} MiB free, less than limits.min_free_disk_mib: {min_free_mib}"
                )

    def _share_group(self) -> None:
        """Give outbox and failed the inbox's group, which all that is made below them inherits."""
        group = os.stat(self._paths.inbox).st_gid
        for path in (self._paths.outbox, self._paths.failed):
            if os.stat(path).st_gid != group:
                self._give(path, group)

    def _give(self, path: Path, group: int) -> None:
        try:
            os.chown(path, -1, group)
        except OSError:
            pass  # not ours to give, or a share that has no groups: doctor says so
