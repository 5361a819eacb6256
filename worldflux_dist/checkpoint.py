"""Checkpoints: directories that are either whole or do not exist, whenever the process dies.

A checkpoint is `checkpoints/<step, 10 digits>/`: the files its roles wrote and, written last,
`manifest.json` with the size and SHA-256 of each; without that it is none. On a disk (`Path`) one
rename puts a temporary folder in place. An object store (`UPath`) cannot rename a folder: roles
write into the final one, and its manifest makes it exist. What must stay true: an earlier good
checkpoint is always left (on an object store, unless the only one is replaced by the same step),
nothing is read back unverified, and what a hostile one names or claims is refused before anything
outside of its folder is touched or memory is asked for. One process writes a root at a time;
others may write into the folder it hands out. Files are safetensors and JSON, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import reprlib
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Lt
from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from worldflux_dist import storage
from worldflux_dist.settings import STRICT, Text, Whole
from worldflux_dist.storage import CheckpointError, fsync

if TYPE_CHECKING:
    from upath import UPath

FORMAT = 2
MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_REPLACED = ".old"
_FOLDER = re.compile(rf"\d{{10}}({re.escape(_REPLACED)})?", re.ASCII)
_FILE = re.compile(r"(?=.{1,250}$)\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)

logger = logging.getLogger(__name__)


class _File(TypedDict):
    size: Whole
    sha256: Text


@with_config(STRICT)
class _Manifest(TypedDict):
    format: Any
    step: Annotated[int, Ge(0), Lt(10**10)]
    counters: dict[str, Any]
    files: dict[str, _File]
    sha256: Text


_FORM = TypeAdapter(_Manifest)


def begin(root: UPath, step: int) -> UPath:
    """The empty folder that roles write the files of checkpoint `step` into.

    What killed processes left under `root` is removed, so one process may begin, and one
    checkpoint at a time; it ends with `commit` or `abandon`. Raises OSError.
    """
    assert 0 <= step < 10**10, step
    _tidy(root)
    name = f"{step:010d}"
    if isinstance(root, Path):
        folder = _temporary(root, name)
        folder.mkdir(parents=True)
        return folder
    _remove(root / name)
    return root / name


def commit(
    root: UPath, folder: UPath, step: int, keep: int = 2, counters: dict[str, Any] | None = None
) -> UPath:
    """Make the folder of `begin` checkpoint `step`, with `counters` (JSON) in its manifest.

    Nobody may write into it any more. All but the newest `keep` checkpoints are then removed, and
    so are those of later steps: they belong to a life of the run that was abandoned. Gives the
    checkpoint's folder. Where it fails the folder is abandoned; raises OSError, and CheckpointError
    for a file that a manifest may not name.
    """
    assert keep >= 1, keep
    final = root / f"{step:010d}"
    try:
        _write_manifest(folder, step, counters or {})
        if isinstance(folder, Path) and isinstance(final, Path):
            replaced = final.with_suffix(_REPLACED)
            if final.exists():
                final.rename(replaced)
            folder.rename(final)
            fsync(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        abandon(folder)
        raise
    names = sorted(path.name for path in _folders(root) if not path.suffix)
    for name in set(names) - set([name for name in names if name <= final.name][-keep:]):
        _remove(root / name)
    return final


def abandon(folder: UPath) -> None:
    """Remove the folder of `begin`, now or in the next `begin`; one that was committed stays."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(Exception):  # drivers have errors of their own, and one is mostly under way
        if MANIFEST not in _names(folder):
            _remove(folder)


def newest(root: UPath) -> tuple[UPath, dict[str, Any]] | None:
    """The newest checkpoint that verifies and its manifest, or None where there is none yet.

    Logs one sentence about each broken one passed over. Raises CheckpointError if all are broken,
    since starting over unasked would overwrite the run. A storage that does not answer is an error
    too, OSError or its driver's own: a good checkpoint must not pass for a broken one.
    """
    broken: list[Exception] = []
    for folder in _folders(root):
        try:
            manifest = verify(folder)
        except (CheckpointError, FileNotFoundError) as error:  # the latter: removed meanwhile
            broken.append(error)
            continue
        for passed in broken:
            logger.warning("%s; the checkpoint before it, %s, is used instead", passed, folder)
        return folder, manifest
    if broken:
        raise CheckpointError(
            f"no checkpoint in {root} can be used ({'; '.join(map(str, broken))}): move the "
            "folder away to start over"
        )
    return None


