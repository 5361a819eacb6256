"""The replay buffer: what goes in comes out in order, uniformly, and once online.

Every step carries its stream and its time in the observation, so that a window proves itself.
"""

import base64
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux_dist.data import Chunk
from worldflux_dist.replay import ReplayBuffer, ReplayConfig
from worldflux_dist.replay.segment import pack_numbers, unpack_numbers
from worldflux_dist.storage import write_json


def make_chunk(streams, start, num, seq=0, writer="w", life="a", episode=10, image=False):
    """Steps `start` .. `start + num` of each stream; an episode begins every `episode` steps."""
    n, time = len(streams), np.arange(start, start + num)
    first = np.tile(time % episode == 0, (n, 1))
    last = np.tile(time % episode == episode - 1, (n, 1))
    label = np.stack(np.broadcast_arrays(np.array(streams)[:, None], time), -1)  # (N, T, 2)
    obs = {"obs": label.astype(np.float32)}
    if image:
        obs["image"] = np.broadcast_to(
            (label.sum(-1) % 256)[..., None, None, None], (n, num, 24, 24, 3)
        ).astype(np.uint8)
    return Chunk(
        obs=obs,
        action=np.zeros((n, num, 3), np.float32),
        reward=np.tile(time, (n, 1)).astype(np.float32),
        is_first=first,
        is_last=last,
        is_terminal=np.zeros_like(last),
        streams=np.array(streams),
        key=(writer, life, seq),
    )


def filled(config, num_chunks=8, streams=(0, 1), num=7, seed=0, image=False):
    buffer = ReplayBuffer(config, seed)
    for seq in range(num_chunks):
        buffer.add(make_chunk(streams, seq * num, num, seq, image=image))
    return buffer


def stats(buffer):
    """Sizes and counters."""
    return {
        "num_steps": buffer.num_steps,
        "num_windows": buffer._ring.num_windows,
        "nbytes": buffer.nbytes,
        "streams": len(buffer._tails),
        "online": len(buffer._online),
        "online_dropped": buffer.online_dropped,
        "duplicates": buffer.duplicates,
    }


def assert_windows_hold_together(batch):
    stream, time = batch.obs["obs"][..., 0], batch.obs["obs"][..., 1]
    assert (stream == stream[:, :1]).all()
    assert (np.diff(time, axis=1) == 1).all()
    np.testing.assert_array_equal(batch.reward, time)
    np.testing.assert_array_equal(batch.is_first, time % 10 == 0)
    np.testing.assert_array_equal(batch.is_last, time % 10 == 9)
    if "image" in batch.obs:
        expected = ((stream + time) % 256)[..., None, None, None]
        np.testing.assert_array_equal(
            batch.obs["image"], np.broadcast_to(expected, batch.obs["image"].shape)
        )


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 9),
    blocks=st.integers(8, 20),
    online=st.booleans(),
    chunks=st.lists(
        st.tuples(st.integers(1, 25), st.lists(st.integers(0, 3), min_size=1, unique=True)),
        min_size=1,
        max_size=20,
    ),
)
def test_any_chunks_give_whole_windows_within_capacity(length, blocks, online, chunks):
    buffer = ReplayBuffer(ReplayConfig(5, length, blocks * length, online=online))
    time, seqs = Counter(), Counter()
    for num, streams in chunks:
        for stream in streams:
            chunk = make_chunk([stream], time[stream], num, seqs[stream], writer=str(stream))
            assert buffer.add(chunk) == num
            time[stream] += num
            seqs[stream] += 1
        assert buffer.num_steps <= blocks * length
        if buffer.ready:
            assert_windows_hold_together(buffer.sample())
    assert buffer.ready == (max(time.values()) >= length)
    if sum(time.values()) <= (blocks - 4) * length:  # nothing evicted
        assert buffer.num_steps == sum(time.values())
        windows = sum(max(0, count - length + 1) for count in time.values())
        assert stats(buffer)["num_windows"] == windows


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 9),
    blocks=st.integers(8, 20),
    storage=st.sampled_from(["raw", "lz4"]),
    num=st.integers(1, 12),
    events=st.lists(st.sampled_from(["", "", "", "lost", "fewer", "reset"]), max_size=30),
)
def test_streams_in_one_chunk_are_stored_as_if_each_came_alone(
    length, blocks, storage, num, events
):
    config = ReplayConfig(5, length, blocks * length, prioritized=1, storage=storage)
    one, each = ReplayBuffer(config), ReplayBuffer(config)
    for seq, event in enumerate(events):
        streams = (2, 0, 3) if event == "fewer" else (2, 0, 1, 3)
        chunk = make_chunk(streams, seq * num, num, seq, image=storage == "lz4")
        chunk.is_first[:, 0] |= event == "reset"
        if event != "lost":
            one.add(chunk)
            for row in range(len(streams)):
                each.add(replace(chunk.rows([row]), key=(f"w{streams[row]}", "a", seq)))
    for name in ("num_steps", "num_windows", "online", "online_dropped", "nbytes"):
        assert stats(one)[name] == stats(each)[name], name
    assert one.state() == each.state()
    tails = [[(*t[:3], *t[3][1:], t[4]) for t in b.numbering().tails] for b in (one, each)]
    assert tails[0] == tails[1]
    if one.ready:
        ours, theirs = one.sample(9).columns(), each.sample(9).columns()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_streams_in_step_share_a_tail():
    """By this many streams are stored in the time of one."""
    buffer = ReplayBuffer(ReplayConfig(2, 4, 12 * 4))

    def shared(*streams, seq):
        buffer.add(make_chunk(streams, seq * 3, 3, seq))
        return len({id(tail) for tail in buffer._tails.values()}) == 1

    assert all(shared(0, 1, 2, 3, 4, seq=seq) for seq in range(30))
    assert not shared(0, 1, 2, seq=30)  # 3 and 4 stay behind
    assert not shared(0, 1, 2, 3, 4, seq=31)
    assert not shared(0, 1, 2, 3, 4, seq=32)
    assert shared(0, 1, 2, 3, 4, seq=34)  # one was lost: all begin anew


