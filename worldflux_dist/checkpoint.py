"""Checkpoints: directories that are either whole or do not exist, whenever the process dies.

A checkpoint is `checkpoints/<step, 10 digits>/`: the files its roles wrote, and `manifest.json`
with the size and SHA-256 of each. The manifest is written last, inside a temporary folder that one
rename then puts in place; a folder without a manifest is no checkpoint. What must stay true: at
every instant at least one earlier good checkpoint is on disk, what was written last is what
`newest` finds, and nothing is read back unverified. One process writes a root at a time; others
may write files into the folder it hands out. Files are safetensors and JSON, never pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_REPLACED = ".old"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which file, why, and what now."""


@contextmanager
def writing(
    root: Path, step: int, keep: int = 2, counters: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Hand out a temporary folder; when the block succeeds it becomes checkpoint `step`.

    All but the newest `keep` checkpoints are then removed, and so are those of later steps: they
    belong to a life of the run that was abandoned. When the block fails nothing is left behind.
    Raises CheckpointError for a full disk, naming what is safe; other errors pass unchanged.
    """
    assert 0 <= step < 10**10, step
    assert keep >= 1, keep
    folder = root / f"{_TEMPORARY}{step:010d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        folder.mkdir()
        yield folder
        _write_manifest(folder, step, json.loads(json.dumps(counters or {})))
        _put_in_place(folder, root / f"{step:010d}")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not disk_full(error):
            raise
        good, _ = _scan(root)
        safe = f"{good[0]} is safe on disk" if good else "no earlier checkpoint is on disk"
        raise CheckpointError(
            f"the disk is full, so checkpoint {step} was not written; {safe}: free some space "
            "and run the same command again"
        ) from error
    _prune(root, step, keep)


def newest(root: Path, part: str = "") -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies and its manifest, or None where there is none yet.

    With `part` only the files whose names begin with it are read.
    Logs one sentence about each broken one passed over. Raises CheckpointError if checkpoints
    exist and all are broken: starting over unasked would overwrite the run.
    """
    good, broken = _scan(root, part)
    if broken and good is None:
        raise CheckpointError(
            f"no checkpoint in {root} can be used ({'; '.join(map(str, broken))}): move the "
            "folder away to start over"
        )
    for error in broken:
        assert good is not None
        logger.warning("%s; the checkpoint before it, %s, is used instead", error, good[0])
    return good


def verify(folder: Path, part: str = "") -> dict[str, Any]:
    """Check every file, or those of one part, against the manifest and return it.

    Raises CheckpointError naming the first file that is missing, changed or outside the folder.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(
            f"{folder / MANIFEST} has format {found!r}, and this release reads {FORMAT}"
        )
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is corrupt: its own SHA-256 differs")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not name.startswith(part):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MANIFEST} names {name!r}, outside of its folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path} has {size} bytes instead of {expected['size']}")
        if _file_digest(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the manifest's")
    return manifest


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it (in another process too), is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


# -------------------------------------------------------------------------------------- files


def save_arrays(
    path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write named arrays of any shape and layout as safetensors. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    ordered = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    try:
        save_file(ordered, path, metadata)
    except SafetensorError as error:
        # The library reports the system's error in words only; callers need the number.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays and metadata of `save_arrays`. Raises CheckpointError if they are broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            names = file.keys()  # not iterable itself
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old or the whole new text. Refuses NaN."""
    text = json.dumps(value, indent=1, allow_nan=False)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def read_json(path: Path) -> Any:
    """Read JSON. Raises CheckpointError if the file is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


# ------------------------------------------------------------------------------------ folders


def _write_manifest(folder: Path, step: int, counters: dict[str, Any]) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointError(f"checkpoint {step} holds {name}, a link: copy the file instead")
        _fsync(path)
        if path.is_file():
            files[name] = {"size": path.stat().st_size, "sha256": _file_digest(path)}
    manifest = {"format": FORMAT, "step": step, "counters": counters, "files": files}
    write_json(folder / MANIFEST, manifest | {"sha256": _manifest_digest(manifest)})


def _put_in_place(folder: Path, final: Path) -> None:
    replaced = final.with_suffix(_REPLACED)
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _tidy(root: Path) -> None:
    """Remove what a killed process left, and finish or undo a replacement it was in."""
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    for replaced in root.glob(f"*{_REPLACED}"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(replaced.with_suffix(""))


def _prune(root: Path, step: int, keep: int) -> None:
    steps = sorted(int(path.name) for path in _folders(root) if not path.suffix)
    kept = [s for s in steps if s <= step][-keep:]
    for old in set(steps) - set(kept):
        shutil.rmtree(root / f"{old:010d}")


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; a replaced one comes after the one that replaces it."""
    name = re.compile(rf"\d{{10}}({re.escape(_REPLACED)})?")
    found = [path for path in root.glob("*") if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name[:10], not path.suffix), reverse=True)


def _scan(
    root: Path, part: str = ""
) -> tuple[tuple[Path, dict[str, Any]] | None, list[CheckpointError]]:
    broken: list[CheckpointError] = []
    for folder in _folders(root):
        try:
            return (folder, verify(folder, part)), broken
        except CheckpointError as error:
            broken.append(error)
        except FileNotFoundError:
            continue  # removed meanwhile, since newer ones exist
    return None, broken


def _manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
