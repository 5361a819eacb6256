"""The shared data: columns, the time convention's assertions, and every conversion of Spaces."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces as gym
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from hypothesis import given
from hypothesis import strategies as st

from worldflux_dist.data import Batch, Chunk, Step, new_incarnation
from worldflux_dist.spaces import Spaces

CONTINUOUS = gym.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64)
NESTED = gym.Dict(
    b=gym.Tuple((gym.MultiDiscrete([2, 3]), CONTINUOUS)),
    a=gym.Discrete(4, start=-1),
)


def encode(space: gym.Space, *samples: Any) -> dict[str, np.ndarray]:
    """Samples of a space, batched as a vector environment batches them, and encoded."""
    raw = concatenate(space, samples, create_empty_array(space, len(samples)))
    return Spaces(space, gym.Discrete(2)).encode_obs(raw)


def chunk(**changes: Any) -> Chunk:
    """One environment, five rows: an episode of four steps that terminates, then a reset."""
    columns: dict[str, Any] = {
        "obs/obs": np.arange(5, dtype=np.float32)[None, :, None],
        "action": np.array([0, 1, 1, 1, 0], np.float32)[None, :, None],
        "reward": np.array([[0, 1, 2, 3, 0]], np.float32),
        "is_first": np.array([[1, 0, 0, 0, 1]], bool),
        "is_last": np.array([[0, 0, 0, 1, 0]], bool),
        "is_terminal": np.array([[0, 0, 0, 1, 0]], bool),
    }
    streams, key = np.array([7]), ("writer", "life", 3)
    return Chunk.from_columns(columns | changes, streams=streams, version=9, key=key)


# --------------------------------------------------------------------------------------- steps


def test_columns_round_trip_and_map_keeps_the_rest() -> None:
    one = chunk()
    assert list(one.columns()) == [
        *("obs/obs", "action", "reward", "is_first", "is_last", "is_terminal")
    ]
    back = Chunk.from_columns(one.columns(), streams=one.streams, version=9, key=one.key)
    assert all((back.columns()[k] == v).all() for k, v in one.columns().items())
    doubled = one.map(lambda value: np.concatenate([value, value]))
    assert isinstance(doubled, Chunk)
    assert doubled.reward.shape == (2, 5)
    assert doubled.version == 9
    assert doubled.key == one.key
    assert doubled.streams is one.streams
    step = Step.from_columns({k: v[:, 0] for k, v in one.columns().items()})
    assert type(step.map(np.copy)) is Step
    assert type(Batch.from_columns(one.columns())) is Batch


def test_sizes() -> None:
    assert chunk().num_steps == 5
    assert chunk().nbytes == 5 * (4 + 4 + 4 + 3)


def test_rows_of_a_chunk() -> None:
    both = chunk().map(lambda value: np.concatenate([value, value + value]))
    both.streams = np.array([7, 8])
    part = both.rows(np.array([1]))
    assert part.streams.tolist() == [8]
    assert part.reward.tolist() == [[0, 2, 4, 6, 0]]
    assert part.version == 9
    assert both.streams.tolist() == [7, 8]


def test_check_passes_a_good_chunk() -> None:
    chunk().check()


@pytest.mark.parametrize(
    ("column", "t", "value", "words"),
    [
        ("is_last", 3, False, "is_terminal without is_last"),
        ("action", 4, 1, "action that goes into a reset is zero"),
        ("reward", 0, 1, "a reset has no reward"),
        ("is_first", 4, False, "is_first follows is_last"),
    ],
)
def test_check_refuses(column: str, t: int, value: Any, words: str) -> None:
    broken = chunk()
    broken.columns()[column][0, t] = value
    with pytest.raises(AssertionError, match=words):
        broken.check()


def test_a_new_life_has_a_new_name() -> None:
    assert len({new_incarnation() for _ in range(100)}) == 100


# -------------------------------------------------------------------------------- observations


def test_vectors_and_discretes() -> None:
    box = gym.Box(-9, 9, (2, 2), np.float64)
    out = encode(box, np.array([[1, 2], [3, 4.0]]), np.zeros((2, 2)))["obs"]
    assert out.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert out.dtype == np.float32
    assert encode(gym.Discrete(3, start=5), 7, 5)["obs"].tolist() == [[0, 0, 1], [1, 0, 0]]
    multi = gym.MultiDiscrete([2, 3], start=[0, 1])
    assert encode(multi, np.array([1, 3]))["obs"].tolist() == [[0, 1, 0, 0, 1]]
    square = gym.MultiDiscrete(np.array([[2, 2], [2, 3]]))
    assert encode(square, np.array([[1, 0], [1, 2]]))["obs"].tolist() == [
        [0, 1, 1, 0, 0, 1, 0, 0, 1]
    ]
    assert encode(gym.MultiBinary(3), np.array([1, 0, 1], np.int8))["obs"].tolist() == [[1, 0, 1]]
    scalar = gym.Box(-1, 1, (), np.float32)
    assert encode(scalar, np.float32(0.5))["obs"].tolist() == [[0.5]]


@pytest.mark.parametrize("kind", ["H W", "H W 1", "H W 3", "3 H W", "1 H W"])
@pytest.mark.parametrize(("high", "dtype"), [(255, np.uint8), (255, np.float32), (1, np.float32)])
def test_images_of_every_layout(kind: str, high: float, dtype: Any) -> None:
    sizes = [{"H": 12, "W": 10}.get(word) or int(word) for word in kind.split()]
    space = gym.Box(0, high, tuple(sizes), dtype)
    spec = Spaces(space, gym.Discrete(2)).obs["obs"]
    channels = 3 if "3" in kind else 1
    assert spec.kind == "image"
    assert spec.shape == (12, 10, channels)
    assert spec.dtype == np.uint8
    truth = np.random.default_rng(0).integers(0, 256, (2, 12, 10, channels)).astype(np.uint8)
    raw = truth.transpose(0, 3, 1, 2) if kind.endswith("H W") else truth
    raw = raw.reshape(2, *sizes)
    raw = (raw * (high / 255)).astype(dtype)
    out = encode(space, *raw)["obs"]
    assert out.dtype == np.uint8
    assert (out == truth).all()


@pytest.mark.parametrize(
    "space",
    [
        gym.Box(-1, 1, (12, 12, 3), np.float32),
        gym.Box(0, 7, (12, 12), np.uint8),
        gym.Box(0, 1, (12, 12), np.uint8),
        gym.Box(0, 255, (4, 4, 3), np.uint8),
        gym.Box(0, 255, (128,), np.uint8),
    ],
)
def test_what_only_looks_like_an_image_is_a_vector(space: gym.Box) -> None:
    spec = Spaces(space, gym.Discrete(2)).obs["obs"]
    assert spec.kind == "vector"
    assert spec.shape == (np.prod(space.shape),)
    assert spec.dtype == np.float32


def test_nested_observations_are_named_by_their_path() -> None:
    sample = {"a": 2, "b": (np.array([1, 0]), np.array([0.5, 7.0]))}
    out = encode(NESTED, sample)
    assert list(out) == ["a", "b/0", "b/1"]
    assert out["a"].tolist() == [[0, 0, 0, 1]]
    assert out["b/0"].tolist() == [[0, 1, 1, 0, 0]]
    assert out["b/1"].tolist() == [[0.5, 7]]


@pytest.mark.parametrize(
    ("observation", "words"),
    [
        (gym.Text(4), "not supported: use Box"),
        (gym.Dict(x=gym.Sequence(gym.Discrete(2))), "not supported: use Box"),
        (gym.Box(0, 255, (64, 64, 4), np.uint8), "4 channels"),
    ],
)
def test_unsupported_observations(observation: gym.Space, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spaces(observation, gym.Discrete(2))


# ------------------------------------------------------------------------------------- actions


def spaces_for(action: gym.Space) -> Spaces:
    return Spaces(gym.Box(-1, 1, (2,)), action)


def test_decode_actions_by_hand() -> None:
    one_hot = np.array([[0, 1, 0], [0, 0, 1]], np.float32)
    assert spaces_for(gym.Discrete(3, start=4)).decode_action(one_hot).tolist() == [5, 6]
    multi = spaces_for(gym.MultiDiscrete([2, 3], start=[0, 10]))
    assert multi.action_dim == 5
    assert multi.decode_action(np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])).tolist() == [
        [1, 10],
        [0, 12],
    ]
    box = spaces_for(CONTINUOUS)
    out = box.decode_action(np.array([[-1, -1], [0, 0.5], [1, 3]], np.float32))
    assert out.tolist() == [[-2, 0], [0, 7.5], [2, 10]]
    assert out.dtype == np.float64


def test_decode_nested_actions() -> None:
    both = spaces_for(NESTED)
    assert [(part.kind, part.size) for part in both.action_parts] == [
        *(("discrete", 4), ("discrete", 2), ("discrete", 3), ("continuous", 2))
    ]
    flat = np.array([[0, 0, 0, 1, 1, 0, 0, 1, 0, -1, 1]], np.float32)
    out = both.decode_action(flat)
    assert out["a"].tolist() == [2]
    assert out["b"][0].tolist() == [[0, 1]]
    assert out["b"][1].tolist() == [[-2, 10]]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (gym.Box(-np.inf, np.inf, (2,)), "TransformAction"),
        (gym.Box(np.array([0, -1]), np.array([np.inf, 1])), "no finite bounds"),
        (gym.Box(-np.inf, np.inf, (2,), np.int64), "no finite bounds"),
        (gym.Text(4), "not supported: use Discrete"),
    ],
)
def test_unsupported_actions(action: gym.Space, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spaces_for(action)


def leaf_spaces() -> st.SearchStrategy[gym.Space]:
    sizes = st.integers(1, 4)
    bounds = st.tuples(st.integers(-9, 0), st.integers(1, 9))
    return st.one_of(
        st.builds(lambda n, s: gym.Discrete(n, start=s), sizes, st.integers(-3, 3)),
        st.builds(
            lambda nvec, kind: gym.MultiDiscrete(nvec, dtype=kind),
            st.lists(sizes, min_size=1, max_size=3),
            st.sampled_from([np.int64, np.uint8]),
        ),
        st.builds(gym.MultiBinary, st.lists(sizes, min_size=1, max_size=2)),
        st.builds(
            lambda b, shape, kind: gym.Box(b[0], b[1], tuple(shape), kind),
            bounds,
            st.lists(sizes, max_size=2),
            st.sampled_from([np.float32, np.float64, np.int32]),
        ),
    )


def any_space() -> st.SearchStrategy[gym.Space]:
    return st.recursive(
        leaf_spaces(),
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(gym.Dict),
            st.lists(inner, min_size=1, max_size=3).map(gym.Tuple),
        ),
        max_leaves=4,
    )


@given(any_space(), st.integers(0, 9))
def test_random_actions_of_any_space_are_the_envs_own(space: gym.Space, seed: int) -> None:
    """Every decoded action lies in the space, and the vector env can deal them out."""
    flat = spaces_for(space).random_action(np.random.default_rng(seed), 3)
    assert flat.dtype == np.float32
    assert len(flat) == 3
    dealt = list(iterate(batch_space(space, 3), spaces_for(space).decode_action(flat)))
    assert len(dealt) == 3
    assert all(space.contains(action) for action in dealt)


@given(any_space(), st.integers(0, 9))
def test_any_space_encodes_to_its_own_specs(space: gym.Space, seed: int) -> None:
    space = copy.deepcopy(space)
    space.seed(seed)
    out = encode(space, space.sample(), space.sample())
    specs = Spaces(space, gym.Discrete(2)).obs
    assert list(out) == list(specs)
    for key, spec in specs.items():
        assert out[key].shape == (2, *spec.shape)
        assert out[key].dtype == spec.dtype


# ---------------------------------------------------------------------------------- saved form


@given(any_space(), any_space())
def test_json_round_trip(observation: gym.Space, action: gym.Space) -> None:
    one = Spaces(observation, action)
    back = Spaces.from_json(json.loads(json.dumps(one.to_json())))
    assert back.observation == observation
    assert back.action == action
    assert back.obs == one.obs
    assert back.action_parts == one.action_parts


@pytest.mark.parametrize(
    "space",
    [
        gym.Box(0, 255, (64, 64, 3), np.uint8),
        gym.Box(-np.inf, np.inf, (3,), np.float64),
        gym.Box(np.array([-1.0, -np.inf]), np.array([0.1, 5.0])),
        gym.Box(-1, 1, (), np.float32),
        gym.MultiBinary([2, 3]),
        gym.MultiBinary(4),
        gym.MultiDiscrete(np.array([[2, 2], [2, 3]])),
        CONTINUOUS,
        NESTED,
    ],
)
def test_json_round_trip_of_the_odd_ones(space: gym.Space) -> None:
    back = Spaces.from_json(json.loads(json.dumps(Spaces(space, gym.Discrete(2)).to_json())))
    assert back.observation == space
    assert back.observation.dtype == space.dtype


def test_pickle_round_trip() -> None:
    back = pickle.loads(pickle.dumps(Spaces(NESTED, NESTED)))
    assert back.obs == Spaces(NESTED, NESTED).obs
    assert back.action == NESTED
    out = back.encode_obs({"a": np.array([0]), "b": (np.array([[0, 0]]), np.zeros((1, 2)))})
    assert out["a"].tolist() == [[0, 1, 0, 0]]
