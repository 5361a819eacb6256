"""Training through Ray, from one command: the driver's loop, its run directory and its ending.

The driver works in rounds (see flow.py) and never touches a tensor: it holds references, reports
and numbers. Running the same command again resumes from the newest good checkpoint.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from worldflux_dist import checkpoint
from worldflux_dist.config import Config
from worldflux_dist.data import Spaces
from worldflux_dist.distributed.acting import ACTING, ActingActor
from worldflux_dist.distributed.actors import (
    SHARD_WAIT_S,
    EnvRunnerActor,
    EvaluationRequest,
    LearnerActor,
    RunnerReport,
    evaluate_remotely,
)
from worldflux_dist.distributed.cluster import make_plan, shard_config, start_ray
from worldflux_dist.distributed.flow import Flow
from worldflux_dist.distributed.ports import RayPorts
from worldflux_dist.distributed.run import RunDirectory
from worldflux_dist.distributed.shard import ReplayShardActor, shard_name
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.envs import make_envs
from worldflux_dist.evaluate import Evaluation
from worldflux_dist.metrics import Averages, Progress
from worldflux_dist.replay.limiter import Limiter

LOG_EVERY_S = 10.0
DEATHS = {
    "runner": "a runner's process",
    "shard": "a shard's process",
    "acting": "the process that acts",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last evaluation, the random baseline, and the verdict if asked for."""

    evaluation: Evaluation
    random: Evaluation
    passed: bool | None


class RoleLostError(RuntimeError):
    """A process died for good; the message says which and why."""

    def __init__(self, error: RayError) -> None:
        text = str(getattr(error, "cause", None) or error).strip()
        found = re.search(r"class_name: (\w+)", text) or re.search(r"ray::(\w+)", text)
        role = found[1] if found else "a process"
        why = f"it was killed, perhaps for want of memory, or crashed ({type(error).__name__})"
        if "creation task" in text:
            why = f"it could not start: {text.splitlines()[-1].strip()}"
        super().__init__(f"{role} is lost, {why}; run the same command again to go on")