def test_windows_are_drawn_uniformly_over_all_starts():
    config = ReplayConfig(batch_size=500, batch_length=4, capacity=48, online=False)
    buffer = ReplayBuffer(config, seed=1)
    for seq, num in enumerate([5, 9, 3, 8]):  # 25 steps of stream 0
        buffer.add(make_chunk([0], [0, 5, 14, 17][seq], num, seq))
    buffer.add(make_chunk([1], 0, 4, writer="x"))  # a single window
    buffer.add(make_chunk([2], 0, 3, writer="y"))  # none
    counts = Counter()
    for _ in range(40):
        batch = buffer.sample()
        counts.update(map(tuple, batch.obs["obs"][:, 0].astype(int).tolist()))
    expected = {(0, t) for t in range(22)} | {(1, 0)}
    assert counts.keys() == expected
    mean = 20_000 / len(expected)
    chi2 = sum((count - mean) ** 2 / mean for count in counts.values())
    assert chi2 < 48.3  # the 0.1 % quantile for 22 degrees of freedom


def test_eviction_keeps_the_newest_steps_and_uniformity():
    buffer = filled(ReplayConfig(400, 4, capacity=24, online=False), num_chunks=20, streams=(0,))
    assert buffer.num_steps == 24
    assert buffer.nbytes == 24 * buffer.bytes_per_step
    starts = Counter(buffer.sample().obs["obs"][:, 0, 1].astype(int).tolist())
    assert starts.keys() == set(range(116, 137))  # 140 steps came; the last 24 are left
    assert min(starts.values()) > 2


def test_capacity_in_bytes():
    per_step = filled(ReplayConfig(4, 4, 1000)).bytes_per_step
    assert per_step == 2 * 4 + 3 * 4 + 4 + 3
    buffer = filled(ReplayConfig(4, 4, 1000, capacity_bytes=per_step * 30), num_chunks=30)
    assert 20 <= buffer.num_steps <= 28
    assert buffer.nbytes <= per_step * 30
    with pytest.raises(ValueError, match="capacity_bytes 50 is too small"):
        filled(ReplayConfig(4, 4, 1000, capacity_bytes=50))


