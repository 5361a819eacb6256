"""The journal: its file format takes no damage for data, and a failing disk stops no training."""

import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import make_chunk
from test_shard import assert_whole, blocks, fill, rows

from worldflux_dist.replay import ReplayConfig, ReplayShard, segment
from worldflux_dist.replay.segment import MAGIC, Numbering, pack_chunk, pack_head, pack_record
from worldflux_dist.storage import CheckpointError, Disk

START = Numbering(4, 3, 8, 70, [(0, 7, 5, ("w", "a", 2), 3), ("x", 6, -1, ("w", "a", 2), 4)], [])


def file(compress="lz4", num=3):
    chunks = [make_chunk((0, 1), seq * 7, 7, seq, image=True) for seq in range(num)]
    parts = [pack_record(compress, *pack_chunk(chunk)) for chunk in chunks]
    return chunks, pack_head(compress, START) + b"".join(parts)


def frame(header, body=b""):
    crc = zlib.crc32(body, zlib.crc32(header))
    return struct.pack("<IQI", len(header), len(body), crc) + header + body


def read(data):
    head, chunks = segment.read_segment(bytes(data))
    return head, list(chunks)


@pytest.mark.parametrize("compress", ["lz4", "none"])
def test_chunks_come_back_from_a_segment(compress):
    chunks, data = file(compress)
    head, found = read(data)
    assert head.start == START
    assert len(found) == len(chunks)
    for ours, theirs in zip(chunks, found, strict=True):
        assert (ours.key, ours.version) == (theirs.key, theirs.version)
        assert ours.streams.tolist() == theirs.streams.tolist()
        for name, column in ours.columns().items():
            assert column.dtype == theirs.columns()[name].dtype
            np.testing.assert_array_equal(column, theirs.columns()[name])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_value_error(data):
    chunks, whole = file()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    try:
        _, found = read(damaged)
    except ValueError:
        return
    assert len(found) < len(chunks)  # cut between two records, which a checkpoint's hash notices


HEAD = pack_head("lz4", START)
RECORD = b'{"key":["w","a",0],"streams":[0],"version":0,"columns":[%b]}'


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no replay segment"),
        (b"\x80\x04pickle", "no replay segment"),
        (MAGIC, "Head is wrong"),
        (MAGIC + frame(b'{"format":9}'), "Head is wrong"),
        (MAGIC + frame(b"[" * 100_000), "Head is wrong"),
        (MAGIC + struct.pack("<IQI", 2**32 - 1, 2**63, 0), "middle of a record"),
        (HEAD + frame(RECORD % b'["reward","<f4",[1,1099511627776]]'), "claims"),
        (HEAD + frame(RECORD % b'["reward","<f4",[1,-4]]'), "column of <f4"),
        (HEAD + frame(RECORD % b'["reward","|O8",[1,4]]', b"x" * 32), r"column of \|O8"),
        (HEAD + frame(RECORD % b'["reward","<f4",[1,500000]]', b"x" * 9000), "unpacked"),
        (HEAD + frame(RECORD % b"", b"x"), "claims 0 bytes"),
        (HEAD + frame(b"{}", b"x"), "Record is wrong"),
    ],
)
def test_hostile_files_are_refused_before_memory_is_taken(data, match):
    tracemalloc.start()
    with pytest.raises(ValueError, match=match):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_hostile_numbering_is_refused(tmp_path):
    for bad in ({"end": 2}, {"tails": [(0, 2**70, 0, ("w", "a", 0), 2)]}, {"first": -1}):
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "0001/shard-0"
        folder.mkdir(parents=True)
        start = Numbering(**{**vars(START), **bad})
        _, good = file()
        _, records = good[: len(HEAD)], good[len(HEAD) :]
        (folder / "000000.seg").write_bytes(pack_head("lz4", start) + records)
        (folder / "index.json").write_text(
            '{"owner": "x", "segments": [], "seen": [], "oldest_open": "0001/shard-0/000000.seg"}'
        )
        with pytest.raises(CheckpointError, match=r"000000.seg cannot be used"):
            ReplayShard(ReplayConfig(4, 4, 60), 0, folder.parent.parent, "0001", 0, 1)


# ---------------------------------------------------------------------------------- the thread


