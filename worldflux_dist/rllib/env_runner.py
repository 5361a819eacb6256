"""The env runner inside RLlib's: RLlib starts it, asks it for samples and reads its metrics; it
steps environments as every runner of this package does and sends the steps to replay itself.

RLlib's own loop makes Python objects of every step, which costs most of its time; here that is done
only where a callback wants to see episodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.tune.registry import ENV_CREATOR, _global_registry

from worldflux_dist.config import Config
from worldflux_dist.data import Chunk
from worldflux_dist.distributed.env_runner import RunnerReport, send
from worldflux_dist.distributed.weights import WeightReader, poll_by
from worldflux_dist.envs import Envs, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.rllib.episodes import CallbackEpisodes
from worldflux_dist.runner import EndlessEpisodeError, EnvRunner, Episode

EPISODE_CALLBACKS = ("on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end")


@dataclass
class Sample:
    """Some steps of all environments, as RLlib counts them: actions, for it counts no resets.

    Whole episodes are for looking at, and their steps are not kept: then `chunk` is None.
    """

    steps: int
    chunk: Chunk | None = None

    def env_steps(self) -> int:
        return self.steps

    agent_steps = env_steps


class WorldFluxEnvRunner(SingleAgentEnvRunner):
    """Owns N environments, an agent that acts in them, and the newest weights it has pulled."""

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        self._runner: EnvRunner | None = None
        self._reader: WeightReader | None = None
        self.evaluation: AlgorithmConfig | None = None  # of a runner that also collects, for now
        self.endless: EndlessEpisodeError | None = None
        if kwargs.get("worker_index"):  # in a process of its own
            keep_freed_memory()
        if kwargs.get("worker_index") or config.num_learners:  # else as the learner here has it
            torch.set_num_threads(1)
        super().__init__(config=config, **kwargs)

    def make_env(self) -> None:
        """Build the environments that the config describes and tell callbacks about them."""
        self.stop()
        settings: Config = self.config.settings()
        context = EnvContext(
            self.config.env_config,
            worker_index=self.worker_index,
            num_workers=self.num_workers,
            remote=False,
        )
        self.envs: Envs = make_envs(settings.env, 0, build=_own_env(self.config.env, context))
        self._seeded = False
        self.env, self.num_envs = self.envs.vector, self.envs.num_envs
        self._seen = CallbackEpisodes(self) if self._has_episode_callbacks() else None
        self._runner = None
        make_callback(
            "on_environment_created",
            callbacks_objects=self._callbacks,
            callbacks_functions=self.config.callbacks_on_environment_created,
            kwargs=dict(
                env_runner=self,
                metrics_logger=self.metrics,
                env=self.env.unwrapped,
                env_context=context,
            ),
        )

    def collect(self, store: Any, shards: Sequence[Any]) -> tuple[RunnerReport, dict[str, Any]]:
        """A chunk of steps with the newest weights, stored in replay when this returns; and
        metrics."""
        start = time.monotonic()
        learned = self.pull(store)
        (sample,) = self.sample(random_actions=not learned)
        chunk = sample.chunk
        collected = time.monotonic()
        reports = send(chunk, shards, 0.9 * self.config.patience)
        report = RunnerReport(
            chunk.num_steps,
            [],
            chunk.version,
            reports,
            self.envs.take_failures(),
            0,
            collected - start,
            time.monotonic() - collected,
            [] if self._runner is None else self._runner.acted,
        )
        return report, self.get_metrics()

    def pull(self, store: Any) -> bool:
        """Take over the newest weights; whether anything has been learned by them."""
        if self._reader is None:
            self._reader = WeightReader(store)
        self._reader.pull(self.module.agent)
        return self._reader.learned

    def _sample(
        self,
        *,
        num_timesteps: float | None = None,
        num_episodes: float | None = None,
        explore: bool,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[Sample]:
        """At least `num_timesteps` steps, resets among them, or `num_episodes` whole episodes, as
        many of every environment so that short ones do not count more often."""
        apart = num_episodes is not None or self.evaluation is not None  # from what replay gets
        if self.evaluation is not None:
            explore = self.evaluation.explore
        if apart or force_reset or self._runner is None:
            self.envs.reset(None if self._seeded else self._fresh_seed())
            self._seeded = True
            self._runner = self._make_runner()
        runner = self._runner
        runner.act = self._act(explore, random_actions)
        runner.version = 0 if self._reader is None else self._reader.oldest
        runner.refresh = self._nothing_newer if apart or random_actions else self._poll
        start = time.monotonic()
        if num_episodes is None:
            assert num_timesteps is not None
            # RLlib asks an evaluation worker for 0 steps where others take the last ones.
            chunk = runner.collect(max(1, math.ceil(num_timesteps / self.num_envs)))
            sample, episodes = Sample(_actions(chunk), chunk), runner.take_episodes()
        else:
            episodes = self._whole_episodes(runner, math.ceil(num_episodes))
            sample = Sample(runner.num_actions)
        if apart:
            self._runner = None  # nothing goes on from here
        self._log(episodes, sample.steps, time.monotonic() - start)
        return [sample]

    def _whole_episodes(self, runner: EnvRunner, num: int) -> list[Episode]:
        """`num` episodes. In a process of its own, one without an end is kept in `endless` for the
        algorithm to raise: RLlib would start a runner that raises again, and say little."""
        try:
            return runner.whole_episodes(num)
        except EndlessEpisodeError as error:
            if not self.worker_index:
                raise
            self.endless = error
            self._increase_sampled_metrics(0, num)  # or RLlib asks for them again and again
            return []

    def _nothing_newer(self) -> None:
        """One policy to the end."""

    def _poll(self) -> None:
        """Within a fragment: take newer weights over before those here are too old."""
        if self._reader is not None and self._runner is not None:
            self._reader.poll(self.module.agent, poll_by(self.config.max_staleness))
            self._runner.version = self._reader.oldest

    def _fresh_seed(self) -> int:
        """Neither a restored algorithm nor a restarted runner plays its episodes once more."""
        given = self.config.seed
        seed = [time.time_ns()] if given is None else [given, self.worker_index or 0]
        life = 0
        if self.worker_index:
            life = ray.get_runtime_context().was_current_actor_reconstructed * time.time_ns()
        taken = int(self.num_env_steps_sampled_lifetime)
        state = np.random.SeedSequence(
            [*seed, self.config.in_evaluation, taken, life]
        ).generate_state(1)
        if self.worker_index:  # elsewhere the learner's random numbers must go on
            torch.manual_seed(int(state[0]))
        return int(state[0])

    def _make_runner(self) -> EnvRunner:
        envs: Any = self.envs if self._seen is None else self._seen.watch(self.envs)
        index = self.worker_index or 0
        act = random_act(self.envs.spaces, 0)  # until `_sample` says how
        return EnvRunner(envs, act, f"runner-{index}", index * self.num_envs)

    def _act(self, explore: bool, random_actions: bool) -> Any:
        if random_actions:
            return random_act(self.envs.spaces, int(torch.randint(2**31, ())))
        return torch.inference_mode()(partial(self.module.agent.act_batch, greedy=not explore))

    def _log(self, episodes: Sequence[Episode], steps: int, seconds: float) -> None:
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
        self._increase_sampled_metrics(steps, len(episodes))
        self.num_env_steps_sampled_lifetime += steps  # RLlib tells remote runners the sum of all
        for episode in episodes:
            taken = seconds * episode.length * self.num_envs / max(1, steps)
            self._log_episode_metrics(episode.length, episode.total_reward, taken)

    def _has_episode_callbacks(self) -> bool:
        own = [getattr(type(c), n) for c in self._callbacks for n in EPISODE_CALLBACKS]
        plain = [getattr(RLlibCallback, n) for _ in self._callbacks for n in EPISODE_CALLBACKS]
        given = any(getattr(self.config, f"callbacks_{name}") for name in EPISODE_CALLBACKS)
        return given or own != plain


def raise_endless(workers: EnvRunnerGroup | None, patience: float) -> None:
    """Raise what episodes of remote evaluation workers did not end with, if anything; a worker that
    is still at it gets `patience` more seconds."""
    if workers is not None and workers.num_remote_env_runners():
        errors = workers.foreach_env_runner(
            _take_endless, local_env_runner=False, timeout_seconds=patience
        )
        for error in filter(None, errors):
            raise error


def _take_endless(runner: WorldFluxEnvRunner) -> EndlessEpisodeError | None:
    taken, runner.endless = runner.endless, None
    return taken


def _actions(chunk: Chunk) -> int:
    return int((~chunk.is_first).sum())


def _own_env(env: Any, context: EnvContext) -> Callable[[], Any] | None:
    """How to make an environment that is registered with Tune, or a class."""
    if isinstance(env, str) and _global_registry.contains(ENV_CREATOR, env):
        return partial(_global_registry.get(ENV_CREATOR, env), context)
    return None if isinstance(env, str) else partial(env, context)


def why_no_runner_starts(config: AlgorithmConfig) -> Exception:
    """What goes wrong where an env runner is started in a process of its own."""
    there: Any = ray.remote(num_cpus=0, max_retries=0)
    try:
        if _registered(config.env) and not ray.get(there(_registered).remote(config.env)):
            return ValueError(
                f"env {config.env} is registered in this process alone, not where env runners are: "
                f"give .environment() its class, 'module:{config.env}' (that module registers it) "
                "or a name from ray.tune.register_env"
            )
        ray.get(there(_start_and_stop).remote(config))
    except RayTaskError as error:
        cause: Exception = error.cause
        return cause
    except RayError as error:
        return RuntimeError(f"the process of an env runner died while it started: {error}")
    return RuntimeError(
        "no env runner started, though one does now: see RLlib's log, and try again"
    )


def _registered(env: Any) -> bool:
    return isinstance(env, str) and env in gymnasium.registry


def _start_and_stop(config: AlgorithmConfig) -> None:
    config.env_runner_cls(config=config, worker_index=1).stop()
