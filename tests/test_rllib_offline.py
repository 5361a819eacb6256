"""Episodes that RLlib recorded, as steps: the time convention, actions, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import msgpack
import msgpack_numpy
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner
from rllib_runs import check_ratio, small
from space_envs import SPACE_ENVS

from worldflux_dist.data import Chunk
from worldflux_dist.rllib.episodes import read_episodes, to_chunk
from worldflux_dist.spaces import Spaces

ACTION = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32))
OBS = spaces.Box(-9, 9, (2,), np.float32)
BOTH = Spaces(OBS, ACTION)
EARLIER = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)


ACTIONS = np.array([[-1, 0], [3, 10], [1, 7.5]], np.float32)
REWARDS = np.array([0.5, 1.0, -2.0])


def episode(
    obs: Any = EARLIER, actions: Any = ACTIONS, rewards: Any = REWARDS, **end: bool
) -> SingleAgentEpisode:
    return SingleAgentEpisode(
        observation_space=OBS,
        action_space=ACTION,
        observations=list(obs),
        actions=list(actions),
        rewards=list(rewards),
        len_lookback_buffer=0,
        **end,
    )


def write(path: Path, episodes: list[SingleAgentEpisode]) -> None:
    """As RLlib's recorder does it."""
    items = [msgpack.packb(e.get_state(), default=msgpack_numpy.encode) for e in episodes]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"item": items}), path)


def read(path: Path, both: Spaces = BOTH) -> list[Chunk]:
    found = enumerate(read_episodes([str(path)]))
    return [to_chunk(e, both, 7, number, name=name) for number, (name, e) in found]


# -------------------------------------------------------------------------------- time convention


def test_an_episode_array_by_array(tmp_path: Path) -> None:
    ends = [{"terminated": True}, {"truncated": True}, {}]
    write(tmp_path / "a" / "b.parquet", [episode(**end) for end in ends])
    chunks = read(tmp_path)
    for number, chunk in enumerate(chunks):
        np.testing.assert_array_equal(chunk.obs["obs"], EARLIER[None])
        np.testing.assert_array_equal(chunk.action, [[[0, 0], [-1, -1], [1, 1], [0, 0.5]]])
        np.testing.assert_array_equal(chunk.reward, [[0, 0.5, 1, -2]])
        np.testing.assert_array_equal(chunk.is_first, [[1, 0, 0, 0]])
        np.testing.assert_array_equal(chunk.is_last, [[0, 0, 0, 1]])
        np.testing.assert_array_equal(chunk.is_terminal, [[0, 0, 0, number == 0]])
        assert chunk.obs["obs"].dtype == chunk.action.dtype == chunk.reward.dtype == np.float32
        assert chunk.is_first.dtype == chunk.is_last.dtype == chunk.is_terminal.dtype == bool
        assert chunk.streams.tolist() == [7] and chunk.version == 0
    assert len({chunk.key for chunk in chunks}) == 3


def test_what_was_stacked_already_is_read_the_same() -> None:
    one, other = (
        to_chunk(e, BOTH, 0, 0)
        for e in (episode(terminated=True), episode(terminated=True).to_numpy())
    )
    for name, value in one.columns().items():
        np.testing.assert_array_equal(value, other.columns()[name])


def test_a_part_begins_anew() -> None:
    """Its first row is that of a reset, with the observation that it begins with."""
    first = episode()
    rest = first.cut(len_lookback_buffer=2)
    rest.add_env_step(np.array([4, 4], np.float32), np.array([3, 0], np.float32), 9.0)
    chunk = to_chunk(rest, BOTH, 0, 0)
    np.testing.assert_array_equal(chunk.obs["obs"], [[[7, 8], [4, 4]]])
    np.testing.assert_array_equal(chunk.action, [[[0, 0], [1, -1]]])
    np.testing.assert_array_equal(chunk.reward, [[0, 9]])
    assert chunk.is_first.tolist() == [[True, False]] and chunk.is_last.tolist() == [[False, True]]