class Faulty(Disk):
    """A disk that fails, or hangs, when told to."""

    def __init__(self):
        self.error: OSError | None = None
        self.hang = threading.Event()
        self.hang.set()

    def write(self, file, data):
        assert self.hang.wait(120)
        super().write(file, data[: len(data) // 2])
        if self.error:
            raise self.error
        super().write(file, data[len(data) // 2 :])


def wait_until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("segment_bytes", [600, 1 << 20])
def test_a_full_disk_degrades_and_recovers(tmp_path, segment_bytes):
    config = ReplayConfig(
        4, 4, 10_000, segment_bytes=segment_bytes, flush_every=0.02, pending_bytes=20_000
    )
    disk = Faulty()
    shard = ReplayShard(config, 0, tmp_path, "0001", 0, 1, disk=disk)
    fill(shard, 0, 5)
    shard.flush().result(10)
    disk.error = OSError(28, "No space left on device")
    fill(shard, 5, 6)
    with pytest.raises(OSError, match=r"not durable: .*shard-0 .*No space left.* tried again") as e:
        shard.seal().result(10)
    assert e.value.errno == 28
    assert shard.report().degraded
    fill(shard, 6, 200)  # training goes on, and most of it cannot be kept
    report = shard.report()
    assert report.total_steps == 200 * 14
    assert 50 * 14 < report.dropped_steps < 200 * 14
    assert report.durable_steps == 5 * 14
    assert not shard.durable(("w", "a", 199))
    assert shard._journal._pending < 25_000
    disk.error = None
    wait_until(lambda: not shard.report().degraded)
    fill(shard, 200, 210)
    state = shard.seal().result(10)
    report = shard.report()
    assert report.durable_steps + report.dropped_steps == 210 * 14
    here = blocks(shard.buffer)
    for saved, life in (([state], "0002"), ([], "0001")):
        other = ReplayShard(config, 0, tmp_path, life, 0, 1, saved)
        there = blocks(other.buffer)
        assert all(here[block][: len(rest)] == rest for block, rest in there.items())
        assert max(there) == max(here)
        assert len(rows(other)) == report.durable_steps
        assert_whole(other.buffer.sample(300))
        other.close()
    shard.close()


def test_no_more_is_dropped_than_must_be(tmp_path):
    config = ReplayConfig(4, 4, 10_000, segment_bytes=600, flush_every=60, pending_bytes=10_000)
    disk = Faulty()
    shard = ReplayShard(config, 0, tmp_path, "0001", 0, 1, disk=disk)
    disk.error = OSError(28, "No space left on device")
    for seq in range(80):
        fill(shard, seq, seq + 1)
        wait_until(lambda: not any(part.raw for part in shard._journal._open))
        if seq == 0:
            assert isinstance(shard.flush().exception(10), OSError)
    assert shard.report().dropped_steps > 0
    assert shard._journal._pending > 8_000
    disk.error = None
    shard.close()


def test_a_folder_that_goes_away_is_survived(tmp_path):
    config = ReplayConfig(4, 4, 60, flush_every=0.02)
    shard = ReplayShard(config, 0, tmp_path / "run", "0001", 0, 1)
    fill(shard, 0, 2)
    shard.flush().result(10)
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").write_text("a file where the folder was")
    fill(shard, 2, 4)
    with pytest.raises(OSError, match="not durable"):
        shard.flush().result(10)
    assert not shard.durable(("w", "a", 3))
    (tmp_path / "run").unlink()
    (tmp_path / "away").rename(tmp_path / "run")
    wait_until(lambda: shard.durable(("w", "a", 3)))
    assert shard.report().dropped_steps == 0
    shard.close()


def test_a_slow_disk_holds_the_shard_back_only_at_the_bound(tmp_path):
    config = ReplayConfig(4, 4, 10_000, flush_every=60, pending_bytes=20_000)
    disk = Faulty()
    shard = ReplayShard(config, 0, tmp_path, "0001", 0, 1, disk=disk)
    disk.hang.clear()
    shard.flush()  # has nothing to write yet
    fill(shard, 0, 1)
    flushed = shard.flush()
    fill(shard, 1, 10)  # does not wait
    assert not flushed.done()
    thread = threading.Thread(target=fill, args=(shard, 10, 400))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert shard._journal._pending <= 20_000
    disk.hang.set()
    thread.join(10)
    assert not thread.is_alive()
    shard.flush().result(10)
    assert shard.report().durable_steps == 400 * 14
    assert shard.report().dropped_steps == 0
    shard.close()


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_degrades(tmp_path):
    code = (
        "import resource, signal, sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from test_shard import fill, ReplayConfig, ReplayShard\n"
        f"shard = ReplayShard(ReplayConfig(4, 4, 60), 0, {str(tmp_path)!r}, '0001', 0, 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))\n"
        "fill(shard, 0, 5)\n"
        "error = shard.seal().exception(10)\n"
        "assert isinstance(error, OSError) and 'too large' in str(error), error\n"
        "fill(shard, 5, 9); assert shard.buffer.sample().reward.shape == (4, 4)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "assert shard.seal().result(10)['segments'] and not shard.report().degraded\n"
        "shard.close()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_a_refused_chunk_leaves_no_trace(tmp_path):
    shard = ReplayShard(ReplayConfig(4, 4, 60, flush_every=60), 0, tmp_path, "0001", 0, 1)
    wrong = make_chunk((0, 1), 0, 7)
    wrong.obs["obs"] = wrong.obs["obs"].astype(np.complex64)
    with pytest.raises(ValueError, match="complex64: only plain numbers"):
        shard.add(wrong)
    wrong.obs["obs"] = wrong.obs["obs"].real.astype(np.float32)[:, :3]
    with pytest.raises(ValueError, match="leading shape"):
        shard.add(wrong)
    fill(shard, 0, 3)
    state = shard.seal().result(10)
    assert state["total_steps"] == sum(s["steps"] for s in state["segments"]) == 42
    shard.close()
    with pytest.raises(RuntimeError, match="closed"):
        shard.seal().result(10)
