"""Episodes as RLlib sees them: callbacks and evaluation, and training that goes on beside both."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import ray
import torch
from gymnasium import spaces
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from rllib_runs import agent_of, small

from worldflux_dist import runner

pytestmark = pytest.mark.ray

NUM_ENVS = 4
TINY = {"deter": 32, "hidden": 16, "groups": 4, "classes": 4, "units": 16, "depth": 2}


class Clock(gymnasium.Env):
    """Shows the episode's number, the time and the last action, which is the reward, too. Episodes
    have `length` steps, and every second one is truncated."""

    observation_space = spaces.Box(-1, 1000, (3,), np.float32)
    action_space = spaces.Discrete(8)

    def __init__(self, config: Any) -> None:
        self.length, self.episode = config["length"], -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self._look(-1), {"time": 0}

    def step(self, action: Any) -> Any:
        self.time += 1
        end, even = self.time == self.length, self.episode % 2 == 0
        info = {"time": self.time} | ({"high": action} if action > 3 else {})
        return self._look(action), float(action), end and even, end and not even, info

    def _look(self, action: int) -> np.ndarray:
        return np.array([self.episode, self.time, action], np.float32)


class Failing(Clock):
    """Raises once, at a time that the second chunk reaches."""

    def step(self, action: Any) -> Any:
        if self.episode == 2 and not self.mark.exists():
            self.mark.touch()
            raise OSError("the simulator is gone")
        return super().step(action)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mark = config["mark"]


def clock(length: int, **training: Any) -> Any:
    settings: dict[str, Any] = {"model_options": TINY | {"warmup": 2}, "num_replay_shards": 1}
    config = small(**settings | {"train_ratio": 2, "prefill": 64} | training)
    config.min_sample_timesteps_per_iteration = 0  # an iteration is one chunk of 4 x 16 steps
    return config.environment(Clock, env_config={"length": length})


# --------------------------------------------------------------------------------------- callbacks


SEEN: dict[str, list[Any]] = defaultdict(list)  # what callbacks saw


class Callbacks(RLlibCallback):
    """Checks every episode at every step, as a user's callback would look at it."""

    def on_algorithm_init(self, *, algorithm: Any, **kwargs: Any) -> None:
        assert algorithm.limiter.env_steps == 0 and algorithm.get_module() is not None
        SEEN["init"].append(algorithm)

    def on_environment_created(self, *, env: Any, env_context: Any, **kwargs: Any) -> None:
        assert env_context["length"] == 10 and env_context.worker_index == 0
        SEEN["environment"].append(env)

    def on_episode_created(self, *, episode: Any, env_index: int, **kwargs: Any) -> None:
        assert isinstance(episode, SingleAgentEpisode) and not episode.is_reset
        SEEN["created"].append((env_index, episode.id_))

    def on_episode_start(self, *, episode: Any, env_index: int, **kwargs: Any) -> None:
        assert episode.is_reset and len(episode) == 0
        assert list(episode.get_observations(-1)[1:]) == [0, -1]
        assert episode.get_infos(-1) == {"time": 0}
        SEEN["start"].append((env_index, episode.id_))

    def on_episode_step(
        self, *, episode: Any, env: Any, env_index: int, metrics_logger: Any, **kwargs: Any
    ) -> None:
        _, time, action = episode.get_observations(-1)
        assert len(episode) == time and episode.get_actions(-1) == action
        assert episode.get_rewards(-1) == action
        more = {"high": action} if action > 3 else {}
        assert episode.get_infos(-1) == {"time": time} | more
        assert Clock.action_space.contains(episode.get_actions(-1))
        inner = env.envs[env_index].unwrapped
        assert inner.episode == episode.get_observations(-1)[0] and inner.time == time
        SEEN["step"].append(episode.id_)
        metrics_logger.log_value("actions_mean", float(action), reduce="mean", window=1)

    def on_episode_end(
        self,
        *,
        episode: Any,
        env_runner: Any,
        rl_module: Any,
        env_index: int,
        metrics_logger: Any,
        **kwargs: Any,
    ) -> None:
        metrics_logger.log_value(("episode_stats", "time"), episode.get_observations(-1)[1])
        assert episode.is_done and len(episode) == 10
        number = episode.get_observations(0)[0]
        assert episode.is_terminated == (number % 2 == 0) != episode.is_truncated
        assert episode.get_return() == sum(obs[2] for obs in episode.get_observations()[1:])
        assert kwargs["prev_episode_chunks"] == []
        assert env_runner.module is rl_module
        SEEN["end"].append((env_index, episode.id_, episode.get_return()))

    def on_sample_end(self, *, samples: Any, **kwargs: Any) -> None:
        assert len(samples) == 1
        SEEN["sample"].append((samples[0].env_steps(), len(SEEN["end"])))

    def on_train_result(self, *, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        result["seen"] = len(SEEN["end"])


def test_callbacks_see_every_episode(built: Any) -> None:
    SEEN.clear()
    config = clock(10).callbacks(
        Callbacks, on_train_result=lambda *, result, **kwargs: result.update(given=True)
    )
    algo = built(config)
    algo.train()
    algo.train()
    seen, samples = SEEN, len(SEEN["sample"])
    last = algo.train()
    assert seen["init"] == [algo] and seen["environment"][-1] is algo.env_runner.env
    steps = algo.limiter.env_steps
    ended = steps // NUM_ENVS // 11 * NUM_ENVS  # a reset and 10 steps each
    assert seen["created"] == seen["start"] and len(seen["start"]) == ended + NUM_ENVS
    assert len({episode for _, episode in seen["start"]}) == ended + NUM_ENVS
    assert len(seen["step"]) == steps - ended - NUM_ENVS
    assert [(lane, episode) for lane, episode, _ in seen["end"]] == seen["start"][:ended]
    assert sum(env_steps for env_steps, _ in seen["sample"]) == len(seen["step"])
    # RLlib shows what ended in an iteration: the mean over the means of its samples.
    ends = [num for _, num in seen["sample"][samples - 1 :]]
    returns = [total for *_, total in seen["end"]]
    means = [np.mean(returns[a:b]) for a, b in itertools.pairwise(ends) if a < b]
    runners, returns = last["env_runners"], returns[ends[0] :]
    assert runners["episode_return_mean"] == pytest.approx(np.mean(means))
    assert runners["episode_return_min"] == min(returns)
    assert runners["episode_return_max"] == max(returns)
    assert runners["episode_len_mean"] == 10
    assert runners["num_episodes_lifetime"] == ended
    assert last["num_env_steps_sampled_lifetime"] == len(seen["step"])
    assert 0 <= runners["actions_mean"] <= 7 and runners["episode_stats"]["time"] == 10
    assert last["given"] and last["seen"] == ended


# -------------------------------------------------------------------------------------- evaluation


def check_windows(algo: Any) -> None:
    """In everything that replay draws, the steps of one episode follow each other without a gap."""
    looked = 0
    for _ in range(8):
        batch, _ = ray.get(algo.replay.shards[0].sample.remote(16))[1]
        episode, time, action = np.moveaxis(batch.obs["obs"], -1, 0)
        inside = ~batch.is_first[:, 1:]
        assert (episode[:, 1:] == episode[:, :-1])[inside].all()
        assert (time[:, 1:] == time[:, :-1] + 1)[inside].all()
        assert (batch.action.argmax(-1) == action)[~batch.is_first].all()
        assert (time[batch.is_first] == 0).all()
        looked += int(inside.sum())
    assert looked > 1000


def evaluated(config: Any) -> Any:
    """`config` with a callback that notes actions, in SEEN["evaluation"] or SEEN["training"]."""
    SEEN.clear()

    def note(*, episode: Any, env_runner: Any, **kwargs: Any) -> None:
        evaluating = env_runner.evaluation is not None or env_runner.config.in_evaluation
        seen = SEEN["evaluation" if evaluating else "training"]
        seen.append((episode.id_, episode.get_actions(-1)))

    return config.callbacks(on_episode_step=[note, lambda **kwargs: None])


def prefer_three(algo: Any) -> None:
    """Make the third action twice as probable as all others together."""
    behavior: Any = agent_of(algo.learner_group._learner).behavior
    head = behavior.actor.heads[0]
    with torch.no_grad():
        head.bias += 2.6 * torch.eye(8)[3]


def check_actions(explore: bool) -> None:
    """Training explores, evaluation does where it was asked to, and each in episodes of its own."""
    evaluation, training = (dict(SEEN[name]).keys() for name in ("evaluation", "training"))
    assert evaluation and not evaluation & training
    assert {action for _, action in SEEN["evaluation"]} == (set(range(8)) if explore else {3})
    counts = np.bincount([action for _, action in SEEN["training"]])
    assert (counts > 0).all() and counts[3] > counts.sum() / 4


@pytest.mark.parametrize(("unit", "explore"), [("episodes", False), ("timesteps", True)])
def test_evaluation_on_the_runner_that_collects(built: Any, unit: str, explore: bool) -> None:
    """It leaves nothing in replay, and the episodes that it cut off do not go on."""
    amount = 6 if unit == "episodes" else 4 * 52
    config = evaluated(clock(24)).evaluation(
        evaluation_duration=amount,
        evaluation_duration_unit=unit,
        evaluation_config={"explore": explore},
    )
    algo = built(config)
    algo.train()
    prefer_three(algo)
    for _ in range(3):
        algo.train()
        steps = algo.limiter.env_steps
        found = algo.evaluate()["env_runners"]
        # As many of every environment; each begins with a reset and has 24 steps.
        assert found["num_episodes"] == 8
        assert found["episode_len_mean"] == 24
        assert found["num_env_steps_sampled"] == 4 * (48 if unit == "episodes" else 52 - 3)
        assert algo.limiter.env_steps == steps
        assert ray.get(algo.replay.shards[0].report.remote()).num_steps == steps
        check_windows(algo)
    check_actions(explore)


def test_evaluation_by_a_runner_of_its_own(built: Any) -> None:
    """Every second iteration; training goes on where it was, in the middle of its episodes."""
    config = evaluated(clock(24)).evaluation(
        evaluation_interval=2,
        evaluation_duration=5,
        evaluation_num_env_runners=0,
    )
    algo = built(config)
    results = [algo.train()]
    prefer_three(algo)
    results += [algo.train() for _ in range(5)]
    looks = [result.get("evaluation", {}).get("env_runners", {}) for result in results]
    assert [found.get("num_episodes") for found in looks[1::2]] == [8, 8, 8]
    for found in looks[1::2]:
        assert found["episode_len_mean"] == 24 and 0 <= found["episode_return_mean"] <= 24 * 7
    check_actions(explore=False)
    assert algo.eval_env_runner is not algo.env_runner
    acting = algo.eval_env_runner.module.agent.state_dict()
    newest = algo.get_module().agent.state_dict()
    assert all(x.equal(newest[name]) for name, x in acting.items())
    (sample,) = algo.eval_env_runner.sample(num_timesteps=0)  # as where others take the rest
    assert sample.env_steps() <= NUM_ENVS
    check_windows(algo)
    ended = algo.limiter.env_steps // NUM_ENVS // 25 * NUM_ENVS  # nothing was cut off
    assert results[-1]["env_runners"]["num_episodes_lifetime"] == ended > 0


def test_an_episode_without_an_end_is_one_sentence(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as in our own evaluation; and training goes on afterwards."""
    monkeypatch.setattr("worldflux_dist.runner.EPISODE_LIMIT", 200)
    config = clock(10**9).evaluation(evaluation_duration=1)
    algo = built(config)
    algo.train()
    with pytest.raises(RuntimeError, match=r"more than 200 steps: give the environment an end"):
        algo.evaluate()
    steps = algo.limiter.env_steps
    algo.train()
    assert algo.limiter.env_steps > steps
    check_windows(algo)


def test_an_episode_without_an_end_is_one_sentence_from_a_process_of_its_own(built: Any) -> None:
    algo = built(clock(10**9).evaluation(evaluation_duration=2, evaluation_num_env_runners=1))
    algo.eval_env_runner_group.foreach_env_runner(limit_episodes, local_env_runner=False)
    with pytest.raises(RuntimeError, match=r"more than 200 steps: give the environment an end"):
        algo.evaluate()
    (pid,) = algo.eval_env_runner_group.foreach_env_runner(pid_of, local_env_runner=False)
    with pytest.raises(RuntimeError, match=r"more than 200 steps: give the environment an end"):
        algo.evaluate()  # by the same process
    assert algo.eval_env_runner_group.foreach_env_runner(pid_of, local_env_runner=False) == [pid]


def limit_episodes(_: Any) -> None:
    runner.EPISODE_LIMIT = 200


def pid_of(_: Any) -> int:
    return os.getpid()


def test_the_mean_return_stays_known(built: Any) -> None:
    """Iterations in which no episode ends show the last ones, nan only before the first."""
    config = clock(100, prefill=10_000)
    algo = built(config.callbacks(on_sample_end=lambda **kwargs: None))
    seed = algo.env_runner._fresh_seed()
    means: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for _ in range(16):
        found = algo.train()["env_runners"]["episode_return_mean"]
        means[algo.limiter.env_steps // NUM_ENVS // 101].append(found)
    assert np.isnan(means[0]).all()
    assert len(means[1]) > 1 and len(means[2]) > 1
    assert len(set(means[1])) == 1 and len(set(means[2])) == 1
    assert np.isfinite(means[1] + means[2]).all() and means[1] != means[2]
    assert algo.env_runner._seen is None  # and no RLlib episode was built, as no callback looks
    again = built(config)
    again.set_state(algo.get_state())
    assert again.env_runner._fresh_seed() == algo.env_runner._fresh_seed() != seed
    assert again.train()["env_runners"]["episode_return_mean"] == means[2][-1]


def test_failures_of_environments_are_counted(built: Any, tmp_path: Path) -> None:
    config = clock(10).environment(Failing, env_config={"length": 10, "mark": tmp_path / "failed"})
    algo = built(config)
    results = [algo.train() for _ in range(3)]
    assert [result["env_failures_lifetime"] for result in results] == [0, 1, 1]
