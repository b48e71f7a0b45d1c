"""Copy the images of `generate` to the file or folder of `--output`."""

import os
from pathlib import Path

from promptdrop import fs, names
from promptdrop.cli import client
from promptdrop.errors import UsageError
from promptdrop.spool.lanes import GENERATE

FORMAT_OF_SUFFIX = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
}


class Targets:
    """Copies images to the one file that was asked for, or under new names into a folder."""

    def __init__(self, output: Path | None, are_several: bool) -> None:
        """Make the folder. Raises UsageError: `output` is a file for several, or of no format."""
        is_folder = output is None or output.is_dir() or (are_several and not output.suffix)
        suffix = output.suffix.lower() if output and not is_folder else ""
        if are_several and not is_folder:
            raise UsageError(f"--output {output}: expected a folder for several images")
        if suffix and suffix not in FORMAT_OF_SUFFIX:
            raise UsageError(f"--output {output}: expected one of {' '.join(FORMAT_OF_SUFFIX)}")
        self._file = None if is_folder else output
        self._folder = output or Path()
        parent = self._file.parent if self._file else self._folder
        parent.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, data: bytes) -> Path:
        """Write an image of this name to its place, which is returned; a link there is not followed.

        The one file is replaced in one step.
        """
        folder = self._file.parent if self._file else self._folder
        with fs.temporary(folder, 0o666 & ~_umask()) as (handle, temporary):
            handle.write(data)
            handle.flush()
            return self._name(temporary, name)

    def _name(self, temporary: Path, name: str) -> Path:
        """Give a whole image its name."""
        if self._file:
            suffix = names.split(name)[1]
            target = self._file if self._file.suffix else self._file.with_suffix(suffix)
            os.replace(temporary, target)
            return target
        name = name.removeprefix(GENERATE)
        return self._folder / client.rename_to_free_name(temporary, self._folder, name)


def _umask() -> int:
    """The umask of this process, which can only be read by setting it: umask(2)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
