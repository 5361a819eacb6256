"""Files on a disk or an object store: one type of path, one atomic write, and strict reading.

A path is a UPath: local ones are pathlib's too (`isinstance(path, Path)`), all others belong to a
file system of fsspec. A file holds either the old or the whole new content, whenever the process
dies. What is read may have been made to harm: sizes are looked at before anything is read, JSON is
held to a form with limits, and what is wrong is one CheckpointError that names file and field.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from worldflux_dist.settings import checked

if TYPE_CHECKING:
    from upath import UPath

MAX_JSON = 64 * 2**20  # bytes: the largest JSON file that is read or written
MAX_VALUES = 10**6  # in a JSON file; each takes up to 100 bytes of memory
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Form = TypeVar("Form")


class CheckpointError(RuntimeError):
    """A file cannot be written or read; the message says which one, why, and what now."""


def as_path(text: str | Path) -> UPath:
    """A local path, absolute, or for `s3://`, `gs://` and the like one on that storage.

    Raises ValueError for a storage that is not known or whose package is not installed.
    """
    import fsspec
    from upath import UPath

    text = str(text)
    if slip := re.match(r"(\w{2,}):/(?!/)", text):
        raise ValueError(f"{text} is neither a path nor a URL: write {slip[1]}:// with two slashes")
    protocol = fsspec.utils.get_protocol(text)
    if protocol in ("file", "local"):
        return UPath(Path(re.sub(r"^\w+://", "", text)).resolve())
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        remedy = "give a path or a storage of fsspec, such as s3://, whose package is installed"
        raise ValueError(f"{text} cannot be used ({error}): {remedy}") from error
    return UPath(text)


class Disk:
    """The atomic write, each of its calls apart, so that a test can cut the power between them."""

    def replace(
        self, path: UPath | Path, data: bytes, check: Callable[[], None] = lambda: None
    ) -> None:
        """Make `data` the content of `path`, durably. `check` is called at the last moment.

        Raises OSError, and whatever `check` raises; the old content is then still there.
        """
        if not isinstance(path, Path):
            check()
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                self.write(file, data)
                self.sync(file.fileno())
            check()
            self.rename(temporary, path)
        except BaseException:
            with suppress(OSError):  # the folder itself may be gone
                temporary.unlink(missing_ok=True)
            raise
        self.sync_folder(path.parent)

    def write(self, file: Any, data: bytes) -> None:
        file.write(data)
        file.flush()

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, temporary: Path, path: Path) -> None:
        temporary.replace(path)

    def sync_folder(self, folder: Path) -> None:
        fsync(folder)


def write(path: UPath | Path, data: bytes) -> None:
    """Make `data` the content of `path`, durably. Raises OSError; the old content is then left."""
    Disk().replace(path, data)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(folder: UPath) -> None:
    """Delete a folder and all in it, where it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it (in another process too), is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


def size(path: UPath) -> int:
    """Bytes of a regular file; opening a pipe or a device would block."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    return status.st_size


def digest(path: UPath) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- JSON


def write_json(path: UPath | Path, value: Any) -> None:
    """Write JSON, atomically. Refuses NaN and what `read_json` would refuse."""
    data = json.dumps(value, indent=1, allow_nan=False).encode()
    _check_size(path, len(data))
    _check_values(path, data)
    write(path, data)


def read_json(path: UPath) -> Any:
    """Read JSON. Raises CheckpointError if the file is missing, broken or too large."""
    _check_size(path, size(path))
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: UPath | Path | str) -> Any:
    """JSON that was read from `path`. Raises as `read_json`."""
    _check_size(path, len(data))
    _check_values(path, data)
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def read_form(path: UPath, form: TypeAdapter[Form]) -> Form:
    """Read JSON of a form. Raises CheckpointError naming the file and the first wrong field."""
    return in_form(read_json(path), form, path)


def in_form(value: Any, form: TypeAdapter[Form], path: UPath | Path | str, where: str = "") -> Form:
    """What was read from `path`, or its part `where`, in its form. Raises as `read_form`."""
    try:
        return checked(form, value, where)
    except ValueError as error:
        raise CheckpointError(f"{path} is malformed: {error}") from None


def _check_size(path: UPath | Path | str, num: int) -> None:
    if num > MAX_JSON:
        raise CheckpointError(f"{path} has {num} bytes, more than the {MAX_JSON} that are read")


def _check_values(path: UPath | Path | str, data: bytes) -> None:
    """Every value but the first stands behind one of these."""
    if sum(map(data.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise CheckpointError(f"{path} holds more than the {MAX_VALUES} values that are read")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


# ------------------------------------------------------------------------------------- arrays


def save_arrays(path: UPath, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays of any shape and layout as safetensors. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save, save_file

    ordered = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    try:
        if isinstance(path, Path):
            save_file(ordered, path)
        else:
            path.write_bytes(save(ordered))
    except SafetensorError as error:
        # The library reports the system's error in words only; callers need the number.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def save_files(folder: UPath, files: Mapping[str, Any]) -> None:
    """Write into a folder, by name: JSON, and named tensors as safetensors. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"):
            write_json(folder / name, content)
        else:
            save_arrays(folder / name, {key: x.cpu().numpy() for key, x in content.items()})


def load_arrays(path: UPath) -> dict[str, np.ndarray]:
    """Read the arrays of `save_arrays`.

    Raises CheckpointError if they are missing, broken or larger than this machine's memory.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load, load_file

    num = size(path)
    if num > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise CheckpointError(f"{path} has {num} bytes, more than this machine's memory")
    try:
        found = load_file(path) if isinstance(path, Path) else load(path.read_bytes())
    # The last four are how the library meets shapes and types that numpy does not have.
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error
    for name, value in found.items():  # other packages may have given numpy more types
        if value.dtype.kind not in "biufc":
            raise CheckpointError(
                f"{path} is corrupt or truncated: {name:.100} is of {value.dtype}"
            )
    return found
