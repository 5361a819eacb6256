"""Checkpoints survive crashes, corruption and a full disk, or say which file is at fault."""

import logging
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from upath import UPath

from worldflux_dist import checkpoint, storage
from worldflux_dist.storage import CheckpointError


@pytest.fixture(params=["file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | UPath:
    return tmp_path if request.param == "file" else UPath(f"memory://{uuid.uuid4()}")


def write(root: Path | UPath, step: int, keep: int = 2) -> Path | UPath:
    folder = checkpoint.begin(root, step)
    storage.save_arrays(folder / "agent.safetensors", {"w": np.full((3, 2), step)})
    (folder / "shard0").mkdir(parents=True, exist_ok=True)
    (folder / "shard0" / "replay.bin").write_bytes(bytes(range(256)) * 8)
    return checkpoint.commit(root, folder, step, keep, counters={"env_steps": step * 4})


def names(root: Path | UPath) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def run(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, with this file's `write` and the root at hand."""
    start = f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    start += (
        f"from pathlib import Path\nfrom test_checkpoint import *\nroot = Path({str(root)!r})\n"
    )
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_round_trip_and_keep(root: Path | UPath) -> None:
    root = root / "checkpoints"
    assert checkpoint.newest(root) is None
    assert checkpoint.kept(root) == []
    for step in (10, 20, 30):
        assert write(root, step) == root / f"{step:010d}"
    assert names(root) == ["0000000020", "0000000030"]
    found = checkpoint.newest(root)
    assert found is not None
    folder, manifest = found
    assert folder == root / "0000000030"
    assert (manifest["step"], manifest["counters"]) == (30, {"env_steps": 120})
    assert set(manifest["files"]) == {"agent.safetensors", "shard0/replay.bin"}
    arrays = storage.load_arrays(folder / "agent.safetensors")
    np.testing.assert_array_equal(arrays["w"], np.full((3, 2), 30))
    assert [saved["counters"]["env_steps"] for saved in checkpoint.kept(root)] == [120, 80]


def test_same_step_again_and_an_abandoned_future(root: Path | UPath) -> None:
    for step in (10, 20):
        write(root, step)
    (write(root, 20) / "agent.safetensors").write_bytes(b"x")
    write(root, 15)  # resumed from 10: 20 is broken, and of a life that was abandoned
    assert names(root) == ["0000000010", "0000000015"]
    found = checkpoint.newest(root)
    assert found is not None
    assert found[1]["step"] == 15


def test_abandoned_leaves_nothing(root: Path | UPath) -> None:
    write(root, 10)
    folder = checkpoint.begin(root, 20)
    (folder / "x").write_bytes(b"x")
    checkpoint.abandon(folder)
    assert names(root) == ["0000000010"]
    checkpoint.abandon(folder)  # nothing more to do
    final = write(root, 20)
    checkpoint.abandon(final if isinstance(root, UPath) else folder)
    assert names(root) == ["0000000010", "0000000020"], "a committed one stays"


def test_a_late_writer_of_an_abandoned_try_is_kept_out(tmp_path: Path) -> None:
    late = checkpoint.begin(tmp_path, 10)
    checkpoint.abandon(late)
    folder = checkpoint.begin(tmp_path, 10)
    late.mkdir()
    (late / "late").write_text("x")
    assert not list(folder.iterdir())
    checkpoint.commit(tmp_path, folder, 10)
    write(tmp_path, 20)
    assert names(tmp_path) == ["0000000010", "0000000020"]


def test_object_store_folder_without_a_manifest_is_none() -> None:
    root = UPath(f"memory://{uuid.uuid4()}")
    good = write(root, 10)
    (write(root, 20) / "manifest.json").unlink()
    found = checkpoint.newest(root)
    assert found is not None
    assert found[0] == good
    assert [saved["step"] for saved in checkpoint.kept(root)] == [10]
    write(root, 30)
    assert names(root) == ["0000000010", "0000000030"]


def test_a_storage_that_does_not_answer_is_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run would start over, and segments of replay in use would be deleted."""
    root = UPath(f"memory://{uuid.uuid4()}")
    write(root, 10)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to storage")

    with monkeypatch.context() as patch:
        patch.setattr(type(root.fs), "ls", refuse)
        patch.setattr(type(root.fs), "info", refuse)
        for ask in (checkpoint.newest, checkpoint.kept, lambda r: checkpoint.begin(r, 20)):
            with pytest.raises(ConnectionError):
                ask(root)
    found = checkpoint.newest(root)
    assert found is not None
    assert found[1]["step"] == 10


@pytest.mark.parametrize(
    ("text", "local"),
    [("{}/a", "{}/a"), ("file://{}/a", "{}/a"), ("{}/b/../a", "{}/a")],
)
def test_as_path_local(text: str, local: str, tmp_path: Path) -> None:
    found = storage.as_path(text.format(tmp_path))
    assert isinstance(found, Path)
    assert found == Path(local.format(tmp_path))


def test_as_path_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.as_path("runs/a") == tmp_path / "runs" / "a"
    found = storage.as_path("memory://runs/a")
    assert isinstance(found, UPath)
    assert str(found / "b") == "memory://runs/a/b"
    with pytest.raises(ValueError, match="two slashes"):
        storage.as_path(Path("s3://bucket/runs"))
    with pytest.raises(ValueError, match=r"nope://x cannot be used \(Protocol not known: nope\)"):
        storage.as_path("nope://x")
    fsspec.register_implementation("absent", "absent.Store", errtxt="Install absent_package")
    with pytest.raises(ValueError, match=r"absent://x cannot be used \(Install absent_package\)"):
        storage.as_path("absent://x")


def flip(path: Path | UPath) -> None:
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


def test_newer_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    storage.write_json(folder / "manifest.json", {"format": 99})
    with pytest.raises(CheckpointError, match="format 99, and this release reads 2"):
        checkpoint.verify(folder)


def test_full_disk_in_a_role_that_writes_arrays(tmp_path: Path) -> None:
    """The file size limit is a real error of the system inside the safetensors library."""
    done = run(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: storage.save_arrays(root / 'big', {'x': np.zeros(100_000)})\n"
        "except OSError as error: assert storage.disk_full(error); print('full')\n",
        tmp_path,
    )
    assert done.stdout == "full\n", done.stderr


def test_full_disk_while_the_manifest_is_written(tmp_path: Path) -> None:
    write(tmp_path, 10)
    done = run(
        "import resource\n"
        "folder = checkpoint.begin(root, 20)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))\n"
        "try: checkpoint.commit(root, folder, 20, counters={'x': 'y' * 6_000})\n"
        "except OSError as error: assert storage.disk_full(error); print('full')\n",
        tmp_path,
    )
    assert done.stdout == "full\n", done.stderr
    assert names(tmp_path) == ["0000000010"]


def test_arrays_of_any_layout(root: Path | UPath) -> None:
    arrays = {
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[::-1],
    }
    storage.save_arrays(root / "a", arrays)
    loaded = storage.load_arrays(root / "a")
    assert set(loaded) == set(arrays)
    for name, value in arrays.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        np.testing.assert_array_equal(loaded[name], value)


def test_broken_files_say_which(root: Path | UPath) -> None:
    path = root / "a.safetensors"
    storage.save_arrays(path, {"x": np.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is corrupt or truncated"):
        storage.load_arrays(path)
    with pytest.raises(CheckpointError, match="b is missing"):
        storage.load_arrays(root / "b")
    (root / "c.json").write_bytes(b'{"a": \xff')
    with pytest.raises(CheckpointError, match=r"c\.json is corrupt or truncated"):
        storage.read_json(root / "c.json")


def test_write_json_keeps_the_old_text_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(path, {"a": float("nan")})
    assert storage.read_json(path) == {"a": 1}
    crash = "Path.replace = lambda *_: os._exit(9)\nstorage.write_json(root / 'x.json', {'a': 2})"
    assert run(crash, tmp_path).returncode == 9
    assert storage.read_json(path) == {"a": 1}
