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

import errno
import hashlib
import json
import logging
import os
import re
import reprlib
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from upath import UPath

    AnyPath = Path | UPath

FORMAT = 2
MANIFEST = "manifest.json"
MAX_JSON = 64 * 2**20  # bytes: the largest JSON file that is read
_TEMPORARY = ".writing-"
_REPLACED = ".old"
_FOLDER = re.compile(rf"\d{{10}}({re.escape(_REPLACED)})?", re.ASCII)
_FILE = re.compile(r"(?=.{1,250}$)\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which file, why, and what now."""


def as_path(text: str | Path) -> AnyPath:
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
        return Path(re.sub(r"^\w+://", "", text)).resolve()
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        remedy = "give a path or a storage of fsspec, such as s3://, whose package is installed"
        raise ValueError(f"{text} cannot be used ({error}): {remedy}") from error
    return UPath(text)


def begin(root: AnyPath, step: int) -> AnyPath:
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
    root: AnyPath, folder: AnyPath, step: int, keep: int = 2, counters: dict[str, Any] | None = None
) -> AnyPath:
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
            _fsync(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        abandon(folder)
        raise
    names = sorted(path.name for path in _folders(root) if not path.suffix)
    for name in set(names) - set([name for name in names if name <= final.name][-keep:]):
        _remove(root / name)
    return final


def abandon(folder: AnyPath) -> None:
    """Remove the folder of `begin`, now or in the next `begin`; one that was committed stays."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(Exception):  # drivers have errors of their own, and one is mostly under way
        if MANIFEST not in _names(folder):
            _remove(folder)


def newest(root: AnyPath, part: str = "") -> tuple[AnyPath, dict[str, Any]] | None:
    """The newest checkpoint that verifies and its manifest, or None where there is none yet.

    With `part` only the files whose names begin with it are read. Logs one sentence about each
    broken one passed over. Raises CheckpointError if all are broken, since starting over unasked
    would overwrite the run. A storage that does not answer is an error too, OSError or its driver's
    own: a good checkpoint must not pass for a broken one.
    """
    broken: list[Exception] = []
    for folder in _folders(root):
        try:
            manifest = verify(folder, part)
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


def kept(root: AnyPath) -> list[dict[str, Any]]:
    """The manifests that are not broken, of all checkpoints in place; their files are not read."""
    manifests = []
    for folder in _folders(root):
        with suppress(CheckpointError):
            manifests.append(_manifest(folder))
    return manifests


def verify(folder: AnyPath, part: str = "") -> dict[str, Any]:
    """Check every file, or those of one part, against the manifest and return it.

    Raises CheckpointError naming the first file that is missing, changed or outside the folder.
    """
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        if not name.startswith(part):
            continue
        path = _inside(folder, name)
        size, claimed = _size(path), expected.get("size")
        if size != claimed:
            raise CheckpointError(f"{path} has {size} bytes instead of {reprlib.repr(claimed)}")
        if _file_digest(path) != expected.get("sha256"):
            raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the manifest's")
    return manifest


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it (in another process too), is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


def save_arrays(
    path: AnyPath, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write named arrays of any shape and layout as safetensors. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save, save_file

    ordered = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    try:
        if isinstance(path, Path):
            save_file(ordered, path, metadata)
        else:
            path.write_bytes(save(ordered, metadata))
    except SafetensorError as error:
        # The library reports the system's error in words only; callers need the number.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def load_arrays(path: AnyPath) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays and metadata of `save_arrays`.

    Raises CheckpointError if they are missing, broken or larger than this machine's memory.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load

    size = _size(path)
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise CheckpointError(f"{path} has {size} bytes, more than this machine's memory")
    try:
        if isinstance(path, Path):
            with safe_open(path, "numpy") as file:
                names = file.keys()  # not iterable itself
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        content = path.read_bytes()
        arrays = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return arrays, header.get("__metadata__", {})
    # The last four are how the library meets shapes and types that numpy does not have.
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def write_json(path: AnyPath, value: Any) -> None:
    """Write JSON so that `path` holds either the old or the whole new text. Refuses NaN."""
    text = json.dumps(value, indent=1, allow_nan=False).encode()
    if not isinstance(path, Path):
        path.write_bytes(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text)
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def read_json(path: AnyPath) -> Any:
    """Read JSON. Raises CheckpointError if the file is missing, broken or above MAX_JSON."""
    size = _size(path)
    if size > MAX_JSON:
        raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_JSON} that are read")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def _size(path: AnyPath) -> int:
    """Bytes of a regular file; opening a pipe or a device would block."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    return status.st_size


def _file_digest(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: AnyPath, step: int, counters: dict[str, Any]) -> None:
    files = {}
    for name in _names(folder):
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{folder} holds {name!r}: use letters, digits, '_', '.' and '-'")
        path = _inside(folder, name)
        files[name] = {"size": _size(path), "sha256": _file_digest(path)}
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            _fsync(path)
    counters = json.loads(json.dumps(counters))  # as they will be read back, for the digest
    manifest = {"format": FORMAT, "step": step, "counters": counters, "files": files}
    write_json(folder / MANIFEST, manifest | {"sha256": _manifest_digest(manifest)})


def _manifest(folder: AnyPath) -> dict[str, Any]:
    """The manifest, of the right form and naming nothing outside; its files are not looked at."""
    path = _inside(folder, MANIFEST)
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {reprlib.repr(found)}, and this release reads {FORMAT}"
        )
    try:
        whole = manifest.get("sha256") == _manifest_digest(manifest)
    except RecursionError:
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is corrupt: its own SHA-256 differs")
    step, counters, files = (manifest.get(key) for key in ("step", "counters", "files"))
    if type(step) is not int or not isinstance(counters, dict) or not isinstance(files, dict):
        raise CheckpointError(f"{path} is malformed: it needs a step, counters and files")
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or not isinstance(entry, dict):
            raise CheckpointError(
                f"{path} names {name!r:.80}, outside of its folder or no plain file"
            )
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _inside(folder: AnyPath, name: str) -> AnyPath:
    """The path of a plain name, once no link on the way leads elsewhere."""
    path = folder / name
    real = os.path.realpath
    if isinstance(path, Path) and real(path) != f"{real(str(folder))}/{name}":
        raise CheckpointError(f"{path} is a link, outside of its folder: copy the file instead")
    return path


