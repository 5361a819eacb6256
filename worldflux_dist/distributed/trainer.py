"""Training through Ray, from one command: the driver's loop, its run directory and its ending.

The driver works in rounds (see flow.py) and never touches a tensor: it holds references, reports
and numbers. Running the same command again resumes from the newest good checkpoint.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import RayError

from worldflux_dist.config import Config
from worldflux_dist.distributed.actors import EvaluationRequest, RunnerReport, evaluate_remotely
from worldflux_dist.distributed.auth import check_auth, explained
from worldflux_dist.distributed.cluster import Plan, join_cluster, make_plan, start_ray
from worldflux_dist.distributed.ending import Outcome, RoleLostError, StopSignals, is_loss
from worldflux_dist.distributed.flow import Flow
from worldflux_dist.distributed.group import GroupLostError, stall
from worldflux_dist.distributed.placement import place
from worldflux_dist.distributed.ports import RayPorts
from worldflux_dist.distributed.roles import Task, probe, start_roles
from worldflux_dist.distributed.run import RunDirectory, storage_of
from worldflux_dist.distributed.saving import Saver
from worldflux_dist.distributed.supervision import is_gone
from worldflux_dist.distributed.telemetry import Telemetry
from worldflux_dist.learner import NonFiniteLossError
from worldflux_dist.metrics import Averages, Progress
from worldflux_dist.replay.limiter import Limiter

LOG_EVERY_S = 10.0
SAVE_AGAIN_S = 5.0  # after a checkpoint that could not be written
LAST_SAVE_S = 60.0  # how long the last one is tried
DRAIN_S = 10.0  # how long the last one waits for steps that are being collected
EVALUATIONS = 3  # how often the last evaluation is tried
DEATHS = {
    "runner": "a runner's process",
    "shard": "a shard's process",
    "acting": "the process that acts",
    "imaginer": "an imaginer's process",
}


class Trainer:
    """One run. Owns the actors, the limiter, the log and the decisions of when to do what."""

    def __init__(self, config: Config, run: RunDirectory, progress: Progress, task: Task) -> None:
        self.config, self.run, self.progress, self.task = config, run, progress, task
        batch_steps = config.replay.batch_size * config.replay.batch_length
        self.limiter = Limiter(config.train.train_ratio, batch_steps, config.train.prefill)
        self.averages = Averages()
        self.returns: deque[float] = deque(maxlen=20)
        self._lags: list[int] = []
        self.episodes = 0
        self._evaluation: tuple[int, ObjectRef] | None = None
        self._logged = self._saved = time.monotonic()
        self._log_counts = (0, 0, 0)
        self._busy = dict.fromkeys(("runner", "replay", "learner", "imaginer", "policy"), 0.0)
        self._evaluated_at = -1
        self._said = dict.fromkeys(DEATHS, 0)
        self._degraded = ""
        self.env_failures = self.imagined_steps = 0
        self.telemetry = Telemetry(run.path.name)

    def train(self, stop: StopSignals, options: dict[str, list[dict[str, Any]]]) -> Outcome | None:
        """Run to the end, or until stopped: then None, and everything is in a checkpoint."""
        config, self._options = self.config, options
        per_call = config.env.num_envs * config.scale.chunk_length
        steps = config.scale.num_runners * per_call
        found = self.run.resume(self.limiter, 2 * steps)
        if found:
            self.episodes = found[1]["episodes"]
            self._evaluated_at = self.run.last_score() // config.train.eval_every
            self.progress.print(
                f"resumed from {found[0]}: {self.limiter.env_steps:,} env steps, "
                f"{self.limiter.gradient_steps:,} gradient steps"
            )
        roles = start_roles(config, self.task, self.run.storage, found, options)
        self.ports = RayPorts(config, roles, lambda: stop.stopping, self.progress.print)
        self.saver = Saver(self.ports, self.limiter)
        self._log_counts = (self.limiter.env_steps, self.limiter.gradient_steps, 0)
        flow: Flow[RunnerReport] = Flow(self.limiter, self.ports, steps)
        try:
            self._rounds(flow, stop, per_call)
        except NonFiniteLossError:
            self.saver.settle()  # a checkpoint that is being written is of before
            raise
        self._save_everything()
        if stop.stopping:
            return None
        stop.all_is_saved()
        return self._finish()

    def _rounds(self, flow: Flow[RunnerReport], stop: StopSignals, per_call: int) -> None:
        """Rounds until all is collected and learned, or until stopped."""
        total = self.config.train.env_steps
        while not stop.stopping:
            collect = self.limiter.env_steps + self.ports.num_collects * per_call < total
            busy = self.ports.num_collects or self.limiter.owed or self.ports.policy_behind
            if not (collect or busy):
                break
            filling = self.limiter.env_steps < self.config.train.prefill
            self.progress.phase("prefill" if filling else "train")
            done = flow.round(collect)
            self.limiter.redo(self.ports.take_redo())
            self._take_in(done.reports, done.updates)
            if not (collect or self.ports.num_collects or self.ports.find_replay()):
                raise RuntimeError("replay was lost: run the same command again to go on")
            if self.limiter.env_steps < total:
                self._maybe_evaluate()
            self._maybe_log()
            self._maybe_save()

    def _maybe_save(self) -> None:
        """Begin a checkpoint when one is due, and put it in place once all have written.

        One that fails is tried again: a full disk, a storage that does not answer or a shard that
        died must not end the training.
        """
        try:
            if self.saver.writing is not None:
                self.saver.finish(wait=False)
            elif time.monotonic() - self._saved > self.config.train.checkpoint_every:
                self._saved = time.monotonic()
                self._log()
                self.saver.begin(self.episodes)
        except NonFiniteLossError:
            raise
        except Exception as error:  # whatever a storage raises
            self.saver.fail(error)
            wait = min(SAVE_AGAIN_S, self.config.train.checkpoint_every)
            self._saved = time.monotonic() - self.config.train.checkpoint_every + wait

    def _save_everything(self) -> None:
        """The last checkpoint, taken while nothing moves; tried again where a shard dies."""
        self.progress.phase("save")
        reports = self.ports.drain(DRAIN_S)
        self.limiter.inserted(sum(report.env_steps for report in reports))
        self._take_in(reports, [])
        self.ports.ask_sizes()
        self._log()
        deadline = time.monotonic() + LAST_SAVE_S
        self.saver.settle()  # of an earlier moment: this one is to be saved
        while True:
            try:
                self.saver.begin(self.episodes)
                self.saver.finish(wait=True)
                return
            except NonFiniteLossError:
                raise
            except Exception as error:  # whatever a storage raises
                self.saver.give_up()
                if time.monotonic() > deadline or is_gone(error):
                    raise
                time.sleep(1)

    # -------------------------------------------------------------------------- looking at it

    def _take_in(
        self, reports: Sequence[RunnerReport], updates: Sequence[dict[str, float]]
    ) -> None:
        """Add a round's reports and metrics to the averages and the display."""
        for role, num in self.ports.restarts.items():
            if num > self._said.get(role, num):
                self._said[role] = num
                self.progress.print(f"{DEATHS[role]} died; it is started again")
        self._say_degraded()
        for report in reports:
            self.env_failures += report.env_failures
            self._busy["runner"] += report.collect_seconds / self.config.scale.num_runners
            self._busy["replay"] += report.send_seconds / self.config.scale.num_runners
            self.episodes += len(report.episodes)
            for episode in report.episodes:
                self.returns.append(episode.total_reward)
                self.averages.mean("episode/return", episode.total_reward)
                self.averages.mean("episode/length", episode.length)
        for imagined in self.ports.take_imagined():
            self._busy["imaginer"] += imagined.seconds / self.config.imagination.num_imaginers
            self.imagined_steps += imagined.num_steps
        for number, metrics in enumerate(updates):
            self._busy["learner"] += metrics["time/learner_step"]
            self._busy["policy"] += metrics.get("policy/time/learner_step", 0.0)
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
        if lags := self.ports.take_lags():
            self._lags += lags
            self.progress.update(staleness=float(np.mean(lags)))

    def _say_degraded(self) -> None:
        """Say once when replay is no longer kept on disk, and once when it is again."""
        reports = self.ports.sizes.values()
        why = next((report.degraded for report in reports if report.degraded), "")
        if bool(why) != bool(self._degraded):
            self.progress.print(
                f"replay is not being kept on disk: {why}" if why else "replay is on disk again"
            )
        self._degraded = why

    def _maybe_log(self) -> None:
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self._log()

    def _log(self) -> None:
        """One line of metrics: means since the last one, counters, and who is holding up."""
        now = time.monotonic()
        wall = max(now - self._logged, 1e-3)
        busy = {role: seconds / wall for role, seconds in self._busy.items()}
        self.progress.update(bottleneck=max(busy, key=busy.__getitem__))
        limiter, means = self.limiter, self.averages.pop()
        counts = (limiter.env_steps, limiter.gradient_steps, self.imagined_steps)
        names = ("rate/env_steps", "rate/gradient_steps", "rate/imagined_steps")
        rates = {n: (a - b) / wall for n, a, b in zip(names, counts, self._log_counts, strict=True)}
        counters = {
            "frames": limiter.env_steps * self.task.action_repeat,
            "gradient_steps": limiter.gradient_steps,
            "gradient_steps/redone": limiter.redone,
            "episodes": self.episodes,
            "env_failures": self.env_failures,
            "train_ratio/achieved": limiter.achieved,
            "train_ratio/asked": self.config.train.train_ratio,
            "weights_version": self.ports.version,
            "weights/failed_publications": self.ports.failed_publications,
            "stall/learner": stall(means),
            "gradient_steps/forgiven": limiter.forgiven,
            "replay/not_durable": float(bool(self._degraded)),
        }
        counters |= {f"busy/{role}": share for role, share in busy.items()}
        counters |= {f"restarts/{role}": num for role, num in self.ports.restarts.items()}
        for index, report in self.ports.sizes.items():
            counters[f"replay/shard{index}_steps"] = report.num_steps
            counters[f"replay/shard{index}_bytes"] = report.nbytes
            counters[f"replay/shard{index}_duplicates"] = report.duplicates
            counters[f"replay/shard{index}_dropped_steps"] = report.dropped_steps
        if self.ports.imagined is not None:
            counters["imagination/stale"] = self.ports.imagined.stale
        if self._lags:
            means["staleness"] = float(np.mean(self._lags))
            for percent in (50, 95):
                means[f"staleness/p{percent}"] = float(np.percentile(self._lags, percent))
            self._lags = []
        line = counters | rates | means
        self.run.log.log(limiter.env_steps, line)
        self.telemetry.record(line)
        self._busy, self._log_counts = dict.fromkeys(self._busy, 0.0), counts
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
        arrays = [group.agent_arrays() for group in self.ports.roles.groups]
        evaluator = evaluate_remotely.options(**self._options["evaluator"][0])
        ref = evaluator.remote(self.config, self.task.spaces, request, *arrays)
        self._evaluation = (self.limiter.env_steps, ref)

    def _score(self) -> dict[str, Any] | None:
        """Wait for the evaluation under way and write its scores down; None where it was lost with
        a process."""
        assert self._evaluation is not None
        (env_steps, ref), self._evaluation = self._evaluation, None
        try:
            found: dict[str, Any] = ray.get(ref)
        except RayError as error:
            if not is_loss(error):
                raise
            self.progress.print(f"the evaluation at {env_steps:,} env steps was lost: {error}")
            return None
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
        for _ in range(EVALUATIONS):
            self._start_evaluation(random=True, pictures=True)
            if (found := self._score()) is not None:
                break
        else:
            raise RuntimeError(
                f"the last evaluation was lost {EVALUATIONS} times, perhaps for want of memory; "
                "all is saved: run the same command again to evaluate"
            )
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


