"""Evaluations of a run: beside training when they are due, and the last one with the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from worldflux_dist.config import Config
from worldflux_dist.distributed.actors import EvaluationRequest, evaluate_remotely
from worldflux_dist.distributed.ending import Outcome, is_loss
from worldflux_dist.distributed.run import RunDirectory
from worldflux_dist.distributed.start import Task
from worldflux_dist.progress import Progress

EVALUATIONS = 3  # how often the last evaluation is tried


class Evaluator:
    """Owns the evaluation under way; there is one at a time. `options` say where Ray places it."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        progress: Progress,
        task: Task,
        groups: Sequence[Any],
        options: dict[str, Any],
    ) -> None:
        self.config, self.run, self.progress, self.task = config, run, progress, task
        self.groups, self.options = groups, options
        self._under_way: tuple[int, ObjectRef] | None = None
        last = run.last_score()
        self._due = last // config.train.eval_every if last >= 0 else -1

    def maybe_evaluate(self, env_steps: int) -> None:
        """Start an evaluation when one is due, and take in the one that has finished."""
        if self._under_way is not None and ray.wait([self._under_way[1]], timeout=0)[0]:
            self._score()
        due = env_steps // self.config.train.eval_every
        if self._under_way is None and due > self._due:
            self._start(env_steps, random="random" not in self.run.methods())
            self._due = due

    def finish(self, env_steps: int) -> Outcome:
        """The last evaluation, the pictures and the verdict."""
        self.progress.phase("evaluate")
        if self._under_way is not None:
            self._score()
        for _ in range(EVALUATIONS):
            self._start(env_steps, random=True, pictures=True)
            if (found := self._score()) is not None:
                break
        else:
            raise RuntimeError(
                f"the last evaluation was lost {EVALUATIONS} times, perhaps because it ran out of "
                "memory; all is saved: run the same command again to evaluate"
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

    def _start(self, env_steps: int, random: bool = False, pictures: bool = False) -> None:
        # The same seed every time: differences are the agent's, not the episodes'.
        request = EvaluationRequest(
            self.config.train.eval_episodes, self.config.seed + 1000, random, pictures
        )
        arrays = [group.agent_arrays() for group in self.groups]
        evaluator = evaluate_remotely.options(**self.options)
        ref = evaluator.remote(self.config, self.task.spaces, request, *arrays)
        self._under_way = (env_steps, ref)

    def _score(self) -> dict[str, Any] | None:
        """Wait for the evaluation under way and write its scores down; None where it was lost with
        a process."""
        assert self._under_way is not None
        (env_steps, ref), self._under_way = self._under_way, None
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
