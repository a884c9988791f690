"""Whole files or none, and what every reader checks first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import SCHEMA_VERSION

VERSION_KEY = "lmms_keyspace_schema"
UNFINISHED = ".lmms_keyspace.tmp"  # how the name of a file ends as long as it is being written
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON; where there is none, no string needs a second look


def write(path: Path, content: bytes) -> Path:
    """Write under a temporary name in the same folder, sync, rename: a reader sees all of the file or none.

    Raises:
        InputError: it cannot be written, as on a full disk; what was there before is still there.
    """
    try:
        _replace(path, content)
    except OSError as error:
        reason = f"{path.name} cannot be written ({error.strerror or error})"
        raise InputError("folder", str(path.parent), f"{reason}; make room there, or name another folder") from error
    return path


def _replace(path: Path, content: bytes) -> None:
    temporary, file = _temporary(path)
    with file:  # and with it the lock, until it has its name
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes files private; these are shared like any output, as the umask says.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new hidden file beside `path`, locked as long as it is open: nobody takes it for one that was left."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
        file = os.fdopen(handle, "wb")
        with contextlib.suppress(OSError):  # a file system without locks, where none is removed either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return Path(name), file
        file.close()  # removed as left behind before it was locked


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were killed left in `folder`: what no living process has locked."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def encoded(text: str) -> bytes:
    """UTF-8; half a surrogate pair, which answers of a model may hold, becomes `?`."""
    return text.encode("utf-8", "replace")


def require_writable(argument: str, folder: str | Path) -> Path:
    """Create `folder` if need be, write a file in it, and remove those that killed processes left there unfinished.

    Raises:
        InputError: it cannot be written; names `argument`.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(argument, str(folder), "name a folder: this is a file")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            argument, str(folder), f"the folder cannot be written ({error.strerror}); name one that can"
        ) from error
    remove_unfinished(path)
    return path


def require(path: Path) -> None:
    if not path.is_file():
        raise InputError("file", str(path), "this run is incomplete, the file is missing: run it again")


def check_digest(path: Path, sha256: str) -> None:
    """A file that was exchanged, mixed up with another run's, or damaged where no format would notice."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError("file", path.name, rerun("its content is not what the run wrote"))


def check_version(path: Path, version: object) -> None:
    if not str(version).isdigit():
        raise InputError("file", path.name, rerun("it carries no schema version"))
    if int(str(version)) > SCHEMA_VERSION:
        raise InputError(
            "file", path.name, f"says {version}, this version reads {SCHEMA_VERSION}: upgrade lmms_keyspace"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for lists in lists without end
        raise InputError("file", path.name, rerun(f"not JSON: {error}")) from error
    if not isinstance(content, dict):
        raise InputError("file", path.name, rerun("not a JSON object"))
    return encodable(content) if SURROGATE.search(text) else content


def encodable(value: Any) -> Any:
    """JSON may name half a surrogate pair, as a cut answer does; no file and no frame of strings can hold it."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [encodable(one) for one in value]
    if isinstance(value, dict):
        return {encodable(key): encodable(one) for key, one in value.items()}
    return value


def with_prefix(folder: Path, prefix: str, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefix) and path.name.endswith(suffix))


def rerun(problem: str) -> str:
    return f"{problem}; the file is damaged or not of this program: run the evaluation again"
