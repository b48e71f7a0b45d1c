"""The cache of compiled code on the disk.

Inductor unpickles what it finds there: only the daemon may write it.
"""

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import diffusers
import torch

from promptdrop import log

STALE_SECONDS = 7 * 86400.0
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def use(folder: Path, model: str, device: str) -> None:
    """Keep compiled code in a subfolder of `folder` for these versions, this model and this device.

    Subfolders that nobody has used for a week are removed.
    """
    facts = (torch.__version__, diffusers.__version__, model, device)
    mine = folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another engine was faster
            if entry != mine and time.time() - entry.stat().st_mtime > STALE_SECONDS:
                log.get().info("compile.cache_discarded", reason="not used for a week")
                shutil.rmtree(entry, ignore_errors=True)
    mine.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(mine)
    for variable in VARIABLES:
        os.environ[variable] = str(mine)


def discard(reason: str) -> bool:
    """Empty the cache in use, because it may be broken. Returns False if it was empty."""
    folder = Path(os.environ[VARIABLES[0]])
    if not (folder.is_dir() and any(folder.iterdir())):
        return False
    log.get().warning("compile.cache_discarded", reason=reason)
    shutil.rmtree(folder, ignore_errors=True)  # an engine of another device may do the same
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    torch.compiler.reset()
    return True