@pytest.mark.parametrize("name", sorted(SPACE_ENVS))
def test_every_space_comes_out_of_a_file(name: str, tmp_path: Path) -> None:
    """What was recorded of an environment is what its steps would have been."""
    env = SPACE_ENVS[name]()
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    recorded = SingleAgentEpisode(
        observation_space=env.observation_space, action_space=env.action_space
    )
    recorded.add_env_reset(obs)
    seen, acted, done = [obs], [], False
    while not done:
        acted.append(env.action_space.sample())
        obs, reward, terminated, truncated, _ = env.step(acted[-1])
        recorded.add_env_step(obs, acted[-1], reward, terminated=terminated, truncated=truncated)
        seen.append(obs)
        done = terminated or truncated
    write(tmp_path / "x.parquet", [recorded])
    both = Spaces(env.observation_space, env.action_space)
    (chunk,) = read(tmp_path / "x.parquet", both)
    for key, value in both.encode_obs(stacked(env.observation_space, seen)).items():
        np.testing.assert_array_equal(chunk.obs[key][0], value)
    for ours, theirs in zip(
        iterate(batch_space(env.action_space, len(acted)), both.decode_action(chunk.action[0, 1:])),
        acted,
        strict=True,
    ):
        assert near(ours, theirs)


# ------------------------------------------------------------------------------------------ actions


def stacked(space: gymnasium.Space, values: list[Any]) -> Any:
    return concatenate(space, values, create_empty_array(space, len(values)))


def near(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(near(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return all(map(near, one, other))
    return np.allclose(one, other, rtol=1e-5, atol=1e-5)


ACTION_SPACES = [kind.action_space for kind in SPACE_ENVS.values()] + [
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[0, 1], [-3, 2]])),
    spaces.MultiBinary([2, 2]),
    spaces.Tuple((spaces.Discrete(3), spaces.Box(-2, 2, (2, 2), np.float64))),
    spaces.Dict(b=spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(2))), a=ACTION),
    spaces.Box(-3e38, 3e38, (2,), np.float32),
    spaces.Box(np.array([1, -1], np.float32), np.array([1, 1], np.float32)),
    spaces.Box(-5, 9, (3,), np.int64),
    spaces.Box(0, 255, (2,), np.uint8),
]


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_encoding_actions_undoes_decoding(space: gymnasium.Space) -> None:
    space.seed(0)
    both = Spaces(OBS, space)
    samples = [space.sample() for _ in range(64)]
    flat = both.encode_action(stacked(space, samples))
    assert flat.shape == (64, both.action_dim) and flat.dtype == np.float32
    assert (np.abs(flat) <= 1).all()
    again = iterate(batch_space(space, 64), both.decode_action(flat))
    scale = 3e38 if "e+38" in str(space) else 1.0
    if scale > 1:
        assert np.allclose(np.stack(list(again)) / scale, np.stack(samples) / scale, atol=1e-6)
    else:
        assert all(map(near, again, samples))
    found = both.encode_action(both.decode_action(flat))
    np.testing.assert_allclose(found, flat, atol=1e-5)


def test_normalized_actions_are_in_unit_range_already() -> None:
    """RLlib records what the module gave, which goes to the space's bounds later, and clipped."""
    both = Spaces(OBS, spaces.Dict(box=ACTION, kind=spaces.Discrete(2)))
    raw = {"box": np.array([[0.5, -3], [0, 1]]), "kind": np.array([1, 0])}
    flat = both.encode_action(raw, normalized=True)
    np.testing.assert_array_equal(flat, [[0.5, -1, 0, 1], [0, 1, 1, 0]])
    np.testing.assert_array_equal(both.decode_action(flat)["box"], [[2, 0], [1, 10]])


# ------------------------------------------------------------------------------- what does not fit


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.parquet"):
        with pytest.raises(ValueError, match=f"no Parquet files in {path}: record some with"):
            read(path)


def test_other_columns_are_one_sentence(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"obs": [1], "actions": [2]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet has the columns obs, actions and not .*output_write_episodes="
    ):
        read(tmp_path)


