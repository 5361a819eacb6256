"""The RLlib builder: what is set arrives, survives copies, and mistakes are one sentence."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from ray import tune
from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole
from rllib_runs import BATCH, PATIENCE_S, small

from worldflux_dist.envs import EnvConfig
from worldflux_dist.rllib import WorldFlux, WorldFluxConfig

SET: dict[str, Any] = {
    "model": "tdmpc2:tiny",
    "model_options": {"units": 16},
    "behavior": {"kind": "actor_critic", "horizon": 7},
    "planner": {"method": "none"},
    "replay": {"batch_size": 6, "batch_length": 5},
    "learner": {"precision": "bfloat16"},
    "imagination": {"queue_size": 9},
    "train_ratio": 0.5,
    "prefill": 77,
    "num_replay_shards": 3,
    "num_cpus_per_replay_shard": 0.5,
    "num_imagination_actors": 2,
    "num_cpus_per_imagination_actor": 0.25,
    "num_gpus_per_imagination_actor": 0.1,
    "num_policy_learners": 3,
    "storage": "s3://bucket/here",
    "patience": 12.0,
    "max_staleness": 8,
    "checkpoint_replay": False,
}


def full() -> WorldFluxConfig:
    return small(2, 3, lr=1e-4, **SET).environment(env_config={"max_episode_steps": 9})


def test_every_setting_has_its_place() -> None:
    named = inspect.signature(WorldFluxConfig.training).parameters
    assert SET.keys() == named.keys() - {"self", "kwargs"}
    config, plain = full(), WorldFluxConfig()
    for name, value in SET.items():
        stored = "world_model" if name == "model" else name
        assert getattr(config, stored) == value != getattr(plain, stored)
    settings = config.settings("cuda")
    assert settings.model == "tdmpc2:tiny"
    assert settings.model_options == {"units": 16, "learning_rate": 1e-4}
    assert settings.behavior == SET["behavior"] and settings.planner == SET["planner"]
    assert (settings.replay.batch_size, settings.replay.batch_length) == (6, 5)
    assert (settings.learner.precision, settings.learner.device) == ("bfloat16", "cuda")
    assert (settings.train.train_ratio, settings.train.prefill) == (0.5, 77)
    scale, imagination = settings.scale, settings.imagination
    assert (scale.num_runners, scale.num_learners, scale.num_shards) == (2, 3, 3)
    assert (scale.chunk_length, scale.patience, scale.max_staleness) == (16, 12.0, 8)
    assert scale.storage == "s3://bucket/here"
    assert imagination.mode == "actors" and small().settings().imagination.mode == "fused"
    assert (imagination.num_imaginers, imagination.num_policy_learners) == (2, 3)
    assert imagination.queue_size == 9
    assert (settings.env.num_envs, settings.env.max_episode_steps) == (4, 9)
    assert small().debugging(seed=5).settings().seed == 5


@pytest.mark.parametrize(
    "back",
    [
        lambda config: WorldFluxConfig.from_dict(config.to_dict()),
        lambda config: WorldFluxConfig.from_state(config.get_state()),
        lambda config: WorldFluxConfig().update_from_dict(config.to_dict()),
        lambda config: config.copy(),
        lambda config: config.copy(copy_frozen=True).copy(copy_frozen=False),
    ],
    ids=["dict", "state", "update", "copy", "frozen"],
)
def test_it_comes_back_equal(back: Any) -> None:
    config = full()
    found = back(config)
    assert type(found) is WorldFluxConfig
    assert found.settings() == config.settings()
    before, after = config.to_dict(), found.to_dict()
    assert before.keys() == after.keys() - {"class"}
    assert not [name for name, value in before.items() if after[name] != value]


def test_search_spaces_survive() -> None:
    grid = tune.grid_search([8, 16])
    options = tune.choice([{"units": 32}])
    given = small(train_ratio=grid, replay=tune.grid_search([BATCH]), model_options=options)
    found = given.training(model=tune.grid_search(["dreamerv3:tiny"]), lr=tune.uniform(0, 1))
    space = found.to_dict()
    assert space["train_ratio"] == {"grid_search": [8, 16]}
    assert space["replay"] == {"grid_search": [BATCH]}
    assert space["world_model"] == {"grid_search": ["dreamerv3:tiny"]}
    assert isinstance(space["model_options"], tune.search.sample.Categorical)
    assert isinstance(space["lr"], tune.search.sample.Float)
    # What Tune draws of it is a configuration again.
    drawn = space | {"train_ratio": 16, "replay": BATCH, "world_model": "dreamerv3:tiny"}
    drawn |= {"model_options": {"units": 32}, "lr": 0.5}
    settings = WorldFluxConfig.from_dict(drawn).settings()
    assert settings.train.train_ratio == 16
    assert settings.model_options == {"units": 32, "learning_rate": 0.5}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            lambda: small(replay={"batch_sise": 4}),
            "unknown config key 'replay.batch_sise': did you",
        ),
        (
            lambda: small(learner={"presision": 4}),
            "unknown config key 'learner.presision': did you",
        ),
        (
            lambda: small(imagination={"queue": 4}),
            "unknown config key 'imagination.queue': did you",
        ),
        (
            lambda: small(train_ratio="much"),
            "train.train_ratio is 'much': it must be a valid number",
        ),
        (
            lambda: small(model_options={"units": CartPoleEnv}),
            "which no config can hold: write a number, a text, a list or a mapping",
        ),
        (lambda: small(num_replay_shards=0), "scale.num_shards is 0: it must be at least 1"),
        (lambda: small(num_imagination_actors=-1), "num_imagination_actors is -1: 0 or more"),
        (lambda: small(imagination={"mode": "fused"}), "set training\\(num_imagination_actors=..."),
        (lambda: small(lr=[[0, 1e-3], [9, 1e-4]]), "takes one number as `lr`, not a schedule"),
        (
            lambda: small().env_runners(rollout_fragment_length="auto"),
            "takes one number as `rollout_fragment_length`",
        ),
        (
            lambda: small().evaluation(offline_evaluation_interval=1),
            "does not read `offline_evaluation_interval`: policies are evaluated in the env",
        ),
        (
            lambda: small().offline_data(input_filesystem="s3"),
            "does not read `input_filesystem`: recorded episodes are read from local paths",
        ),
        (lambda: small(lr=-1e-4), "takes a positive number as `lr`, not -0.0001"),
        (lambda: small(grad_clip=1.0), "does not read `grad_clip`: the family's optimizer clips"),
        (lambda: small(gamma=0.9), "does not read `gamma`: the family has its discount"),
        (lambda: small(minibatch_size=8), "does not read `minibatch_size`: set training\\(replay="),
        (lambda: small(train_batch_size_per_learner=8), "set training\\(replay={'batch_size': ..."),
        (lambda: small(num_epochs=2), "does not read `num_epochs`: set training\\(train_ratio="),
        (
            lambda: small(learner_connector=lambda *given: None),
            "does not read `learner_connector`: wrap the environment",
        ),
        (
            lambda: small().env_runners(env_to_module_connector=lambda *given: None),
            "does not read `env_to_module_connector`: wrap the environment",
        ),
        (
            lambda: small().env_runners(module_to_env_connector=lambda *given: None),
            "does not read `module_to_env_connector`: wrap the environment",
        ),
        (
            lambda: small().learners(num_learners=1, num_aggregator_actors_per_learner=1),
            "does not read `num_aggregator_actors_per_learner`: batches come from replay",
        ),
        (
            lambda: (
                small()
                .env_runners(batch_mode="complete_episodes")
                .offline_data(output="here", output_write_episodes=True)
            ),
            "does not read `output`: record with another algorithm",
        ),
        (
            lambda: small().multi_agent(
                policies={"a", "b"}, policy_mapping_fn=lambda agent, *given, **more: agent
            ),
            "trains one agent: leave `multi_agent` out",
        ),
        (
            lambda: small().api_stack(
                enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False
            ),
            "new API stack: leave `api_stack` out",
        ),
        (lambda: small().environment(None), "needs an environment: call `.environment\\(env\\)`"),
        (
            lambda: small(0, 3),
            "batch_size 4 cannot be shared by scale.num_learners 3: make it a mu",
        ),
        (
            lambda: small(num_imagination_actors=1, num_policy_learners=3),
            "batch_size 4 cannot be shared by imagination.num_policy_learners 3: make it a mul",
        ),
        (
            lambda: small().environment(env_config={"max_episode_steps": -1}),
            "env.max_episode_steps is -1: it must be at least 0",
        ),
    ],
)
def test_a_mistake_is_one_sentence(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        config().validate()
    one_sentence(caught)


def one_sentence(caught: pytest.ExceptionInfo) -> None:
    """RLlib adds a line of its own on how to have no checks at all."""
    first, *more = str(caught.value).splitlines()
    assert len(first) < 250
    assert all(line.startswith("To suppress all validation errors") for line in more)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_ration'"):
        small(train_ration=8)


def registered_here(name: str) -> str:
    """An id that no other process knows."""
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=CartPoleEnv)
    return name


ONLY_HERE = "OursOnly-v0 is registered in this process alone, not where env runners are: give .env"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: small(model="dreamerv3:tinny"), "no preset .*did you mean 'dreamerv3:tiny'"),
        (lambda: small(model="dreamer:tiny"), "no world-model family .*did you mean 'dreamerv3'"),
        (lambda: small(model_options={"unitts": 8}), "no option 'unitts': did you mean 'units'"),
        (lambda: small(behavior={"horizn": 8}), "no option 'horizn': did you mean 'horizon'"),
        (
            lambda: small().environment("CartPol-v1"),
            "unknown env CartPol-v1, did you mean CartPole",
        ),
        (
            lambda: small(3, 2),
            "needs 5 CPUs and this Ray has 4: ask for fewer .* or start Ray with num_cpus=5",
        ),
        (
            lambda: small(1, 1, num_imagination_actors=1, num_policy_learners=2),
            "needs 5 CPUs and this Ray has 4: ask for fewer .* or start Ray with num_cpus=5",
        ),
        (
            lambda: small().env_runners(num_gpus_per_env_runner=1, num_env_runners=1),
            "needs 1 GPUs and this Ray has 0: ask for fewer .* or start Ray with num_gpus=1",
        ),
        (
            lambda: small(model="tdmpc2:tiny", num_imagination_actors=1),
            "behavior.kind latent_td does not learn in imagination: set behavior.kind to actor_cr",
        ),
        # RLlib itself only logs why its runners do not start.
        (lambda: small(1).environment("CartPol-v1"), "unknown env CartPol-v1, did you mean Cart"),
        (
            lambda: small().environment(MultiAgentCartPole, env_config={"num_agents": 2}),
            "has no observation_space or action_space of one agent",
        ),
        (
            lambda: small().environment("CartPole-v1", env_config={"frame_skip": 2}),
            "env CartPole-v1 could not be made: .*frame_skip",
        ),
        (
            lambda: small().environment("dmc/walker-walk", env_config={"frame_skip": 2}),
            "env dmc/walker-walk could not be made: .*frame_skip",
        ),
        (
            lambda: small().environment("ALE/Pong-v5", env_config={"dmc_action_repeat": 2}),
            "\\['dmc_action_repeat'\\] do nothing for ALE/Pong-v5",
        ),
        (lambda: small(1).environment(registered_here("OursOnly-v0")), ONLY_HERE),
        (
            lambda: (
                small()
                .environment(registered_here("OursOnly-v0"))
                .evaluation(evaluation_interval=1, evaluation_num_env_runners=1)
            ),
            ONLY_HERE,
        ),
    ],
)
def test_what_only_a_start_shows_is_one_sentence(ray_local: None, config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        config().build_algo()
    one_sentence(caught)


@pytest.mark.parametrize("lr", [None, 3e-5])
def test_the_learning_rate_reaches_the_optimizer(lr: float | None) -> None:
    learner = small(lr=lr).build_learner(env=gymnasium.make("CartPole-v1"))
    (optimizer,) = learner.learner.optimizers.values()
    preset = learner.learner.agent.world_model.config.learning_rate
    assert preset == (8e-4 if lr is None else lr)
    assert {group["lr"] for group in optimizer.param_groups} == {preset}


def test_a_restored_optimizer_goes_on_with_the_learning_rate_that_is_configured() -> None:
    env = gymnasium.make("CartPole-v1")
    saved, restored = small().build_learner(env=env), small(lr=3e-5).build_learner(env=env)
    (before,), (after,) = (each.learner.optimizers.values() for each in (saved, restored))
    for group in before.param_groups:
        group["steps"] = 50  # of the warm-up, and of the moments' correction
    restored.set_state(saved.get_state())
    assert {(group["lr"], group["steps"]) for group in after.param_groups} == {(3e-5, 50)}


ATARI: dict[str, Any] = {"frame_skip": 2, "grayscale": True, "noop_max": 0, "image_size": 32}
DMC: dict[str, Any] = {"dmc_obs": "pixels", "dmc_action_repeat": 4, "image_size": 32}


@pytest.mark.parametrize(
    ("env", "ours", "kwargs"),
    [
        ("CartPole-v1", {}, {"sutton_barto_reward": True} | ATARI | DMC),
        ("HalfCheetah-v5", {}, {"frame_skip": 2}),
        ("module:thing", {}, {"num_envs": 3, "id": 1, "repeat_action_probability": 0.5}),
        ("ALE/Pong-v5", ATARI, {"difficulty": 1, "dmc_obs": "pixels"}),
        ("dmc/walker-walk", DMC, {"random": 1, "frame_skip": 2}),
    ],
)
def test_env_config_is_split(env: str, ours: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Fields of our section `env` are taken out where such an environment reads them; all else is
    its own, and those of our names for how many and which environments."""
    for more in ({}, {"patience": 3.0, "max_episode_steps": 9, "max_failures": 2}):
        config = small().environment(env, env_config=kwargs | ours | more)
        assert config.settings().env == EnvConfig(env, 4, kwargs=kwargs, **ours, **more)


