"""Evaluations of a run: beside training when they are due, and the last one with the verdict."""

from __future__ import annotations

from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from worldflux_dist.distributed.actors import EvaluationRequest, evaluate_remotely
from worldflux_dist.distributed.ending import Outcome, is_loss
from worldflux_dist.distributed.ports import Roles
from worldflux_dist.distributed.session import Session
from worldflux_dist.replay.limiter import Limiter

EVALUATIONS = 3  # how often the last evaluation is tried


class Evaluations:
    """Owns the evaluation under way; one at a time, in a process of its own."""

    def __init__(self, session: Session, limiter: Limiter, roles: Roles, resumed: bool) -> None:
        self.session, self.limiter, self.roles = session, limiter, roles
        self.config, self.run = session.config, session.run
        self._under_way: tuple[int, ObjectRef] | None = None
        self._evaluated_at = -1
        if resumed:
            self._evaluated_at = self.run.last_score() // self.config.train.eval_every

    def when_due(self) -> None:
        """Start an evaluation when one is due, and take in the one that has finished."""
        if self._under_way is not None and ray.wait([self._under_way[1]], timeout=0)[0]:
            self._score()
        due = self.limiter.env_steps // self.config.train.eval_every
        if self._under_way is None and due > self._evaluated_at:
            self._start(random="random" not in self.run.methods())
            self._evaluated_at = due

    def finish(self) -> Outcome:
        """The last evaluation, the pictures and the verdict."""
        progress = self.session.progress
        progress.phase("evaluate")
        if self._under_way is not None:
            self._score()
        for _ in range(EVALUATIONS):
            self._start(random=True, pictures=True)
            if (found := self._score()) is not None:
                break
        else:
            raise RuntimeError(
                f"the last evaluation was lost {EVALUATIONS} times, perhaps because it ran out of "
                "memory; all is saved: run the same command again to evaluate"
            )
        progress.phase("figures")
        agent, random = found["agent"], found["random"]
        threshold = self.config.train.threshold
        self.run.draw(found.get("dream"), found.get("frames"), threshold, random.mean)
        passed = None
        if threshold is not None:
            passed = agent.mean >= threshold and agent.mean > random.mean
            progress.print(
                f"{'PASSED' if passed else 'FAILED'}: evaluated return {agent}, threshold "
                f"{threshold:g}; random policy {random}"
            )
        return Outcome(agent, random, passed)

    def _start(self, random: bool = False, pictures: bool = False) -> None:
        # The same seed every time: differences are the agent's, not the episodes'.
        request = EvaluationRequest(
            self.config.train.eval_episodes, self.config.seed + 1000, random, pictures
        )
        arrays = [group.agent_arrays() for group in self.roles.groups]
        evaluator = evaluate_remotely.options(**self.session.options["evaluator"][0])
        ref = evaluator.remote(self.config, self.session.task.spaces, request, *arrays)
        self._under_way = (self.limiter.env_steps, ref)

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
            self.session.progress.print(
                f"the evaluation at {env_steps:,} env steps was lost: {error}"
            )
            return None
        for key, method in (("random", "random"), ("agent", self.config.model)):
            if key in found:
                repeat = self.session.task.action_repeat
                self.run.score(env_steps, repeat, found[key].returns, method)
        self.session.progress.print(f"evaluation at {env_steps:,} env steps: {found['agent']}")
        return found