def bad(values: np.ndarray, number: float) -> np.ndarray:
    """A copy whose last number is another one."""
    values = values.astype(np.float64)
    values.flat[-1] = number
    return values


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("stacked", [False, True])
def test_numbers_that_are_not_finite_are_named(
    number: float, stacked: bool, tmp_path: Path
) -> None:
    """By file and episode; 1e300 is infinite in float32, as which replay holds it."""
    for part, given in {
        "observations": {"obs": bad(EARLIER, number)},
        "observations ": {"obs": [{"a": (row,)} for row in bad(EARLIER, number)]},
        "actions": {"actions": bad(ACTIONS, number)},
        "rewards": {"rewards": bad(REWARDS, number)},
    }.items():
        wrong = episode(**given)
        # An episode that goes on is written as lists, one that has ended often as arrays.
        write(tmp_path / "a.parquet", [episode(), wrong.to_numpy() if stacked else wrong])
        with pytest.raises(ValueError, match=rf"episode 1 of {tmp_path}/a.parquet has") as caught:
            read(tmp_path)
        assert f"has {part.strip()} that are not finite" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, [episode()])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path} cannot be read .*: record it again, or leave"):
        read(tmp_path)


@pytest.mark.parametrize("item", [b"", b"\xc1", b"\x80", msgpack.packb({"id_": 3}), None, "a"])
def test_bytes_that_are_no_episode_are_named(item: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"item": [item]}), path)
    with pytest.raises(ValueError, match=f"episode 0 of {path} cannot be read .*: record it again"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("obs", "action", "words"),
    [
        (spaces.Box(-9, 9, (3,)), ACTION, r"the observation has shape \(2,\), not \(3,\)"),
        (spaces.Dict(a=OBS), ACTION, "does not fit this environment"),
        (spaces.Discrete(3), ACTION, "is not in Discrete"),
        (OBS, spaces.Box(-1, 1, (3,)), r"the action .* is not in Box\(-1"),
        (OBS, spaces.MultiDiscrete([2, 2]), r"an action is not in MultiDiscrete"),
        (OBS, spaces.Dict(a=ACTION), "does not fit this environment"),
    ],
)
def test_another_environments_episode_is_one_sentence(
    obs: gymnasium.Space, action: gymnasium.Space, words: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet", [episode()])
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, Spaces(obs, action))
    assert f"episode 0 of {tmp_path}/a.parquet does not fit this environ" in str(caught.value)
    assert "give the path of episodes that were recorded in it" in str(caught.value)


@pytest.mark.parametrize("given", [{"obs": [*EARLIER[:3], np.ones(3)]}, {"rewards": [[1, 2]] * 3}])
def test_rows_of_another_shape_are_one_sentence(given: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [episode(**given)])
    with pytest.raises(ValueError, match=f"episode 0 of {tmp_path}/a.parquet does not fit"):
        read(tmp_path)


# -------------------------------------------------------------------------------------- as a whole


@pytest.mark.ray
def test_training_begins_with_what_another_algorithm_recorded(built: Any, tmp_path: Path) -> None:
    config = PPOConfig().environment("Pendulum-v1", env_config={})
    config.env_runners(num_env_runners=0, batch_mode="complete_episodes")
    config.offline_data(output=str(tmp_path), output_write_episodes=True)
    recorder = OfflineSingleAgentEnvRunner(config=config)
    recorded = recorder.sample(num_episodes=2)
    recorder.stop()
    steps = sum(len(e) + 1 for e in recorded)
    assert any(np.abs(e.get_actions()).max() > 1 for e in recorded)  # drawn from a Gaussian

    ours = small(prefill=200).environment("Pendulum-v1").offline_data(input_=[str(tmp_path)])
    ours.min_sample_timesteps_per_iteration = 60
    algo = built(ours)
    assert algo.limiter.prefill == 0 and algo.limiter.env_steps == 0
    stored = [ray.get(shard.report.remote()).num_steps for shard in algo.replay.shards]
    assert sum(stored) == steps and min(stored) > 0  # shared out
    batch, _ = ray.get(algo.replay.shards[0].sample.remote(64))[1]
    cos, sin, speed = np.moveaxis(batch.obs["obs"][:, :-1], -1, 0)
    torque = 2 * batch.action[:, 1:, 0]  # RLlib recorded what its module gave, not the torque
    reward = -(np.arctan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    inside = ~batch.is_first[:, 1:]
    np.testing.assert_allclose(batch.reward[:, 1:][inside], reward[inside], atol=1e-4)
    result = algo.train()
    check_ratio(result)  # of the steps collected here
    assert result["replay"]["num_steps"] == steps + result["replay"]["env_steps"]
    assert np.isfinite(result["learners"]["default_policy"]["loss"])