def _temporary(root: Path, step: str) -> Path:
    """A new name each time: an earlier try's role that is still writing must not get in here."""
    return root / f"{_TEMPORARY}{step}-{secrets.token_hex(4)}"


def _remove(folder: AnyPath) -> None:
    """Remove a checkpoint; from the first moment on it does not exist."""
    if isinstance(folder, Path):
        doomed = _temporary(folder.parent, folder.name)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        folder.fs.rm_file((folder / MANIFEST).path)
    with suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


def _tidy(root: AnyPath) -> None:
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


def _folders(root: AnyPath) -> list[AnyPath]:
    """Checkpoint folders, newest first; a replaced one comes after the one that replaces it."""
    if isinstance(root, Path):
        names = [path.name for path in root.iterdir() if path.is_dir()] if root.exists() else []
    else:
        split = [name.split("/") for name in _names(root)]
        names = [parts[0] for parts in split if parts[1:] == [MANIFEST]]
    names = sorted(filter(_FOLDER.fullmatch, names), key=lambda n: (n[:10], len(n) == 10))
    return [root / name for name in reversed(names)]


def _names(folder: AnyPath) -> list[str]:
    """Names of the files below a folder, as other processes see them now."""
    if isinstance(folder, Path):
        paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        return sorted(path.relative_to(folder).as_posix() for path in paths)
    found: list[str] = []
    folder.fs.invalidate_cache()
    # Asked whether one file exists, a storage that does not answer may say no; this raises.
    with suppress(FileNotFoundError):
        for path, _, files in folder.fs.walk(folder.path, on_error="raise"):
            found += [f"{path.rstrip('/')}/{name}" for name in files]
    return sorted(path.removeprefix(folder.path.rstrip("/") + "/") for path in found)
