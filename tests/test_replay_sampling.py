"""Mixtures of uniform, recent and prioritized windows, and packed storage."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import assert_windows_hold_together, filled, make_chunk

from worldflux_dist.replay import ReplayConfig
from worldflux_dist.replay.sampling import RECENT_AGE, SumTree


def mixed(num_chunks=60, seed=0, size=2000, capacity=400, **shares):
    shares = {"uniform": 0, **shares}
    config = ReplayConfig(size, 4, capacity, online=False, **shares)
    return filled(config, num_chunks, (0,), 10, seed)


def test_recent_windows_are_young_and_never_missing():
    buffer = mixed(recent=1)
    age = (buffer.end - 1 - buffer.sample_with_ids()[1]) / (buffer.end - buffer.first)
    whole = RECENT_AGE - 1 / np.expm1(1 / RECENT_AGE)  # the mean of one cut off at the ring's size
    assert age.mean() == pytest.approx(whole, rel=0.1)
    assert age.max() > 0.4
    assert_windows_hold_together(buffer.sample())
    uniform = mixed(uniform=1)
    age = (uniform.end - 1 - uniform.sample_with_ids()[1]) / (uniform.end - uniform.first)
    assert age.mean() == pytest.approx(0.5, rel=0.1)


def test_a_block_is_drawn_in_proportion_to_its_priority():
    buffer = mixed(prioritized=1, capacity=40)
    ids = np.arange(buffer.first, buffer.end)
    values = np.arange(len(ids), dtype=float)
    buffer.prioritize(ids, -values)  # errors have a sign, priorities have not
    weights = (values + 1e-6) ** 0.6
    counts = Counter(
        int(block) for _ in range(10) for block in buffer.sample_with_ids()[1].tolist()
    )
    expected = 20_000 * weights / weights.sum()
    chi2 = sum(
        (counts[i] - mean) ** 2 / mean for i, mean in zip(ids, expected, strict=True) if mean > 5
    )
    assert chi2 < 30  # the 0.1 % quantile for 9 degrees of freedom is 27.9
    assert_windows_hold_together(buffer.sample())


def test_ids_name_the_blocks_of_the_windows_and_are_never_reused():
    buffer = mixed(prioritized=1, capacity=40)
    batch, ids = buffer.sample_with_ids()
    np.testing.assert_array_equal(batch.reward[:, 0] // 4, ids)  # one stream: block i begins at 4 i
    old = ids.min()
    buffer.prioritize(np.array([old]), np.array([1e9]))
    assert (buffer.sample_with_ids()[1] == old).mean() > 0.9
    buffer.add(make_chunk([0], 600, 40, 60))
    buffer.prioritize(np.array([old]), np.array([1e30]))  # evicted: ignored
    ids = buffer.sample_with_ids()[1]
    assert ids.min() >= buffer.first
    assert Counter(ids.tolist()).most_common(1)[0][1] < 600  # new ones share the largest so far
    for wrong in (np.array([np.nan]), np.array([1.0, 2.0])):
        with pytest.raises(ValueError, match="one for each id"):
            buffer.prioritize(ids[:1], wrong)


def test_new_blocks_get_the_largest_priority():
    buffer = mixed(prioritized=1, capacity=4000)
    ids = np.arange(buffer.first, buffer.end - 1)
    buffer.prioritize(ids, np.full(len(ids), 1e-9))
    buffer.prioritize(ids[:1], np.array([7.0]))
    buffer.add(make_chunk([0], 600, 8, 60))
    drawn = Counter(buffer.sample_with_ids()[1].tolist())
    assert drawn[0] == pytest.approx(drawn[151], rel=0.3)
    assert drawn[75] < drawn[0] / 100


def test_shares_are_kept_in_every_batch():
    buffer = mixed(uniform=2, recent=1, prioritized=1, capacity=4000)
    ids = np.arange(buffer.first, buffer.end)
    buffer.prioritize(ids, np.zeros(len(ids)))
    buffer.prioritize(ids[3:4], np.array([1e12]))
    for _ in range(5):
        _, drawn = buffer.sample_with_ids(16)
        assert (drawn[-4:] == 3).all()
        assert len(drawn) == 16
    assert Counter(len(buffer.sample(size).reward) for size in (1, 2, 3, 7)).total() == 4
    for shares in ({"uniform": 0.0}, {"recent": -1.0}, {"prioritized": float("inf")}):
        with pytest.raises(ValueError, match=r"uniform|recent|prioritized"):
            ReplayConfig(**shares)


@settings(deadline=None)
@given(data=st.data())
def test_the_sum_tree_draws_what_a_plain_list_would(data):
    num = data.draw(st.integers(1, 40))
    tree, plain = SumTree(num), np.zeros(num)
    for _ in range(data.draw(st.integers(1, 5))):
        places = st.lists(st.integers(0, num - 1), min_size=1, unique=True)
        indices = np.array(data.draw(places))
        weights = np.array([data.draw(st.floats(0, 1e9)) for _ in indices])
        tree.set(indices, weights)
        plain[indices] = weights
    np.testing.assert_array_equal(tree.weights, plain)
    if plain.any():
        drawn = tree.draw(np.random.default_rng(0), 200)
        assert (plain[drawn] > 0).all()


class Counting:
    """A random generator that counts how many numbers are drawn from it."""

    def __init__(self, rng):
        self.rng, self.drawn = rng, 0

    def __getattr__(self, name):
        def draw(*args, **kwargs):
            found = getattr(self.rng, name)(*args, **kwargs)
            self.drawn += np.size(found)
            return found

        return draw


@pytest.mark.parametrize("share", ["uniform", "recent", "prioritized"])
def test_a_sample_takes_no_more_draws_from_a_larger_replay(share):
    drawn = []
    for num_chunks in (20, 2000):
        buffer = mixed(num_chunks, capacity=num_chunks * 10, **{share: 1})
        buffer._sampler._rng = counting = Counting(buffer._rng)
        for _ in range(20):
            buffer.sample(16)
        drawn.append(counting.drawn)
    assert drawn[1] < 1.5 * drawn[0]


@pytest.mark.parametrize("shares", [{}, {"recent": 1, "prioritized": 1}])
def test_packed_storage_gives_the_same_samples_in_less_memory(shares):
    raw, packed = (
        filled(ReplayConfig(8, 16, 400, storage=storage, **shares), 0, image=True)
        for storage in ("raw", "lz4")
    )
    for seq in range(40):
        for buffer in (raw, packed):
            buffer.add(make_chunk((0, 1), seq * 7, 7, seq, image=True))
        if raw.ready:
            ours, theirs = raw.sample(), packed.sample()
            assert_windows_hold_together(theirs)
            for name, column in ours.columns().items():
                np.testing.assert_array_equal(column, theirs.columns()[name])
    assert raw.nbytes == raw.num_steps * raw.bytes_per_step
    blocks = packed._columns["obs/image"]._blocks
    held = sum(len(b) if isinstance(b, bytes) else b.nbytes for b in blocks if b is not None)
    assert packed._columns["obs/image"].nbytes == held
    assert packed.nbytes < raw.nbytes / 3