def test_online_queue_trains_each_fresh_segment_once_and_first():
    buffer = filled(ReplayConfig(3, 4, 1000), num_chunks=4, num=6)  # 24 steps of 2 streams
    seen = [tuple(row) for _ in range(4) for row in buffer.sample().obs["obs"][:, 0].astype(int)]
    assert sorted(seen) == [(s, t) for s in (0, 1) for t in range(0, 24, 4)]
    assert [t for s, t in seen if s == 0] == sorted(t for s, t in seen if s == 0)
    assert stats(buffer)["online"] == 0
    buffer.add(make_chunk([0, 1], 24, 4, 4))
    batch = buffer.sample(batch_size=20)
    np.testing.assert_array_equal(batch.obs["obs"][:2, 0], [[0, 24], [1, 24]])
    assert len({tuple(row) for row in batch.obs["obs"][2:, 0]}) > 5


def test_evicted_online_segments_are_dropped_and_counted():
    buffer = filled(ReplayConfig(8, 4, capacity=16), num_chunks=10, streams=(0,), num=4)
    assert buffer.online_dropped == 6
    assert stats(buffer)["online"] == 4
    assert buffer.sample().obs["obs"][:4, 0, 1].tolist() == [24, 28, 32, 36]


def test_no_online_queue_when_switched_off():
    buffer = filled(ReplayConfig(4, 4, 1000, online=False))
    assert stats(buffer)["online"] == 0
    assert buffer.ready


def test_a_chunk_counts_once():
    buffer = ReplayBuffer(ReplayConfig(2, 4, 100))
    assert [buffer.add(make_chunk([0], 0, 10, seq=0)) for _ in range(2)] == [10, 0]
    assert buffer.add(make_chunk([0], 20, 10, seq=2)) == 10  # overtakes seq 1
    assert buffer.add(make_chunk([0], 20, 10, seq=2)) == 0
    assert buffer.add(make_chunk([0], 10, 10, seq=1)) == 10
    assert buffer.add(make_chunk([0], 10, 10, seq=1)) == 0
    assert buffer.add(make_chunk([0], 0, 10, seq=0, life="b")) == 10  # a new life counts anew
    assert buffer.duplicates == 3
    assert buffer.num_steps == 40


def test_known_chunks_outlive_eviction_and_lost_ones_cost_no_memory():
    buffer = filled(ReplayConfig(2, 4, 16), num_chunks=50, streams=(0,))
    assert buffer.add(make_chunk([0], 0, 7, seq=0)) == 0
    for seq in range(51, 1051):  # 50 never arrives
        buffer.add(make_chunk([0], 0, 1, seq))
    assert buffer.marks.state() == [("w", "a", 1050, [])]


def test_windows_do_not_span_a_lost_chunk():
    buffer = ReplayBuffer(ReplayConfig(300, 4, 100, online=False))
    buffer.add(make_chunk([0], 0, 7, seq=0))
    buffer.add(make_chunk([0], 14, 7, seq=2))
    buffer.add(make_chunk([0], 21, 7, seq=3))
    batch = buffer.sample()
    assert_windows_hold_together(batch)
    assert set(batch.reward[:, 0]) == {*range(0, 4), *range(14, 25)}


def test_a_restarted_runner_truncates_the_open_episode():
    buffer = ReplayBuffer(ReplayConfig(300, 4, 100, online=False))
    buffer.add(make_chunk([0], 0, 8, seq=0))  # ends in mid-block and in mid-episode
    buffer.add(make_chunk([0], 20, 6, seq=0, life="b"))  # begins with a reset
    batch = buffer.sample()
    last, terminal = batch.is_last[batch.reward == 7], batch.is_terminal[batch.reward == 7]
    assert last.all()
    assert not terminal.any()
    assert set(batch.reward[:, 0]) == {*range(8), 20, 21, 22}
    assert batch.is_first[:, 1:][batch.is_last[:, :-1]].all()


def test_a_new_life_in_mid_episode_is_not_glued_to_the_old():
    buffer = ReplayBuffer(ReplayConfig(300, 4, 100, online=False))
    buffer.add(make_chunk([0], 0, 8, seq=0))
    buffer.add(make_chunk([0], 8, 8, seq=1, life="b"))
    assert set(buffer.sample().reward[:, 0]) == {*range(5), *range(8, 13)}


