"""Checkpoints survive crashes, corruption and a full disk, or say which file is at fault."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from worldflux_dist import checkpoint
from worldflux_dist.checkpoint import CheckpointError


def write(root: Path, step: int, keep: int = 2) -> Path:
    with checkpoint.writing(root, step, keep, counters={"env_steps": step * 4}) as folder:
        checkpoint.save_arrays(folder / "agent.safetensors", {"w": np.full((3, 2), step)})
        (folder / "shard0").mkdir()
        (folder / "shard0" / "replay.bin").write_bytes(bytes(range(256)) * 8)
    return root / f"{step:010d}"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def run(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, with this file's `write` and the root at hand."""
    start = f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    start += (
        f"from pathlib import Path\nfrom test_checkpoint import *\nroot = Path({str(root)!r})\n"
    )
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_round_trip_and_keep(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.newest(root) is None
    for step in (10, 20, 30):
        write(root, step)
    assert names(root) == ["0000000020", "0000000030"]
    found = checkpoint.newest(root)
    assert found is not None
    folder, manifest = found
    assert folder == root / "0000000030"
    assert (manifest["step"], manifest["counters"]) == (30, {"env_steps": 120})
    assert set(manifest["files"]) == {"agent.safetensors", "shard0/replay.bin"}
    arrays, _ = checkpoint.load_arrays(folder / "agent.safetensors")
    np.testing.assert_array_equal(arrays["w"], np.full((3, 2), 30))


def test_same_step_again_and_an_abandoned_future(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    (write(tmp_path, 20) / "agent.safetensors").write_bytes(b"x")
    write(tmp_path, 15)  # resumed from 10: 20 is broken, and of a life that was abandoned
    assert names(tmp_path) == ["0000000010", "0000000015"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 15


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAKAGES = {
    "flipped file": ("replay.bin is corrupt", lambda f: flip(f / "shard0" / "replay.bin")),
    "truncated file": (
        "replay.bin has 100 bytes instead of 2048",
        lambda f: (f / "shard0" / "replay.bin").write_bytes(bytes(100)),
    ),
    "missing file": (
        "agent.safetensors is missing",
        lambda f: (f / "agent.safetensors").unlink(),
    ),
    "missing manifest": ("manifest.json is missing", lambda f: (f / "manifest.json").unlink()),
    "truncated manifest": (
        "manifest.json is corrupt",
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:-20]),
    ),
    "changed counter": (
        "manifest.json is corrupt",
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"env_steps": 80', '"env_steps": 81')
        ),
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_checkpoint_is_passed_over(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    complaint, breaks = BREAKAGES[name]
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    breaks(bad)
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint.verify(bad)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found[0], found[1]["step"]) == (good, 10)
    [record] = caplog.records
    assert complaint in record.getMessage()
    assert f"{good}, is used instead" in record.getMessage()


def test_only_broken_checkpoints_is_an_error(tmp_path: Path) -> None:
    flip(write(tmp_path, 10) / "agent.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link"])
def test_manifest_may_not_leave_its_folder(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    (tmp_path / "outside").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: {"size": 6, "sha256": ""}}
    manifest["sha256"] = checkpoint._manifest_digest(manifest)
    checkpoint.write_json(folder / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        checkpoint.verify(folder)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    checkpoint.write_json(folder / "manifest.json", {"format": 99})
    with pytest.raises(CheckpointError, match="format 99, and this release reads 1"):
        checkpoint.verify(folder)


def test_failure_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with pytest.raises(IsADirectoryError), checkpoint.writing(tmp_path, 20) as folder:
        folder.write_text("x")
    assert names(tmp_path) == ["0000000010"]


def test_full_disk_names_what_is_safe(tmp_path: Path) -> None:
    good = write(tmp_path, 10)
    with (
        pytest.raises(CheckpointError, match=f"disk is full.*{good} is safe"),
        checkpoint.writing(tmp_path, 20),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert names(tmp_path) == ["0000000010"]


def test_full_disk_in_a_role_that_writes_arrays(tmp_path: Path) -> None:
    """The file size limit is a real error of the system inside the safetensors library."""
    done = run(
        "import resource\n"
        "write(root, 10)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "with checkpoint.writing(root, 20) as folder:\n"
        "    checkpoint.save_arrays(folder / 'big', {'x': np.zeros(100_000)})\n",
        tmp_path,
    )
    assert done.returncode == 1
    said = f"the disk is full, so checkpoint 20 was not written; {tmp_path}/0000000010 is safe"
    assert f"CheckpointError: {said}" in done.stderr
    assert names(tmp_path) == ["0000000010"]


CRASHES = {
    "while roles write": "with checkpoint.writing(root, 20) as f: os._exit(9)",
    "before the manifest": "checkpoint._write_manifest = lambda *_: os._exit(9); write(root, 20)",
    "before the rename": "checkpoint._put_in_place = lambda *_: os._exit(9); write(root, 20)",
    "before the old ones go": "checkpoint._prune = lambda *_: os._exit(9); write(root, 20)",
}


@pytest.mark.parametrize("moment", CRASHES)
def test_crash_points(moment: str, tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    assert run(CRASHES[moment], tmp_path).returncode == 9
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == (20 if moment == "before the old ones go" else 10)
    write(tmp_path, 30)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert len(names(tmp_path)) == 2


def test_crash_while_replacing_a_checkpoint(tmp_path: Path) -> None:
    """Between the two renames of a replacement only the old one exists, under another name."""
    write(tmp_path, 10)
    code = (
        "rename, calls = Path.rename, []\n"
        "def once(self, to):\n"
        "    if calls: os._exit(9)\n"
        "    calls.append(self); return rename(self, to)\n"
        "Path.rename = once\n"
        "write(root, 10)"
    )
    assert run(code, tmp_path).returncode == 9
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0].name == "0000000010.old"
    write(tmp_path, 20)
    assert names(tmp_path) == ["0000000010", "0000000020"]


def test_arrays_of_any_layout(tmp_path: Path) -> None:
    arrays = {
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[::-1],
    }
    checkpoint.save_arrays(tmp_path / "a", arrays, {"kind": "test"})
    loaded, metadata = checkpoint.load_arrays(tmp_path / "a")
    assert metadata == {"kind": "test"}
    assert set(loaded) == set(arrays)
    for name, value in arrays.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        np.testing.assert_array_equal(loaded[name], value)


def test_broken_files_say_which(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save_arrays(path, {"x": np.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is corrupt or truncated"):
        checkpoint.load_arrays(path)
    with pytest.raises(CheckpointError, match="b is missing"):
        checkpoint.load_arrays(tmp_path / "b")
    (tmp_path / "c.json").write_bytes(b'{"a": \xff')
    with pytest.raises(CheckpointError, match=r"c\.json is corrupt or truncated"):
        checkpoint.read_json(tmp_path / "c.json")


def test_write_json_keeps_the_old_text_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(path, {"a": float("nan")})
    assert checkpoint.read_json(path) == {"a": 1}
    crash = (
        "Path.replace = lambda *_: os._exit(9)\ncheckpoint.write_json(root / 'x.json', {'a': 2})"
    )
    assert run(crash, tmp_path).returncode == 9
    assert checkpoint.read_json(path) == {"a": 1}