def kept(root: UPath) -> list[dict[str, Any]]:
    """The manifests that are not broken, of all checkpoints in place; their files are not read."""
    manifests = []
    for folder in _folders(root):
        with suppress(CheckpointError):
            manifests.append(_manifest(folder))
    return manifests


def verify(folder: UPath) -> dict[str, Any]:
    """Check every file against the manifest and return it.

    Raises CheckpointError naming the first file that is missing, changed or outside the folder.
    """
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        path = _inside(folder, name)
        size = storage.size(path)
        if size != expected["size"]:
            raise CheckpointError(f"{path} has {size} bytes instead of {expected['size']}")
        if storage.digest(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the manifest's")
    return manifest


def _write_manifest(folder: UPath, step: int, counters: dict[str, Any]) -> None:
    files = {}
    for name in _names(folder):
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{folder} holds {name!r}: use letters, digits, '_', '.' and '-'")
        path = _inside(folder, name)
        files[name] = {"size": storage.size(path), "sha256": storage.digest(path)}
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            fsync(path)
    counters = json.loads(json.dumps(counters))  # as they will be read back, for the digest
    manifest = {"format": FORMAT, "step": step, "counters": counters, "files": files}
    storage.write_json(folder / MANIFEST, manifest | {"sha256": _manifest_digest(manifest)})


def _manifest(folder: UPath) -> dict[str, Any]:
    """The manifest, of the right form and naming nothing outside; its files are not looked at."""
    path = _inside(folder, MANIFEST)
    manifest = storage.read_json(path)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {reprlib.repr(version)}, and this release reads {FORMAT}"
        )
    try:
        whole = manifest.get("sha256") == _manifest_digest(manifest)
    except RecursionError:
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is corrupt: its own SHA-256 differs")
    for name in storage.in_form(manifest, _FORM, path)["files"]:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path} names {name!r:.80}, which is outside of its folder")
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _inside(folder: UPath, name: str) -> UPath:
    """The path of a plain name, once no link on the way leads elsewhere."""
    path = folder / name
    real = os.path.realpath
    if isinstance(path, Path) and real(path) != f"{real(str(folder))}/{name}":
        raise CheckpointError(f"{path} is a link, outside of its folder: copy the file instead")
    return path


def _temporary(root: Path, step: str) -> Path:
    """A new name each time: an earlier try's role that is still writing must not get in here."""
    return root / f"{_TEMPORARY}{step}-{secrets.token_hex(4)}"


def _remove(folder: UPath) -> None:
    """Remove a checkpoint; from the first moment on it does not exist."""
    if isinstance(folder, Path):
        doomed = _temporary(folder.parent, folder.name)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        folder.fs.rm_file((folder / MANIFEST).path)
    storage.delete(folder)


def _tidy(root: UPath) -> None:
    """Remove what a killed process left, and finish or undo a replacement it was in."""
    if not isinstance(root, Path):
        names = _names(root)
        for name in {name.split("/")[0] for name in names}:
            if _FOLDER.fullmatch(name) and f"{name}/{MANIFEST}" not in names:
                _remove(root / name)
        return
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in root.glob(f"*{_REPLACED}"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(replaced.with_suffix(""))


def _folders(root: UPath) -> list[UPath]:
    """Checkpoint folders, newest first; a replaced one comes after the one that replaces it."""
    if isinstance(root, Path):
        names = [path.name for path in root.iterdir() if path.is_dir()] if root.exists() else []
    else:
        split = [name.split("/") for name in _names(root)]
        names = [parts[0] for parts in split if parts[1:] == [MANIFEST]]
    names = sorted(filter(_FOLDER.fullmatch, names), key=lambda n: (n[:10], len(n) == 10))
    return [root / name for name in reversed(names)]


def _names(folder: UPath) -> list[str]:
    """Names of the files below a folder, as other processes see them now."""
    if isinstance(folder, Path):
        paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        return sorted(path.relative_to(folder).as_posix() for path in paths)
    paths_below: list[str] = []
    folder.fs.invalidate_cache()
    # Asked whether one file exists, a storage that does not answer may say no; this raises.
    with suppress(FileNotFoundError):
        for path, _, files in folder.fs.walk(folder.path, on_error="raise"):
            paths_below += [f"{path.rstrip('/')}/{name}" for name in files]
    return sorted(path.removeprefix(folder.path.rstrip("/") + "/") for path in paths_below)
