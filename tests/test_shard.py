"""Replay shards: a chunk counts once, whatever dies, and what was sealed comes back exactly."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_replay import assert_windows_hold_together, make_chunk, stats
from upath import UPath

from worldflux_dist.replay import FencedError, ReplayConfig, ReplayShard
from worldflux_dist.replay.segment import STATES
from worldflux_dist.storage import CheckpointError

CONFIG = ReplayConfig(4, 4, capacity=60, segment_bytes=3000, flush_every=60)
ROOMY = ReplayConfig(4, 4, capacity=10_000, segment_bytes=2000, flush_every=60)


def fill(shard, start, stop, streams=(0, 1), num=7, **more):
    for seq in range(start, stop):
        shard.add(make_chunk(streams, seq * num, num, seq, **more))


def seal(shard):
    """The state as it comes back out of a manifest."""
    return json.loads(json.dumps(shard.seal().result(10)))


def blocks(buffer):
    """Number and labels (stream, time) of every block that holds steps."""
    found = {}
    for block in range(buffer.first, buffer.end):
        slot = block % buffer._ring.num
        if buffer._ring.fill[slot]:
            rows = buffer._columns["obs/obs"].array[slot, : buffer._ring.fill[slot]]
            found[block] = [tuple(row) for row in rows.astype(int).tolist()]
    return found


def rows(*shards):
    return Counter(row for s in shards for block in blocks(s.buffer).values() for row in block)


def assert_whole(batch):
    """No step is missing inside a window, except where a reset ends an abandoned episode."""
    stream, time = batch.obs["obs"][..., 0], batch.obs["obs"][..., 1]
    assert (stream == stream[:, :1]).all()
    assert ((np.diff(time) == 1) | batch.is_first[:, 1:]).all()
    assert (batch.is_last[:, :-1] == batch.is_first[:, 1:]).all()


def assert_same(one, other):
    assert stats(one) == stats(other)
    if one.ready:
        ours, theirs = one.sample().columns(), other.sample().columns()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture
def make(tmp_path):
    """Makes shards in one folder and closes them at the end."""
    made = []

    def one(life="0001", saved=(), index=0, num=1, config=CONFIG, root=tmp_path, **more):
        made.append(ReplayShard(config, 5, root, life, index, num, saved, **more))
        return made[-1]

    yield one
    for shard in made:
        shard.close()


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("num_chunks", [0, 3, 23, 60])
@pytest.mark.parametrize("more", [{}, {"compress": "none"}, {"recent": 1, "prioritized": 2}])
def test_the_same_samples_follow_after_a_resume(make, num_chunks, more):
    config = ReplayConfig(4, 4, capacity=60, segment_bytes=1000, flush_every=60, **more)
    shard = make(config=config)
    fill(shard, 0, num_chunks)
    if num_chunks:
        _, ids = shard.buffer.sample_with_ids(3)
        shard.buffer.prioritize(ids, np.array([3.0, 2.0, 5.0]))
        fill(shard, 0, 1)  # a duplicate
    state = seal(shard)
    other = make("0002", [state], config=config)
    fill(other, 0, num_chunks)
    assert other.report().duplicates == num_chunks + (num_chunks > 0)
    other.buffer.duplicates = shard.buffer.duplicates
    for seq in range(num_chunks, num_chunks + 20):
        for each in (shard, other):
            fill(each, seq, seq + 1)
        assert_same(shard.buffer, other.buffer)
    again = make("0003", [seal(other)], config=config)  # built on two earlier lives
    assert_same(other.buffer, again.buffer)


def test_the_online_queue_as_a_list_is_still_read(make):
    """As shards left it before it was packed; the form of the file is the same."""
    shard = make("0001")
    fill(shard, 0, 6)
    state = seal(shard)
    queue = list(shard.buffer._online)
    assert queue
    (state,) = STATES.validate_python([state | {"online": queue}])
    assert_same(make("0002", [state]).buffer, shard.buffer)
    with pytest.raises(ValueError, match="numbers are expected"):
        STATES.validate_python([state | {"online": [*queue, -1]}])


def test_a_state_is_of_the_moment_it_was_sealed(make):
    shard = make()
    fill(shard, 0, 23)
    pending = shard.seal()
    before, sizes = blocks(shard.buffer), stats(shard.buffer)
    fill(shard, 23, 60)
    shard.seal().result(10)
    fill(shard, 60, 61)
    other = make("0002", [pending.result(10)])
    assert (blocks(other.buffer), stats(other.buffer)) == (before, sizes)


@pytest.mark.parametrize("capacity", [32, 500])
def test_a_resume_with_another_capacity_keeps_the_newest(make, capacity):
    shard = make()
    fill(shard, 0, 23)
    config = ReplayConfig(200, 4, capacity, online=False)
    other = make("0002", [seal(shard)], config=config)
    assert other.buffer.num_steps >= min(60, capacity) - 8
    fill(other, 23, 24)
    assert_windows_hold_together(other.buffer.sample())
    newest = {(stream, time) for stream in (0, 1) for time in range(24 * 7 - 12, 24 * 7)}
    assert newest <= rows(other).keys()


def test_another_batch_length_deals_the_steps_out_anew(make):
    shard = make(config=ROOMY)
    fill(shard, 0, 9)
    other = make("0002", [seal(shard)], config=ReplayConfig(4, 9, 10_000, flush_every=60))
    assert rows(other) == rows(shard)
    assert_windows_hold_together(other.buffer.sample())


def test_a_restart_within_a_life_finds_what_is_durable(make):
    config = ReplayConfig(4, 4, capacity=60, flush_every=60)
    shard = make(config=config)
    fill(shard, 0, 30)
    state = seal(shard)
    shard = make("0002", [state], config=config)
    fill(shard, 30, 40)
    shard.flush().result(10)
    durable = blocks(shard.buffer)
    fill(shard, 40, 41)  # received and not durable: lost
    assert shard.durable(("w", "a", 39))
    assert not shard.durable(("w", "a", 40))
    back = make("0002", [state], config=config)
    assert blocks(back.buffer) == durable
    assert back.report().durable_steps == back.report().total_steps == 40 * 14
    assert back.add(make_chunk((0, 1), 39 * 7, 7, 39)) == 0
    assert back.add(make_chunk((0, 1), 40 * 7, 7, 40)) == 14
    assert stats(back.buffer)["online"] <= 2  # only what is new is fresh


def test_unwritten_steps_are_durable_within_the_interval(make):
    shard = make(config=ReplayConfig(4, 4, 60, flush_every=0.01))
    fill(shard, 0, 2)
    began = time.monotonic()
    while not shard.durable(("w", "a", 1)):  # no flush was asked for
        assert time.monotonic() - began < 120
        time.sleep(0.01)


@pytest.mark.parametrize("path", [[2, 3, 1], [1, 4, 2]])
def test_resharding_keeps_every_row_and_every_mark(make, path):
    streams, seq, shards, states, expected = np.arange(6), 0, [], [], Counter()
    for life, num in enumerate(path):
        shards = [make(f"{life:04}", states, i, num, ROOMY) for i in range(num)]
        assert rows(*shards) == expected
        for index, shard in enumerate(shards):
            for row in rows(shard):
                assert row[0] % num == index
            assert shard.add(make_chunk([index], 0, 1, seq - 1, "w-0", f"life-{life - 1}")) == (
                life == 0
            )
        for _ in range(5):
            for index, shard in enumerate(shards):
                mine = streams[streams % num == index].tolist()
                fill(shard, seq, seq + 1, mine, writer=f"w-{index}", life=f"life-{life}")
            seq += 1
        expected = rows(*shards)
        states = [seal(shard) for shard in shards]
    assert {row[1] for row in expected} >= set(range(7 * seq))
    assert_whole(shards[0].buffer.sample(100))


def test_retain_deletes_only_what_nobody_needs(make, tmp_path):
    shard = make()
    fill(shard, 0, 40)
    old = seal(shard)
    names = {s["name"] for s in old["segments"]}
    other = make("0002", [old])
    (tmp_path / "0001/shard-0/000099.seg").write_bytes(b"written after the checkpoint")
    for seq in range(40, 140, 10):  # a segment for every two of these
        fill(other, seq, seq + 10)
        other.flush().result(10)
    new = seal(other)
    newer = {s["name"] for s in new["segments"]}
    fill(other, 140, 141)
    other.flush().result(10)

    def files():
        return {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.seg")}

    before = files()
    other.retain(names | newer)
    assert names | newer <= files() < before
    make("0003", [old])
    other = make("0002")  # restarted after some of its segments are gone
    assert other.buffer.end > new["end"]
    for seq in (0, 50, 140):  # their steps and segments may be gone: they are known all the same
        assert other.add(make_chunk((0, 1), seq * 7, 7, seq)) == 0
    other.retain(newer)
    assert not files() & names
    assert newer <= files()
    back = make("0002")
    assert blocks(back.buffer) == blocks(other.buffer)
    assert_same(make("0003x", [new]).buffer, make("0003y", [new]).buffer)


def test_memory_and_other_file_systems(make):
    root = UPath("memory://replay-test/run")
    shard = make(root=root)
    fill(shard, 0, 23)
    state = seal(shard)
    fill(shard, 23, 24)
    shard.flush().result(10)
    assert blocks(make(root=root).buffer) == blocks(shard.buffer)
    other = make("0002", [state], root=root)
    assert other.buffer.end == state["end"]
    other.retain(set())
    assert not list((root / "0001/shard-0").glob("*.seg")) or other.buffer.first < state["end"]


# ---------------------------------------------------------------------------- trouble on the way


def test_a_zombie_is_fenced_off(make):
    zombie = make()
    fill(zombie, 0, 3)
    zombie.flush().result(10)
    shard = make()
    fill(zombie, 3, 4)
    with pytest.raises(FencedError):
        zombie.flush().result(10)
    with pytest.raises(FencedError, match="another process"):
        fill(zombie, 4, 5)
    with pytest.raises(FencedError):
        zombie.seal().result(10)
    with pytest.raises(FencedError):
        zombie.retain(set())
    fill(shard, 3, 4)
    shard.flush().result(10)
    assert rows(make()) == rows(shard)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize("adopted", [True, False])
def test_a_damaged_segment_is_named(make, tmp_path, damage, adopted):
    shard = make()
    fill(shard, 0, 10)
    state = seal(shard)
    path = tmp_path / state["segments"][-1]["name"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "gone" and not adopted:
        return  # what is not on disk was never written
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-3])
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be used .*good copy"):
        make("0002" if adopted else "0001", [state])


def test_a_segment_of_another_run_is_refused(make, tmp_path):
    states = []
    for writer in "vw":
        shard = make(root=tmp_path / writer, config=ReplayConfig(4, 4, 60))
        fill(shard, 0, 10, writer=writer)
        states.append(seal(shard))
    name = states[0]["segments"][0]["name"]
    (tmp_path / "w" / name).write_bytes((tmp_path / "v" / name).read_bytes())
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        make("0002", [states[1]], root=tmp_path / "w")


def test_a_segment_that_is_left_out_is_missed(make):
    shard = make(config=ROOMY)
    for seq in range(12):
        fill(shard, seq, seq + 1)
        if seq % 3 == 2:
            state = seal(shard)
    for lost in (1, -1):
        segments = state["segments"][:]
        del segments[lost]
        with pytest.raises(CheckpointError, match=r"before it is missing|end at block"):
            make("0002", [state | {"segments": segments}], config=ROOMY)


@pytest.mark.parametrize("name", ["../../etc/passwd", "0001/shard-0/../x.seg", "/0001/shard-0/1"])
def test_names_that_lead_elsewhere_are_refused(make, name):
    shard = make()
    fill(shard, 0, 10)
    state = seal(shard)
    state["segments"][0]["name"] = name
    with pytest.raises(CheckpointError, match=r"0\.segments\.0\.name is"):
        make("0002", [state])
    with pytest.raises(ValueError, match="letters, digits"):
        make("../0002")


CRASH = """
import os, sys
sys.path[:0] = {path!r}
from test_replay import make_chunk
from worldflux_dist.replay import ReplayConfig, ReplayShard
from worldflux_dist.storage import Disk

