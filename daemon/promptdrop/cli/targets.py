"""Copy the images of `generate` to the file or folder of `--output`."""

import os
import shutil
from pathlib import Path

from promptdrop import fs, names
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

    def put(self, source: Path) -> Path:
        """Copy an image to its place, which is returned. The one file is replaced in one step."""
        return self._replace(self._file, source) if self._file else self._add(source)

    def _replace(self, file: Path, source: Path) -> Path:
        target = file if file.suffix else file.with_suffix(source.suffix)
        with fs.temporary(target.parent, 0o644) as (handle, temporary):
            handle.write(source.read_bytes())
            handle.flush()
            os.replace(temporary, target)
        return target

    def _add(self, source: Path) -> Path:
        stem, n = source.stem.removeprefix(GENERATE), 1
        while (target := self._folder / names.numbered(stem, source.suffix, n)).exists():
            n += 1
        shutil.copyfile(source, target)
        return target