def show_plan(config: Config) -> None:
    """Print what a run asks for and what there is, here or in the cluster RAY_ADDRESS names.

    Raises ConfigError where it cannot fit.
    """
    storage_of(config, Path())  # refuses what is no storage
    try:
        _plan(config, probe(config))
    finally:
        ray.shutdown()


def _plan(config: Config, task: Task) -> Plan:
    with explained(os.environ.get("RAY_ADDRESS", "")):
        nodes = join_cluster()
    if nodes:
        check_auth()
    plan = make_plan(config, task.spaces, nodes)
    print("\n".join(plan.lines()), flush=True)
    plan.check()
    return plan


def train(config: Config, run_dir: Path, plain: bool | None = None) -> Outcome | None:
    """Train, or go on training, in `run_dir`; None where it was stopped on the way.

    Raises ConfigError before anything starts; RuntimeError (of an environment), NonFiniteLossError,
    RoleLostError or CheckpointError with the reason it could not go on; what is in the run
    directory stays good.
    """
    run_dir = run_dir.resolve()  # other processes write there too
    task = probe(config)
    try:
        plan = _plan(config, task)
        with (
            RunDirectory(run_dir, config) as run,
            Progress(config.train.env_steps, plain) as progress,
        ):
            progress.phase("start")
            start_ray(plan)
            return _train(config, run, progress, task, plan)
    finally:
        ray.shutdown()


def _train(
    config: Config, run: RunDirectory, progress: Progress, task: Task, plan: Plan
) -> Outcome | None:
    try:
        with (
            StopSignals(progress.print) as stop,  # Ray sets handlers of its own when it starts
            closing(place(plan, stopping=lambda: stop.stopping)) as placement,
        ):
            if stop.stopping:
                return None
            return Trainer(config, run, progress, task).train(stop, placement.options)
    except OSError as error:
        raise run.explain(error) from error
    except (RayError, GroupLostError) as error:
        if isinstance(error, RayError) and not is_loss(error):
            raise  # an error of ours, from another process
        raise RoleLostError(error) from error
