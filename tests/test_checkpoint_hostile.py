"""Checkpoints made to harm are refused by one sentence: nothing is unpickled, nothing outside of
the folder is touched and no memory is asked for on the word of a header."""

import json
import os
import pickle
import struct
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from worldflux_dist import checkpoint, storage
from worldflux_dist.storage import CheckpointError


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | UPath:
    """A good checkpoint of step 10."""
    root = tmp_path / "run" if request.param == "file" else UPath(f"memory://{uuid.uuid4()}/run")
    return write(root, 10)


def write(root: Path | UPath, step: int) -> Path | UPath:
    folder = checkpoint.begin(root, step)
    storage.save_arrays(folder / "agent.safetensors", {"w": np.full(3, step)})
    return checkpoint.commit(root, folder, step)


def forge(folder: Path | UPath, **changes: Any) -> None:
    """Change entries of the manifest and make its digest right again."""
    manifest = storage.read_json(folder / "manifest.json") | changes
    manifest["sha256"] = checkpoint._manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path | UPath, complaint: str) -> None:
    """Whatever is asked of the checkpoint, for very little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=complaint):
            checkpoint.verify(folder)
        with pytest.raises(CheckpointError, match=complaint):
            checkpoint.newest(folder.parent)
        assert checkpoint.kept(folder.parent) == []
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


NAMES = [
    *("../outside", "/etc/hostname", "a/../../outside", "..", ".", "", "a//b", "./a", "a/", "a\\b"),
    *("file:///etc/hostname", "s3://bucket/x", "memory://x", "~root/x", "a\0b", "a\n", "x" * 300),
    *(".hidden", "\u0661", "-rf"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_not_leave_the_folder(name: str, folder: Path | UPath) -> None:
    (folder.parent.parent / "outside").write_text("secret")
    forge(folder, files={name: {"size": 6, "sha256": ""}})
    refused(folder, "outside of its folder")


@pytest.mark.parametrize("linked", ["file", "folder", "manifest"])
def test_a_link_is_not_followed(linked: str, tmp_path: Path) -> None:
    folder, other = write(tmp_path / "run", 10), write(tmp_path / "other", 10)
    name = {"file": "agent.safetensors", "folder": "sub", "manifest": "manifest.json"}[linked]
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(other if linked == "folder" else other / name)
    if linked == "folder":
        entry = storage.read_json(other / "manifest.json")["files"]["agent.safetensors"]
        forge(folder, files={"sub/agent.safetensors": entry})
    with pytest.raises(CheckpointError, match="is a link, outside of its folder"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["agent.safetensors", "manifest.json"])
def test_a_pipe_is_not_opened(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is no regular file"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("size", [2**62, -1, 10**400, 1e300, "144", None, [144]])
def test_a_size_that_is_not_the_files(size: Any, folder: Path | UPath) -> None:
    entry = storage.read_json(folder / "manifest.json")["files"]["agent.safetensors"]
    forge(folder, files={"agent.safetensors": entry | {"size": size}})
    said = r"agent\.safetensors has \d+ bytes instead of|files\.agent\.safetensors\.size is "
    with pytest.raises(CheckpointError, match=said):
        checkpoint.verify(folder)


MANIFESTS = {
    "a list": (b"[1, 2]", "has format None"),
    "a number": (b"1", "has format None"),
    "nothing": (b"", "corrupt or truncated"),
    "a pickle": (pickle.dumps({"format": 1}), "corrupt or truncated"),
    "a number of many digits": (b'{"format": ' + b"9" * 10_000 + b"}", "corrupt or truncated"),
    "a deep list": (b"[" * 1_000_000, "corrupt or truncated"),
    "a deep dictionary": (b'{"format":' * 100_000 + b"1" + b"}" * 100_000, "corrupt or truncated"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_another_kind(name: str, folder: Path | UPath) -> None:
    content, complaint = MANIFESTS[name]
    (folder / "manifest.json").write_bytes(content)
    refused(folder, complaint)


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_nesting_that_reads_but_hardly_writes(depth: int, tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    deep = "[" * depth + "]" * depth
    for text in (f'{{"format": 1, "counters": {deep}}}', f'{{"format": {deep}}}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError):
            checkpoint.newest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"step": "10"}, {"step": None}, {"step": True}, {"counters": [1]}, {"files": ["agent"]}],
)
def test_an_entry_of_the_wrong_type(changes: dict[str, Any], folder: Path | UPath) -> None:
    forge(folder, **changes)
    refused(folder, f"is malformed: {next(iter(changes))} is ")
    forge(folder, step=10, counters={}, files={"agent.safetensors": 144})
    refused(folder, "is malformed: files.agent.safetensors is 144")


def test_a_manifest_too_large_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    os.truncate(folder / "manifest.json", storage.MAX_JSON + 1)
    refused(folder, "more than the 67108864 that are read")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRIES = st.dictionaries(
    st.sampled_from(["step", "counters", "files", "format"]), JSON, min_size=1
) | st.fixed_dictionaries(
    {"files": st.dictionaries(st.sampled_from(["agent.safetensors", *NAMES]), JSON, min_size=1)}
)


@settings(max_examples=60, deadline=None, database=None)
@given(changes=ENTRIES)
def test_any_forged_manifest_is_refused_or_harmless(changes: dict[str, Any]) -> None:
    folder = write(UPath(f"memory://{uuid.uuid4()}"), 10)
    forge(folder, **changes)
    try:
        manifest = checkpoint.verify(folder)
    except CheckpointError:
        return
    assert set(manifest["files"]) <= {"agent.safetensors"}


# ------------------------------------------------------------------------------------- arrays


def test_a_pickle_is_not_loaded(folder: Path | UPath, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    root = folder.parent
    written = checkpoint.begin(root, 20)
    (written / "agent.safetensors").write_bytes(pickle.dumps(Bomb()))
    final = checkpoint.commit(root, written, 20)
    checkpoint.verify(final)  # the hashes are right: what makes it safe is how it is read
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        storage.load_arrays(final / "agent.safetensors")
    assert not (tmp_path / "exploded").exists()


def tensor(dtype: str, shape: list[int], size: int) -> bytes:
    """A safetensors file with one tensor that claims `size` bytes; at most 16 are there."""
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(min(size, 16))


BOMBS = {
    "64 GiB in 100 bytes": tensor("F32", [2**34], 2**36),
    "a shape that overflows": tensor("F32", [2**62, 2**62], 8),
    "an empty shape too large": tensor("F32", [0, 2**62], 0),
    "a negative shape": tensor("F32", [-1], 4),
    "200 dimensions": tensor("U8", [1] * 200, 1),
    "a header of 1 TiB": struct.pack("<Q", 2**40) + b"{}",
    "a header of 90 MB": struct.pack("<Q", 90_000_000) + b"{",
    "a deep header": struct.pack("<Q", 500_000) + b'{"a":' * 100_000,
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "nothing": b"",
    **{f"type {name}": tensor(name, [2], 4) for name in ("BF16", "V16", "object")},
    **{f"type {name}": tensor(name, [2], 2) for name in ("F8_E4M3", "F8_E8M0")},
    "type F4": tensor("F4", [2], 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_arrays_that_claim_too_much(name: str, folder: Path | UPath) -> None:
    path = folder / "agent.safetensors"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="corrupt or truncated"):
            storage.load_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_sparse_file_larger_than_memory(tmp_path: Path) -> None:
    """It takes no room on the disk, and its header is right."""
    path, size = tmp_path / "a.safetensors", 2**43
    path.write_bytes(tensor("U8", [size], size))
    os.truncate(path, path.stat().st_size - 16 + size)
    with pytest.raises(CheckpointError, match="more than this machine's memory"):
        storage.load_arrays(path)


# ------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("name", ["link", "with space", ".hidden"])
def test_what_no_manifest_may_name_is_not_committed(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    good = write(tmp_path / "run", 10)
    folder = checkpoint.begin(tmp_path / "run", 20)
    if name == "link":
        (folder / name).symlink_to(tmp_path / "outside")
    else:
        (folder / name).write_text("x")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.commit(tmp_path / "run", folder, 20)
    assert list((tmp_path / "run").iterdir()) == [good]
    assert (tmp_path / "outside").read_text() == "secret"


def test_folders_that_are_links_lead_no_removal_outside(tmp_path: Path) -> None:
    other = write(tmp_path / "other", 40)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "0000000040").symlink_to(other)
    (tmp_path / "run" / ".writing-0000000050-x").symlink_to(tmp_path / "other")
    for step in (10, 20):
        write(tmp_path / "run", step)
    assert checkpoint.verify(other)["step"] == 40
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert found[1]["step"] == 20