class StopSignals:
    """Ctrl-C or SIGTERM once: save and stop; a second time: stop at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.stopping, self._say = False, say
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self._say("stopping: saving a checkpoint first (once more to stop at once)")


class Trainer:
    """One run. Owns the actors, the limiter, the log and the decisions of when to do what."""

    def __init__(self, config: Config, run: RunDirectory, progress: Progress, task: Task) -> None:
        self.config, self.run, self.progress, self.task = config, run, progress, task
        batch_steps = config.replay.batch_size * config.replay.batch_length
        self.limiter = Limiter(config.train.train_ratio, batch_steps, config.train.prefill)
        self.averages = Averages()
        self.returns: deque[float] = deque(maxlen=20)
        self.episodes = 0
        self._evaluation: tuple[int, ObjectRef] | None = None
        self._logged = self._saved = time.monotonic()
        self._busy = {"runner": 0.0, "replay": 0.0, "learner": 0.0}
        self._evaluated_at = -1
        self._said = dict.fromkeys(DEATHS, 0)
        self.env_failures = 0

    def train(self, stop: StopSignals) -> Outcome | None:
        """Run to the end, or until stopped: then None, and everything is in a checkpoint."""
        config = self.config
        per_call = config.env.num_envs * config.scale.chunk_length
        steps = config.scale.num_runners * per_call
        found = self.run.resume(self.limiter, 2 * steps)
        folder = found[0] if found else None
        if found:
            self.episodes = found[1]["episodes"]
            self._evaluated_at = self.run.last_score() // config.train.eval_every
            self.progress.print(
                f"resumed from {folder}: {self.limiter.env_steps:,} env steps, "
                f"{self.limiter.gradient_steps:,} gradient steps"
            )
        self.ports = self._start_roles(folder, stop)
        flow: Flow[RunnerReport] = Flow(self.limiter, self.ports, steps)
        total = config.train.env_steps
        while not stop.stopping:
            collect = self.limiter.env_steps + self.ports.num_collects * per_call < total
            if not (collect or self.ports.num_collects or self.limiter.owed):
                break
            filling = self.limiter.env_steps < config.train.prefill
            self.progress.phase("prefill" if filling else "train")
            done = flow.round(collect)
            self._take_in(done.reports, done.updates)
            if not (collect or self.ports.num_collects or self.ports.ready):
                raise RuntimeError("replay was lost: run the same command again to go on")
            if self.limiter.env_steps < total:
                self._maybe_evaluate()
            self._maybe_log()
            if time.monotonic() - self._saved > config.train.checkpoint_every:
                self.save()
        self.save()
        if stop.stopping:
            return None
        stop.stopping = True  # all is saved: from here on one Ctrl-C stops at once
        return self._finish()

    def _start_roles(self, folder: Path | None, stop: StopSignals) -> RayPorts:
        """Start every role's processes; `folder` is the checkpoint to go on from.

        Names come first: runners and the learner look the others up.
        """
        config, scale = self.config, self.config.scale
        store = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(WeightStore)
        self._store = store.options(name=WEIGHTS).remote()  # named actors live by their handle
        shard = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ReplayShardActor)
        shards = [
            shard.options(name=shard_name(i)).remote(
                shard_config(config), config.seed * 1000 + i, self.run.checkpoints, shard_name(i)
            )
            for i in range(scale.num_shards)
        ]
        gpus = ray.cluster_resources().get("GPU", 0) if config.learner.device != "cpu" else 0
        apart = scale.acting == "actor"  # shares a single GPU with the learner
        gpu = min(1.0, gpus / (1 + apart))
        if apart:
            acting = ray.remote(num_cpus=1, num_gpus=gpu, max_restarts=-1)(ActingActor)
            self._acting = acting.options(name=ACTING).remote(
                config, self.task.spaces, self.limiter.env_steps
            )
        learner = ray.remote(num_cpus=1, num_gpus=gpu)(LearnerActor)
        runner = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(EnvRunnerActor)
        return RayPorts(
            config,
            learner.remote(config, self.task.spaces, folder),
            shards,
            [runner.remote(config, i, self.limiter.env_steps) for i in range(scale.num_runners)],
            lambda: stop.stopping,
            self.limiter.gradient_steps,
        )

    def save(self) -> None:
        """A checkpoint of everything; tried again where a shard dies on the way."""
        deadline = time.monotonic() + SHARD_WAIT_S
        while True:
            try:
                return self._write_checkpoint()
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                self.ports.restarts["shard"] += 1
                time.sleep(0.5)

    def _write_checkpoint(self) -> None:
        """Taken while nothing moves, so that what is counted, stored and learned agrees."""
        self.progress.phase("save")
        reports = self.ports.drain()
        self.limiter.inserted(sum(report.env_steps for report in reports))
        self._take_in(reports, [])
        self.ports.ask_sizes()
        self._log()
        counters = {"limiter": self.limiter.state_dict(), "episodes": self.episodes}
        root = self.run.checkpoints
        with checkpoint.writing(root, self.limiter.gradient_steps, counters=counters) as folder:
            refs = [self.ports.learner.save.remote(folder)]
            refs += [
                shard.save.remote(folder / shard_name(index))
                for index, shard in enumerate(self.ports.shards)
            ]
            ray.get(refs)
        self._saved = time.monotonic()

    # -------------------------------------------------------------------------- looking at it

    def _take_in(
        self, reports: Sequence[RunnerReport], updates: Sequence[dict[str, float]]
    ) -> None:
        """Add a round's reports and metrics to the averages and the display."""
        for role, num in self.ports.restarts.items():
            if num > self._said[role]:
                self._said[role] = num
                self.progress.print(f"{DEATHS[role]} died; it is started again")
        for report in reports:
            self.env_failures += report.env_failures
            self._busy["runner"] += report.collect_seconds / self.config.scale.num_runners
            self._busy["replay"] += report.send_seconds / self.config.scale.num_runners
            self.averages.mean("staleness", self.ports.version - report.version)
            self.episodes += len(report.episodes)
            for episode in report.episodes:
                self.returns.append(episode.total_reward)
                self.averages.mean("episode/return", episode.total_reward)
                self.averages.mean("episode/length", episode.length)
        for number, metrics in enumerate(updates):
            self._busy["learner"] += metrics["time/learner_step"]
            if number:  # the first step of a round waits for nobody but its being owed
                self._busy["replay"] += metrics["time/learner_wait"]
            for name, value in metrics.items():
                self.averages.mean(name, value)
        env_steps = self.limiter.env_steps
        self.progress.update(
            env_steps=env_steps,
            frames=env_steps * self.task.action_repeat,
            gradient_steps=self.limiter.gradient_steps,
            train_ratio=self.limiter.achieved,
            asked_ratio=self.config.train.train_ratio,
        )
        if self.returns:
            self.progress.update(episode_return=float(np.mean(self.returns)))
        if updates:
            recon = [v for k, v in updates[-1].items() if k.startswith("loss/rec/")]
            self.progress.update(loss_total=updates[-1]["loss"])
            if recon:
                self.progress.update(loss_recon=sum(recon))
        if reports:
            staleness = np.mean([self.ports.version - report.version for report in reports])
            self.progress.update(staleness=float(staleness))

    def _maybe_log(self) -> None:
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self._log()

    def _log(self) -> None:
        """One line of metrics: means since the last one, counters, and who is holding up."""
        now = time.monotonic()
        wall = max(now - self._logged, 1e-3)
        bottleneck = max(self._busy, key=self._busy.__getitem__)
        self.progress.update(bottleneck=bottleneck)
        counters = {
            "frames": self.limiter.env_steps * self.task.action_repeat,
            "gradient_steps": self.limiter.gradient_steps,
            "episodes": self.episodes,
            "env_failures": self.env_failures,
            "train_ratio/achieved": self.limiter.achieved,
            "train_ratio/asked": self.config.train.train_ratio,
            "weights_version": self.ports.version,
        }
        counters |= {f"busy/{role}": seconds / wall for role, seconds in self._busy.items()}
        counters |= {f"restarts/{role}": num for role, num in self.ports.restarts.items()}
        counters |= {
            f"replay/shard{index}_steps": report.num_steps
            for index, report in self.ports.sizes.items()
        }
        self.run.log.log(self.limiter.env_steps, counters | self.averages.pop())
        self._busy = dict.fromkeys(self._busy, 0.0)
        self._logged = now

    # ------------------------------------------------------------------------------ evaluating

    def _maybe_evaluate(self) -> None:
        """Start an evaluation when one is due, and take in the one that has finished."""
        if self._evaluation is not None and ray.wait([self._evaluation[1]], timeout=0)[0]:
            self._score()
        due = self.limiter.env_steps // self.config.train.eval_every
        if self._evaluation is None and due > self._evaluated_at:
            self._start_evaluation(random="random" not in self.run.methods())
            self._evaluated_at = due

    def _start_evaluation(self, random: bool = False, pictures: bool = False) -> None:
        # The same seed every time: differences are the agent's, not the episodes'.
        request = EvaluationRequest(
            self.config.train.eval_episodes, self.config.seed + 1000, random, pictures
        )
        arrays = self.ports.learner.agent_arrays.remote()
        ref = evaluate_remotely.remote(self.config, self.task.spaces, arrays, request)
        self._evaluation = (self.limiter.env_steps, ref)

    def _score(self) -> dict[str, Any]:
        """Wait for the evaluation under way and write its scores down."""
        assert self._evaluation is not None
        env_steps, ref = self._evaluation
        found, self._evaluation = ray.get(ref), None
        for key, method in (("random", "random"), ("agent", self.config.model)):
            if key in found:
                self.run.score(env_steps, self.task.action_repeat, found[key].returns, method)
        self.progress.print(f"evaluation at {env_steps:,} env steps: {found['agent']}")
        return found

    def _finish(self) -> Outcome:
        """The last evaluation, the pictures and the verdict."""
        self.progress.phase("evaluate")
        if self._evaluation is not None:
            self._score()
        self._start_evaluation(random=True, pictures=True)
        found = self._score()
        self.progress.phase("figures")
        agent, random = found["agent"], found["random"]
        threshold = self.config.train.threshold
        self.run.draw(found.get("dream"), found.get("frames"), threshold, random.mean)
        passed = None
        if threshold is not None:
            passed = agent.mean >= threshold and agent.mean > random.mean
            self.progress.print(
                f"{'PASSED' if passed else 'FAILED'}: evaluated return {agent}, threshold "
                f"{threshold:g}; random policy {random}"
            )
        return Outcome(agent, random, passed)