def test_env_config_of_an_own_class_stays_whole() -> None:
    """RLlib hands it to the class, whose settings may be named as ours are."""
    config = small().environment(CartPoleEnv, env_config={"level": 2, "image_size": [84, 84]})
    assert config.settings().env == EnvConfig("CartPoleEnv", 4)
    tune.register_env("own", CartPoleEnv)
    config.environment("own", env_config={"image_size": [84, 84]})
    assert config.settings().env == EnvConfig("own", 4)


def test_an_environment_gets_what_env_config_holds() -> None:
    """Arrays and objects, too, which no file could hold."""
    given = {"goal": np.ones(3), "kind": CartPoleEnv, "scale": np.float32(2)}
    found = small().environment("Pendulum-v1", env_config=given).settings().env.kwargs
    assert found.keys() == given.keys()
    assert all(found[name] is value for name, value in given.items())


def test_numbers_of_numpy_are_numbers() -> None:
    """As searches draw them."""
    settings = small(
        train_ratio=np.int64(8),
        replay=BATCH | {"batch_size": np.int32(8)},
        planner={"goal": np.ones(2)},
    ).settings()
    assert (settings.train.train_ratio, settings.replay.batch_size) == (8, 8)
    assert settings.planner == {"goal": [1.0, 1.0]}


