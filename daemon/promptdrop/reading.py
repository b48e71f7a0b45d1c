"""One dropped file, read once: what it asks for, or why it is refused."""

from pathlib import Path

from promptdrop import fs, names, request
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.fs import Signature, signature_of
from promptdrop.job import Request
from promptdrop.spool import describe_permissions


def read_job_file(
    path: Path, name: str, settings: Config, signature: Signature | None
) -> Request | RequestError | None:
    """What a dropped file asks for, or why it is refused; None: gone, or not what `signature` saw."""
    limit = settings.limits.job_file_kib * 1024
    try:
        before = signature_of(path)
        data, _ = fs.read_plain(path, limit)
        if (
            before is None
            or signature_of(path) != before
            or (signature is not None and before != signature)
        ):
            return None
        if len(data) > limit:
            raise RequestError(
                f"is larger than limits.job_file_kib: {settings.limits.job_file_kib} KiB"
            )
        if not data:
            raise RequestError("is empty")
        return request.parse(data, names.split(name)[1], settings)
    except RequestError as e:
        return e
    except PermissionError:
        return RequestError(f"cannot be read: {describe_permissions(path)}")
    except (FileNotFoundError, fs.NotPlain):
        return None