def test_images_and_reused_batches():
    buffer = filled(ReplayConfig(8, 16, 200), num_chunks=30, image=True)
    batch = buffer.sample()
    assert batch.obs["image"].shape == (8, 16, 24, 24, 3)
    assert batch.obs["image"].dtype == np.uint8
    assert batch.is_first.dtype == bool
    for _ in range(20):
        assert buffer.sample(out=batch) is batch
        assert_windows_hold_together(batch)


def test_the_seed_decides_the_samples():
    config = ReplayConfig(8, 4, 100, online=False)
    draws = [filled(config, seed=seed).sample().obs["obs"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_chunks_that_do_not_fit_are_refused():
    buffer = filled(ReplayConfig(2, 4, 40))
    before = stats(buffer)
    with pytest.raises(ValueError, match=r"obs/image is .* not None"):
        buffer.add(make_chunk((0, 1), 56, 7, 8, image=True))
    wide = make_chunk((0, 1), 56, 7, 8)
    wide.action = np.zeros((2, 7, 4), np.float32)
    with pytest.raises(ValueError, match=r"action is .*4.*, not .*3"):
        buffer.add(wide)
    ragged = make_chunk((0, 1), 56, 7, 8)
    ragged.reward = ragged.reward[:, :-1]
    with pytest.raises(ValueError, match="leading shape"):
        buffer.add(ragged)
    with pytest.raises(ValueError, match="too few for 7 streams"):
        buffer.add(make_chunk((2, 3, 4, 5, 6), 0, 7, 0, writer="x"))
    assert stats(buffer) == before
    assert buffer.add(make_chunk((0, 1), 56, 7, 8)) == 14  # a refused chunk is not a known one


def test_sampling_too_early_and_impossible_configs_say_so():
    buffer = ReplayBuffer(ReplayConfig(2, 8, 40))
    buffer.add(make_chunk([0], 0, 7))
    assert not buffer.ready
    with pytest.raises(RuntimeError, match="no 8 consecutive"):
        buffer.sample()
    with pytest.raises(ValueError, match="capacity 100 is too small"):
        ReplayConfig(capacity=100)
    with pytest.raises(ValueError, match="batch_size is 0: it must be at least 1"):
        ReplayConfig(batch_size=0)


@pytest.mark.slow
def test_a_buffer_takes_no_memory_before_it_fills_and_gives_it_back() -> None:
    """Also in a process whose allocator was told to keep what is freed."""
    code = (
        "import numpy as np, psutil; from worldflux_dist.nn import memory\n"
        "from worldflux_dist.replay.columns import zeros\n"
        "memory.keep_freed_memory(); rss = psutil.Process().memory_info; start = rss().rss\n"
        "for _ in range(3):\n"
        "    rows = zeros((2**30,), np.dtype(np.uint8)); assert rss().rss - start < 2**24\n"
        "    rows[: 2**27] = 1; assert rss().rss - start > 2**26; del rows\n"
        "assert rss().rss - start < 2**24"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_online_queue_of_the_largest_replay_fits_a_manifest(tmp_path):
    """More blocks than a manifest may have values, none of them trained on yet."""
    blocks = (
        np.arange(1_200_000).reshape(-1, 2)[:, ::-1].reshape(-1).tolist()
    )  # two streams in turn
    text = pack_numbers(blocks)
    write_json(tmp_path / "manifest.json", {"shards": [{"online": text}] * 10})
    assert unpack_numbers(text, len(blocks)) == blocks
    assert unpack_numbers(text, 7) == blocks[:7]  # no text makes more of them than there are blocks
    for wrong in ("AAAA", text[8:]):
        with pytest.raises(ValueError, match="cannot be unpacked"):
            unpack_numbers(wrong, 7)
    config = ReplayConfig(batch_length=4, capacity=16_000_000, prioritized=1)
    text = base64.b64encode(bytes(8 * 4_000_000)).decode()
    write_json(tmp_path / "manifest.json", {"weights": text})
    with pytest.raises(ValueError, match=r"replay.capacity must be at most 16000000"):
        replace(config, capacity=16_000_004)
