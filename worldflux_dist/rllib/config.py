"""RLlib's builder for WorldFlux: the settings of config.yaml under RLlib's roof.

How many processes there are, environments, seeds, evaluation and checkpoints are set with RLlib's
own methods; what is learned, with `training`. Everything becomes one strict `Config` in the end
(`settings`), so that a wrong key or value is one sentence here too.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import ENV_CREATOR, _global_registry

from worldflux_dist import config
from worldflux_dist.envs import EnvConfig
from worldflux_dist.envs.atari import is_atari
from worldflux_dist.envs.dmc import is_dmc
from worldflux_dist.rllib.env_runner import WorldFluxEnvRunner
from worldflux_dist.rllib.learner import WorldFluxLearner
from worldflux_dist.rllib.module import WorldFluxModule

# Settings of RLlib that other algorithms read; each with what takes its place here.
ELSEWHERE = {
    "grad_clip": "the family's optimizer clips, set training(model_options=...)",
    "replay_buffer_config": "set training(replay={...}, num_replay_shards=...)",
    "gamma": "the family has its discount, set training(model_options=...)",
    "torch_compile_learner": "set training(learner={'compile': True})",
    "minibatch_size": "set training(replay={'batch_size': ...})",
    "_train_batch_size_per_learner": "set training(replay={'batch_size': ...})",
    "train_batch_size": "set training(replay={'batch_size': ...})",
    "clip_rewards": "set env_config={'reward_clipping': True} for Atari, or wrap the environment",
    "observation_filter": "wrap the environment instead",
    "clip_actions": "actions are in their space already",
    "torch_ddp_kwargs": "learners share gradients by themselves",
    "_torch_lr_scheduler_classes": "the family's optimizer warms up by itself",
    "_torch_grad_scaler_class": "set training(learner={'precision': 'bfloat16'})",
    "use_env_runner_state_server": "runners pull weights already",
    "remote_worker_envs": "set num_env_runners",
    "gym_env_vectorize_mode": "set num_env_runners",
    "num_gpus": "set learners(num_gpus_per_learner=...)",
    "_model_config": "set training(model=..., model_options={...})",
    "num_epochs": "set training(train_ratio=...)",
    "output": "record with another algorithm, or keep the replay, checkpoint_replay=True",
    "num_aggregator_actors_per_learner": "batches come from replay shards",
    "_env_to_module_connector": "wrap the environment instead",
    "_module_to_env_connector": "wrap the environment instead",
    "_learner_connector": "wrap the environment instead",
    "input_filesystem": "recorded episodes are read from local paths, set offline_data(input_=...)",
    "offline_evaluation_interval": "policies are evaluated in the environment, by evaluation(...)",
}
# Which fields of our section `env` an environment of each kind reads.
ANY_ENV = {"max_episode_steps", "max_failures", "patience"}
DMC = {f.name for f in fields(EnvConfig) if f.name.startswith("dmc_")} | {"image_size"}
ATARI = {f.name for f in fields(EnvConfig)} - DMC - {"id", "num_envs", "kwargs"} | {"image_size"}


class WorldFluxConfig(AlgorithmConfig):
    """Settings of a `WorldFlux` algorithm.

    `.environment(env, env_config=...)` takes the ids of `worldflux-dist envs` (Gymnasium, ALE,
    `dmc/...`, `module:factory`), names registered with Tune and classes. For the ids,
    `env_config` may set what such an environment reads of config.yaml's section `env`
    (`max_episode_steps`, `max_failures`, `patience`; for Atari and DeepMind Control their own
    options too); what is left goes to the environment.
    `.env_runners(rollout_fragment_length=...)` is the length of a chunk of steps.
    `.offline_data(input_=[...])` puts episodes that RLlib recorded into replay; their actions are
    normalized, as RLlib records them by default, unless `actions_in_input_normalized=False`.
    """

    algo: ClassVar[type | None] = None  # what is built; set beside it, in algorithm.py

    def __init__(self, algo_class: type | None = None, model: str = "dreamerv3:size12m") -> None:
        super().__init__(algo_class=algo_class or self.algo)
        self.lr: float | None = None
        self.num_envs_per_env_runner = 8
        self.rollout_fragment_length = 64
        self.env_runner_cls = WorldFluxEnvRunner
        self.delay_between_env_runner_restarts_s = 1.0
        self.min_sample_timesteps_per_iteration = 1000
        self.evaluation_config = {"explore": False}
        self.normalize_actions = False  # our module's actions are the environment's own
        self.actions_in_input_normalized = True
        # RLlib would send connectors' states, which nothing here uses, after every iteration.
        self._dont_auto_sync_env_runner_states = True

        self.world_model = model
        self.model_options: dict[str, Any] = {}
        self.behavior: dict[str, Any] = {}
        self.planner: dict[str, Any] = {}
        self.replay: dict[str, Any] = {}
        self.learner: dict[str, Any] = {}
        self.imagination: dict[str, Any] = {}
        self.train_ratio = 32.0
        self.prefill = 1024
        self.num_replay_shards = 1
        self.num_cpus_per_replay_shard = 0.0
        self.num_imagination_actors = 0
        self.num_cpus_per_imagination_actor = 1.0
        self.num_gpus_per_imagination_actor = 0.0
        self.num_policy_learners = 1
        self.storage = ""
        self.patience = 300.0
        self.max_staleness = 32
        self.checkpoint_replay = True
        self.of_policy = False  # whether this is the copy for learners of the policy alone

    def training(
        self,
        *,
        model: Any = NotProvided,
        model_options: Any = NotProvided,
        behavior: Any = NotProvided,
        planner: Any = NotProvided,
        replay: Any = NotProvided,
        learner: Any = NotProvided,
        imagination: Any = NotProvided,
        train_ratio: Any = NotProvided,
        prefill: Any = NotProvided,
        num_replay_shards: Any = NotProvided,
        num_cpus_per_replay_shard: Any = NotProvided,
        num_imagination_actors: Any = NotProvided,
        num_cpus_per_imagination_actor: Any = NotProvided,
        num_gpus_per_imagination_actor: Any = NotProvided,
        num_policy_learners: Any = NotProvided,
        storage: Any = NotProvided,
        patience: Any = NotProvided,
        max_staleness: Any = NotProvided,
        checkpoint_replay: Any = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """What is learned, and by whom. Every value may be one of Tune's search spaces.

        Args:
            model: family:preset, as in `create_world_model`.
            model_options: single fields of the preset.
            behavior: `kind` and fields of the behavior.
            planner: `method` and fields of the planner.
            replay: the section `replay` of config.yaml (batch_size, batch_length, capacity ...).
            learner: the section `learner` of config.yaml (precision, threads: 1, compile ...).
            imagination: `queue_size` and `max_staleness` of that section.
            train_ratio: replayed steps per env step (resets included), kept exactly.
            prefill: env steps before the first gradient step; recorded ones count.
            num_replay_shards: processes that hold the replay.
            num_cpus_per_replay_shard: what each of them reserves.
            num_imagination_actors: 0 imagines inside the learners; with more, these imagine, and
                `num_policy_learners` learners of their own train the policy on it.
            num_cpus_per_imagination_actor: what each of them reserves.
            num_gpus_per_imagination_actor: what each of them reserves.
            num_policy_learners: their number; each reserves what a learner does.
            storage: a path or URL, visible to all nodes, for the replay's segments; empty is the
                algorithm's log directory, which is enough on one node.
            patience: seconds after which a process that does not answer is restarted.
            max_staleness: gradient steps that weights that act may be old.
            checkpoint_replay: whether checkpoints hold the replay, too.
            kwargs: RLlib's own, of which `lr` replaces the preset's learning rate.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().training(**kwargs)
        for name, value in given.items():
            if value is not NotProvided:
                setattr(self, "world_model" if name == "model" else name, value)
        return self

    def validate(self) -> None:
        """Raise ValueError for settings that do not exist, do not fit or have another place."""
        super().validate()
        plain = AlgorithmConfig()
        for name, instead in ELSEWHERE.items():
            if getattr(self, name, None) != getattr(plain, name, None):
                self._value_error(f"WorldFlux does not read `{name.lstrip('_')}`: {instead}")
        if self.is_multi_agent:
            self._value_error("WorldFlux trains one agent: leave `multi_agent` out")
        if self.lr is not None and not isinstance(self.lr, int | float):
            self._value_error("WorldFlux takes one number as `lr`, not a schedule")
        if self.lr is not None and self.lr <= 0:
            self._value_error(f"WorldFlux takes a positive number as `lr`, not {self.lr}")
        if not self.enable_rl_module_and_learner:
            self._value_error("WorldFlux needs RLlib's new API stack: leave `api_stack` out")
        if self.batch_mode != "truncate_episodes" and not self.in_evaluation:
            self._value_error("WorldFlux cuts episodes into chunks: leave `batch_mode` out")
        if not isinstance(self.rollout_fragment_length, int):
            self._value_error("WorldFlux takes one number as `rollout_fragment_length`")
        if self.env is None:
            self._value_error("WorldFlux needs an environment: call `.environment(env)`")
        if self.num_imagination_actors < 0:
            self._value_error(f"num_imagination_actors is {self.num_imagination_actors}: 0 or more")
        if "device" in self.learner:
            self._value_error("set learners(num_gpus_per_learner=...) instead of `device`")
        if {"mode", "num_imaginers", "num_policy_learners"} & self.imagination.keys():
            self._value_error(
                "WorldFlux reads queue_size and max_staleness in `imagination`: set "
                "training(num_imagination_actors=..., num_policy_learners=...) for the others"
            )
        self.settings()

    def settings(self, device: str = "cpu") -> config.Config:
        """All of this as the package's own configuration. Raises ConfigError."""
        scale = {
            "num_runners": max(1, self.num_env_runners),
            "num_shards": self.num_replay_shards,
            "num_learners": max(1, self.num_learners),
            "chunk_length": self.rollout_fragment_length,
            "patience": self.patience,
            "max_staleness": self.max_staleness,
            "storage": self.storage,
        }
        imagination = {
            "mode": "actors" if self.num_imagination_actors else "fused",
            "num_imaginers": max(1, self.num_imagination_actors),
            "num_policy_learners": self.num_policy_learners,
        }
        env, own = self.env_settings()
        parsed = config.from_dict(
            {
                "seed": int(self.seed or 0),
                **self._recipe(),
                "env": env,
                "replay": dict(self.replay),
                "learner": {"device": device, "threads": 1} | self.learner,
                "train": {
                    "train_ratio": self.train_ratio,
                    "prefill": self.prefill,
                    "env_steps": 2**62,  # RLlib decides when to stop
                },
                "scale": scale,
                "imagination": imagination | self.imagination,
            }
        )
        # The environment gets what it was given: that need not fit into a file.
        return replace(parsed, env=replace(parsed.env, kwargs=own))

    @property
    def part(self) -> str:
        """The part of the agent that learners train."""
        if self.of_policy:
            return "behavior"
        return "world_model" if self.num_imagination_actors else "agent"

    def env_settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `env_config` says of the section `env`, and the rest, for the environment itself."""
        env = {"id": self.env, "num_envs": self.num_envs_per_env_runner}
        if not isinstance(self.env, str):
            return env | {"id": getattr(self.env, "__name__", "env")}, {}
        if _global_registry.contains(ENV_CREATOR, self.env):
            return env, {}  # all of env_config is its own
        given = dict(self.env_config)
        read = ANY_ENV | (ATARI if is_atari(self.env) else DMC if is_dmc(self.env) else set())
        known = {name: given.pop(name) for name in read & given.keys()}
        return env | known, given

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=WorldFluxModule)

    def get_default_learner_class(self) -> type:
        return WorldFluxLearner

    @property
    def is_offline(self) -> bool:
        """False: recorded episodes are where training starts, beside new ones."""
        return False

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return super()._model_config_auto_includes | self._recipe()

    def _recipe(self) -> dict[str, Any]:
        """What an agent is made from."""
        options = dict(self.model_options)
        if self.lr is not None:
            options["learning_rate"] = float(self.lr)
        return {
            "model": self.world_model,
            "model_options": options,
            "behavior": dict(self.behavior),
            "planner": dict(self.planner),
        }
