"""The algorithm: RLlib's lifecycle around the flow of this package.

Each `training_step` is as many rounds of the flow (collect, update, publish) as it takes until
nothing is owed, while env runners collect on beside it: the achieved train_ratio is the asked one
to within a batch. RLlib owns env runners and learners; replay, imagination actors and the store of
weights are started here, after them.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import ALL_MODULES, COMPONENT_LEARNER_GROUP, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
)
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.util.placement_group import get_current_placement_group

from worldflux_dist.config import Config
from worldflux_dist.distributed.env_runner import send
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.flow import Flow, Round
from worldflux_dist.distributed.group import GroupLostError
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.model_actor import ImaginerActor
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.supervision import Driver
from worldflux_dist.distributed.weights import WeightStore
from worldflux_dist.metrics import find
from worldflux_dist.replay.limiter import Limiter
from worldflux_dist.rllib.collect import RLlibCollector
from worldflux_dist.rllib.config import WorldFluxConfig
from worldflux_dist.rllib.env_runner import raise_endless, why_no_runner_starts
from worldflux_dist.rllib.episodes import read_episodes, to_chunk
from worldflux_dist.rllib.learner import RLlibGroup
from worldflux_dist.rllib.places import Places, bundles
from worldflux_dist.rllib.replay import Replay
from worldflux_dist.spaces import Spaces
from worldflux_dist.storage import as_path, delete

STATE = "worldflux"  # our part of the algorithm's state
REPLAY, POLICY = "replay", "policy_learner_group"  # parts that save themselves
TIDY_EVERY_S = 60.0
DRAIN_S = 60.0  # how long a checkpoint waits for chunks on their way
RECORDED = 2_000_000  # streams of recorded episodes
# RLlib's words for how a metric is aggregated, where it is not its mean.
REDUCED: dict[str, dict[str, Any]] = {
    "last": {"reduce": "mean", "window": 1},
    "total": {"reduce": "lifetime_sum"},
}
# RLlib's own figures of episodes, among those that users may log.
EPISODES = re.compile("episode_((return|len)_(mean|min|max)|duration_sec_mean)")


class WorldFlux(Algorithm):
    """Model-based reinforcement learning with any family of world model. See `WorldFluxConfig`.

    Owns the limiter, the replay, the imagination actors, a second group of learners where the
    policy learns apart, and what ties them together.
    """

    @classmethod
    def get_default_config(cls) -> WorldFluxConfig:
        return WorldFluxConfig()

    replay: Replay

    def setup(self, config: Any) -> None:
        self.imaginers: list[Any] = []
        self.policy: RLlibGroup | None = None
        # What is known of the last ones: Tune's schedulers want to see them from the beginning.
        self._episodes = {EPISODE_RETURN_MEAN: np.nan, EPISODE_LEN_MEAN: np.nan}
        self._tidied = time.monotonic()
        self._check_room()
        self.places = Places(self.config)
        try:
            super().setup(config)
        except IndexError:  # RLlib's own end where no env runner started: it only logs why
            raise why_no_runner_starts(self.config) from None

    def _set_up_metrics(self) -> None:
        """RLlib's last step before callbacks may use the algorithm: ours must be there by then."""
        super()._set_up_metrics()
        self._start()

    def step(self) -> dict[str, Any]:
        """RLlib's; where no episode ended, the result shows the episodes that ended last."""
        result: dict[str, Any] = super().step()
        shown = result.get(ENV_RUNNER_RESULTS, {})
        for name, value in shown.items():
            if EPISODES.fullmatch(name) and not np.isnan(value):
                self._episodes[name] = value
        result[ENV_RUNNER_RESULTS] = shown | self._episodes
        return result

    def training_step(self) -> None:
        """Collect once, give runners more to do, and learn until nothing is owed."""
        try:
            rounds = [self.flow.round()]
            if self.env_runner_group.num_remote_env_runners():
                self.collector.start()  # beside what is learned now
            while self.limiter.owed and (len(rounds) == 1 or rounds[-1].updates):
                rounds.append(self.flow.round(collect=False))
        except GroupLostError as error:
            raise RuntimeError(
                f"{error}: RLlib does not start learners again, so restore the last checkpoint, or "
                "let Tune do it with FailureConfig(max_failures=1)"
            ) from error
        self._log(rounds)
        if time.monotonic() - self._tidied > TIDY_EVERY_S:
            self._tidied = time.monotonic()
            self.replay.tidy()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's; without exploration, unless `evaluation_config` says otherwise.

        Where there are no evaluation workers, no more is read of `evaluation_config` than that:
        set `evaluation_interval` or `evaluation_num_env_runners` for environments of their own.
        Raises EndlessEpisodeError.
        """
        self._merge()
        shared = self.env_runner if self.eval_env_runner_group is None else None
        if shared is None:
            result = super().evaluate(*args, **kwargs)
            raise_endless(self.eval_env_runner_group, self.config.evaluation_sample_timeout_s)
            return result
        if shared.env is None:
            shared.make_env()
        shared.evaluation = self.evaluation_config
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            shared.evaluation = None

    def get_module(self, *args: Any, **kwargs: Any) -> Any:
        """The module that acts in this process, with the newest weights."""
        if self.env_runner is not None:
            self.learners.publish()
            ray.get([group.published for group in self.learners.groups])
            self.env_runner.pull(self.store)
        return super().get_module(*args, **kwargs)

    def cleanup(self) -> None:
        super().cleanup()  # runners first: they may be storing a chunk
        if self.policy is not None:
            self.policy.group.shutdown()
        for imaginer in self.imaginers:
            ray.kill(imaginer)
        if hasattr(self, "replay"):
            self.replay.end()
            ray.kill(self.store)

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's bundles and one for each of our actors, after them."""
        asked = super().default_resource_request(config)
        settings = cls.get_default_config().update_from_dict(
            config if isinstance(config, dict) else config.to_dict()
        )
        ours = [bundle for each in bundles(settings).values() for bundle in each if bundle]
        return PlacementGroupFactory(asked.bundles + ours, strategy=settings.placement_strategy)

    # ------------------------------------------------------------------------------ the inside

    def _check_room(self) -> None:
        """Raise ValueError where Ray would wait forever; within Tune, it is Tune that waits."""
        if get_current_placement_group() is not None:
            return
        asked, there = self.default_resource_request(self.config), ray.cluster_resources()
        # The first bundle is the algorithm itself, which is here already.
        for kind in ("CPU", "GPU"):
            need = sum(bundle.get(kind, 0) for bundle in asked.bundles[1:])
            if need > there.get(kind, 0):
                raise ValueError(
                    f"WorldFlux needs {need:g} {kind}s and this Ray has {there.get(kind, 0):g}: "
                    "ask for fewer env runners, learners or imagination actors, or start Ray with "
                    f"num_{kind.lower()}s={need:g}"
                )

    def _start(self) -> None:
        """Start replay, weights and, where the policy learns apart, imagination; connect them."""
        settings: Config = self.config.settings()
        self.settings, train = settings, settings.train
        self.spaces_inside = Spaces(*self.spaces[DEFAULT_MODULE_ID])
        batch_steps = settings.replay.batch_size * settings.replay.batch_length
        self.limiter = Limiter(train.train_ratio, batch_steps, train.prefill)
        self.store = actor(WeightStore, num_cpus=0).remote()
        self.model = RLlibGroup(self.learner_group, self.config.part, self.store)
        if self.config.num_imagination_actors:
            self._start_imagination()
            self._hand_over()  # the module's spec may have named weights to begin with
        storage = self.config.storage
        root = as_path(storage) / Path(self.logdir).name if storage else as_path(self.logdir)
        # What a process of the same trial left that was killed, or is still ending: it deletes
        # what is its own, so each has a folder of its own.
        delete(root / REPLAY)
        own = root / REPLAY / uuid.uuid4().hex
        self.replay = Replay(settings, own, self.places.take("shard"))
        self._connect()
        if self.config.input_ and self.config.input_ != "sampler":
            self._fill(self.config.input_)

    def _start_imagination(self) -> None:
        """Imagination actors and the learners of the policy, beside those of the model."""
        config = self.config
        settings = config.settings("auto" if config.num_gpus_per_imagination_actor else "cpu")
        with torch.device("meta"):
            settings.make_agent(self.spaces_inside).imagining()  # refuses what cannot learn so
        make = actor(ImaginerActor)
        self.imaginers = [
            make.options(**where).remote(settings, self.spaces_inside, number, 0, self.store)
            for number, where in enumerate(self.places.take("imaginer"), start=1)
        ]
        self.places.take("policy")  # RLlib starts these
        apart = config.copy(copy_frozen=False)
        apart.num_learners, apart.of_policy = config.num_policy_learners, True
        group = apart.build_learner_group(
            rl_module_spec=apart.get_multi_rl_module_spec(spaces=self.spaces)
        )
        self.policy = RLlibGroup(group, apart.part, self.store)

    def _connect(self) -> None:
        """Connect all parts as they are now: at the start, and after a restore."""
        settings, shards = self.settings, Shards(self.replay.shards)
        groups = [self.model] if self.policy is None else [self.model, self.policy]
        for group in groups:
            group.connect(shards.handles)
        self.learners = Learners(settings, groups, shards, self.imaginers, None, Driver())
        self.collector = RLlibCollector(
            settings, self.env_runner_group, shards, self.learners, self.store, self.metrics
        )
        steps = settings.scale.num_runners * settings.scale.chunk_length * settings.env.num_envs
        self.flow = Flow(self.limiter, self.collector, self.learners, steps)
        stored = self.replay.total_steps()
        if not stored:  # replay was not in the checkpoint
            self.limiter.prefill = self.settings.train.prefill + self.limiter.env_steps
        self._uncounted = stored - self.limiter.env_steps  # in replay, but not by this limiter

    def _merge(self) -> None:
        """Have the model's learners hold the newest policy too: they are what RLlib looks at."""
        if self.policy is not None:
            self.policy.hand_over("behavior", self.model)

    def _hand_over(self) -> None:
        """Have the policy's learners begin with what the model's were given of it."""
        if self.policy is not None:
            self.model.hand_over("behavior", self.policy)

    def _fill(self, paths: Any) -> None:
        """Put recorded episodes into replay; they count for the prefill, not for the ratio."""
        shards, total = self.replay.shards, 0
        episodes = read_episodes([paths] if isinstance(paths, str) else paths)
        for number, (name, episode) in enumerate(episodes):
            row, index = divmod(number, len(shards))
            normalized, stream = self.config.actions_in_input_normalized, RECORDED + index
            chunk = to_chunk(episode, self.spaces_inside, stream, row, normalized, name)
            send(chunk, shards, self.settings.scale.patience)
            total += chunk.num_steps
        self.limiter.prefill = max(0, self.limiter.prefill - total)
        self._uncounted += total
        self.learners.shards.ask()

    def _log(self, rounds: list[Round]) -> None:
        """What RLlib's result shows of these rounds."""
        updates = [metrics for done in rounds for metrics in done.updates]
        for metrics in updates:
            for name, value in metrics.items():
                self._note(name, value, LEARNER_RESULTS, DEFAULT_MODULE_ID)
        trained = len(updates) * self.limiter.batch_steps
        self.metrics.log_value(
            (LEARNER_RESULTS, ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME),
            trained,
            reduce="lifetime_sum",
            with_throughput=True,
        )
        reports = [report for done in rounds for report in done.reports]
        for report in reports:
            self._note("env_failures_lifetime", report.env_failures)
        if lags := self.learners.staleness.take():
            self._note("weights/staleness", float(np.mean(lags)))
            for percent in (50, 95):
                self._note(f"weights/staleness_p{percent}", float(np.percentile(lags, percent)))
        self._note("weights/failed_publications", self.learners.failed_publications)
        self._note("train_ratio/achieved", self.limiter.achieved)
        self._note("train_ratio/asked", self.settings.train.train_ratio)
        self._note("gradient_steps", self.limiter.gradient_steps)
        sizes = self.learners.shards.sizes.values()
        self._note("replay/env_steps", self.limiter.env_steps)
        self._note("replay/num_steps", sum(size.num_steps for size in sizes))
        self._note("replay/nbytes", sum(size.nbytes for size in sizes))
        self._note("replay/duplicates", sum(size.duplicates for size in sizes))
        for role, num in self.learners.restarts.items():
            if role in ("shard", "imaginer"):
                self._note(f"restarts/{role}", num)
        for imagined in self.learners.take_imagined():
            self._note("num_imagined_steps_lifetime", imagined.num_steps)
        if self.learners.imagined is not None:
            self._note("imagination/stale", self.learners.imagined.stale)

    def _note(self, name: str, value: float, *under: str) -> None:
        """Log a metric as METRICS says: its name is a path, or one word `under` others."""
        how = REDUCED.get(find(name).how, {"reduce": "mean"})
        self.metrics.log_value((*under, name) if under else tuple(name.split("/")), value, **how)

    # ---------------------------------------------------------------------------------- saving

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """RLlib's state and ours; replay is only in what is saved to a path."""
        chosen = (components, not_components)
        if self._check_component(COMPONENT_LEARNER_GROUP, *chosen):
            self._merge()
        state: dict[str, Any] = super().get_state(
            components, not_components=not_components, **kwargs
        )
        if self.policy is not None and self._check_component(POLICY, *chosen):
            state[POLICY] = self.policy.group.get_state(**kwargs)
        if components == REPLAY:
            state[REPLAY] = {}
        apart = self.policy is not None
        own = {"limiter": self.limiter.state_dict(), "apart": apart, "episodes": self._episodes}
        return state | {STATE: own}

    def set_state(self, state: dict[str, Any]) -> None:
        apart = self.policy is not None
        if state.get(STATE, {}).get("apart", apart) != apart:
            raise ValueError(
                "this was saved with num_imagination_actors "
                f"{'0' if apart else 'above 0'}: restore it with the same"
            )
        super().set_state(state)
        if self.env_runner is not None:  # its next seeds depend on it; RLlib tells it too early
            taken = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
            self.env_runner.num_env_steps_sampled_lifetime = self.metrics.peek(taken, default=0)
        if POLICY in state and self.policy is not None:
            self.policy.group.set_state(state[POLICY])
        if STATE in state:
            saved = state[STATE]["limiter"]
            self.limiter.load_state_dict(saved, saved["env_steps"])  # all is taken in an iteration
            self._episodes = dict(state[STATE]["episodes"])
        self._connect()

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        own: list[tuple[str, Any]] = []
        if self.policy is not None:
            own.append((POLICY, self.policy.group))
        if self.config.checkpoint_replay:
            own.append((REPLAY, self.replay))
        return super().get_checkpointable_components() + own

    def save_to_path(self, *args: Any, **kwargs: Any) -> str:
        """As RLlib's; what runners have under way is waited for, so that all counts agree."""
        self._drain()
        with suppress(RayActorError):  # a shard is on its way back
            # Runners that died may have stored what they could not report.
            stored = self.replay.total_steps() - self._uncounted
            self.limiter.inserted(max(0, stored - self.limiter.env_steps))
        path: str = super().save_to_path(*args, **kwargs)
        return path

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._drain()
        super().restore_from_path(path, *args, **kwargs)
        if COMPONENT_LEARNER_GROUP in (kwargs.get("component") or ""):
            self._hand_over()
        self._connect()

    def _drain(self) -> None:
        """Wait for what runners have under way, and count it."""
        reports = self.collector.drain(DRAIN_S)
        self.limiter.inserted(sum(report.env_steps for report in reports))


WorldFluxConfig.algo = WorldFlux