def test_bundles() -> None:
    """Tune reserves one for every process: each of RLlib's and each of ours."""
    config = small(2, 2, num_replay_shards=3, num_cpus_per_replay_shard=0.5)
    config.evaluation(evaluation_num_env_runners=1, evaluation_interval=1)
    assert bundles(config)[(("CPU", 1.0),)] == 1 + 2 + 1 + 2  # RLlib's: driver, runners, learners
    assert bundles(config)[(("CPU", 0.5),)] == 3
    config.training(num_imagination_actors=2, num_cpus_per_imagination_actor=0.25)
    config.training(num_gpus_per_imagination_actor=0.125, num_policy_learners=2)
    assert bundles(config)[(("CPU", 0.25), ("GPU", 0.125))] == 2
    assert bundles(config)[(("CPU", 1.0),)] == 6 + 2
    config.learners(num_gpus_per_learner=1)
    found = bundles(config)
    assert sum(dict(bundle).get("GPU", 0) == 1 for bundle in found.elements()) == 2 + 2
    assert not any(bundle == () for bundle in found)
    assert sum(bundles(small(1, 0)).values()) == 2  # shards that reserve nothing need none


def bundles(config: WorldFluxConfig) -> Counter:
    for given in (config, config.to_dict()):
        asked = WorldFlux.default_resource_request(given)
        found = Counter(tuple(sorted(bundle.items())) for bundle in asked.bundles)
    return found


def test_the_package_imports_neither_ray_nor_rllib() -> None:
    script = "import sys, worldflux_dist; print([m for m in sys.modules if m.startswith('ray')])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert re.fullmatch(r"\[\]\s*", done.stdout)