@dataclass(frozen=True)
class Task:
    """What the driver must know of the environment."""

    spaces: Spaces
    action_repeat: int


def probe(config: Config) -> Task:
    """Make one environment here, so that a wrong id or space is said before anything starts."""
    envs = make_envs(config.env, config.seed, num_envs=1)
    task = Task(envs.spaces, envs.action_repeat)
    envs.close()
    return task


def train(config: Config, run_dir: Path, plain: bool | None = None) -> Outcome | None:
    """Train, or go on training, in `run_dir`; None where it was stopped on the way.

    Raises ConfigError before anything starts; RuntimeError (of an environment), NonFiniteLossError,
    RoleLostError or CheckpointError with the reason it could not go on; what is in the run
    directory stays good.
    """
    run_dir = run_dir.resolve()  # other processes write there too
    task = probe(config)
    plan = make_plan(config, task.spaces)
    print("\n".join(plan.lines()), flush=True)
    plan.check()
    with (
        RunDirectory(run_dir, config) as run,
        Progress(config.train.env_steps, plain) as progress,
    ):
        progress.phase("start")
        start_ray(plan)
        try:
            with StopSignals(progress.print) as stop:  # Ray sets handlers of its own when it starts
                return Trainer(config, run, progress, task).train(stop)
        except OSError as error:
            raise run.explain(error) from error
        except RayError as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                raise  # an error of ours, from another process
            raise RoleLostError(error) from error
        finally:
            ray.shutdown()