class PowerCut(Disk):
    writes = 0
    def write(self, file, data):
        self.writes += 1
        super().write(file, data)
        self.cut("write")
    def sync(self, descriptor):
        super().sync(descriptor)
        self.cut("sync")
    def rename(self, temporary, path):
        super().rename(temporary, path)
        self.cut("rename")
    def sync_folder(self, folder):
        super().sync_folder(folder)
        self.cut("folder")
    def cut(self, point):
        if (point, self.writes) == ({point!r}, {writes}):
            os._exit(9)

config = ReplayConfig(4, 4, 10_000, flush_every=60, segment_bytes=1000)
shard = ReplayShard(config, 5, {root!r}, "0001", 0, 1, disk=PowerCut())
for seq in range(40):
    shard.add(make_chunk((0, 1), seq * 7, 7, seq))
    if seq % 3 == 2:
        shard.flush().result(10)
        print(seq, flush=True)
        if seq % 9 == 8:
            shard.seal().result(10)
            shard.retain(())
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("writes", [2, 7, 9, 11])
@pytest.mark.parametrize("point", ["write", "sync", "rename", "folder"])
def test_a_power_cut_loses_nothing_durable(make, tmp_path, point, writes):
    """Among the writes are the first index, growing segments, closed ones and later indices."""
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = CRASH.format(path=path, point=point, writes=writes, root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    durable = max(map(int, done.stdout.split()), default=-1)
    shard = make(config=ROOMY)
    found = rows(shard)
    assert max(found.values(), default=1) == 1
    known = len(found) // 14
    assert known > durable
    assert found == Counter((stream, time) for stream in (0, 1) for time in range(7 * known))
    assert not list(tmp_path.rglob("*.tmp"))
    fill(shard, 0, 41)
    assert rows(shard) == Counter((s, t) for s in (0, 1) for t in range(7 * 41))
    assert_windows_hold_together(shard.buffer.sample(50))


def test_a_restore_that_was_cut_short_is_begun_again(make, tmp_path):
    shard = make(config=ROOMY)
    fill(shard, 0, 20)
    state = seal(shard)
    halves = [make("0002", [state], i, 2, ROOMY) for i in range(2)]
    index = tmp_path / "0002/shard-1/index.json"
    index.write_text(json.dumps({"owner": "nobody"}))
    again = make("0002", [state], 1, 2, ROOMY)
    assert rows(again, halves[0]) == rows(shard)
