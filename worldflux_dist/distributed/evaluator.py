"""Evaluations of a run and its last pictures, in processes of their own.

What must stay true: nothing that an environment does when it draws or ends costs a run its scores.
They are written down before anything is drawn, and what cannot be drawn is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError

from worldflux_dist.agent import Agent
from worldflux_dist.config import Config
from worldflux_dist.distributed.ending import Outcome, is_loss, sentence
from worldflux_dist.distributed.group import ActorGroup
from worldflux_dist.distributed.run import Pictures
from worldflux_dist.distributed.session import Session
from worldflux_dist.envs.base import FAULTS, warned, what
from worldflux_dist.evaluate import (
    Evaluation,
    NoPicturesError,
    episode_frames,
    evaluate,
    open_loop,
)
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.runner import EndlessEpisodeError
from worldflux_dist.spaces import Spaces

EVALUATIONS = 3  # how often the last evaluation is tried
DRAW_S = 600.0  # how long the pictures may take


class Evaluator:
    """Owns the evaluation under way of what `groups` learn; there is one at a time."""

    def __init__(self, session: Session, groups: Sequence[ActorGroup]) -> None:
        self.config, self.run, self.progress = session.config, session.run, session.progress
        self.session, self.groups, config = session, groups, session.config
        # The same seed every time: differences are the agent's, not the episodes'.
        self.seed, self.every = config.seed + 1000, config.train.eval_every
        self._under_way: tuple[int, ObjectRef] | None = None
        last = self.run.last_score()
        self._due = last // self.every if last >= 0 and self.every else -1

    def maybe_evaluate(self, env_steps: int) -> None:
        """Start an evaluation when one is due, and take in the one that has finished."""
        if self._under_way is not None and ray.wait([self._under_way[1]], timeout=0)[0]:
            self._score_on_the_way()
        if not self.every:
            return
        due = env_steps // self.every
        if self._under_way is None and due > self._due:
            self._start(env_steps, random="random" not in self.run.methods())
            self._due = due

    def finish(self, env_steps: int) -> Outcome:
        """The last evaluation, the pictures and the verdict."""
        self.progress.phase("evaluate")
        if self._under_way is not None:
            self._score_on_the_way()
        for _ in range(EVALUATIONS):
            self._start(env_steps, random=True)
            if (scores := self._score()) is not None:
                break
        else:
            raise RuntimeError(
                f"the last evaluation was lost {EVALUATIONS} times, perhaps out of memory; "
                "all is saved: run the same command again to evaluate"
            )
        self.progress.phase("figures")
        agent, random = scores["agent"], scores["random"]
        self._draw(random.mean)
        threshold, passed = self.config.train.threshold, None
        if threshold is not None:
            passed = agent.mean >= threshold and agent.mean > random.mean
            self.progress.print(
                f"{'PASSED' if passed else 'FAILED'}: evaluated return {agent}, threshold "
                f"{threshold:g}; random policy {random}"
            )
        return Outcome(agent, random, passed)

    def _start(self, env_steps: int, random: bool) -> None:
        episodes = self.config.train.eval_episodes
        self._under_way = (env_steps, self._call(_evaluate, self.seed, episodes, random))

    def _call(self, task: Any, *given: Any) -> ObjectRef:
        arrays = [group.agent_arrays() for group in self.groups]
        placed = task.options(**self.session.options["evaluator"][0])
        ref: ObjectRef = placed.remote(self.config, self.session.task.spaces, *given, *arrays)
        return ref

    def _score_on_the_way(self) -> None:
        """`_score`, where an episode without an end must not end the training."""
        try:
            self._score()
        except EndlessEpisodeError as error:
            self.progress.print(f"warning: {sentence(error)}")

    def _score(self) -> dict[str, Evaluation] | None:
        """Wait for the evaluation under way and write its scores down; None where it was lost with
        a process."""
        assert self._under_way is not None
        (env_steps, ref), self._under_way = self._under_way, None
        try:
            scores: dict[str, Evaluation] = ray.get(ref)
        except RayError as error:
            if not is_loss(error):
                raise
            self.progress.print(f"the evaluation at {env_steps:,} env steps was lost: {error}")
            return None
        for key, method in (("random", "random"), ("agent", self.config.model)):
            if key in scores:
                repeat = self.session.task.action_repeat
                self.run.score(env_steps, repeat, scores[key].returns, method)
        self.progress.print(f"evaluation at {env_steps:,} env steps: {scores['agent']}")
        return scores

    def _draw(self, random: float) -> None:
        """The curve and a video, or warnings of what could not be drawn."""
        pictures, ref = Pictures(), self._call(_draw, self.seed)
        try:
            pictures = ray.get(ref, timeout=DRAW_S)
        except GetTimeoutError:
            pictures.problems.append(f"no video, it took more than {DRAW_S:.0f} s")
            ray.cancel(ref, force=True)
        except RayError as error:
            lost = f"the process that draws was lost ({type(error).__name__})"
            pictures.problems.append(f"no video: {lost if is_loss(error) else sentence(error)}")
        drawn = self.run.draw(pictures, self.config.train.threshold, random)
        for problem in (*pictures.problems, *drawn):
            self.progress.print(f"warning: {problem}")


@ray.remote(num_cpus=0, max_retries=2)
def _evaluate(
    config: Config,
    spaces: Spaces,
    seed: int,
    episodes: int,
    random: bool,
    *arrays: dict[str, np.ndarray],
) -> dict[str, Evaluation]:
    """Returns of the agent, and of the random policy if asked for. Raises EndlessEpisodeError."""
    agent = _agent(config, spaces, seed, arrays)
    scores = {"agent": evaluate(agent, config.env, episodes, seed)}
    if random:
        scores["random"] = evaluate(None, config.env, episodes, seed)
    return scores


@ray.remote(num_cpus=0, max_retries=0)
def _draw(config: Config, spaces: Spaces, seed: int, *arrays: dict[str, np.ndarray]) -> Pictures:
    """A dream, where the family can show what it imagines, or else an episode."""
    dream, frames = None, None
    with warned() as problems:
        try:
            agent = _agent(config, spaces, seed, arrays)
            if agent.world_model.decodes_obs:
                dream = open_loop(agent, config.env, seed)
            else:
                frames = episode_frames(agent, config.env, seed, limit=200)
        except NoPicturesError:
            pass  # what kept it from drawing has been warned of
        except FAULTS as error:
            problems.append(f"no video: {what(error)}")
    return Pictures(dream, frames, problems)


def _agent(
    config: Config, spaces: Spaces, seed: int, arrays: Sequence[dict[str, np.ndarray]]
) -> Agent:
    keep_freed_memory()
    torch.set_num_threads(config.scale.runner_threads)
    torch.manual_seed(seed)
    agent = config.make_agent(spaces).to(config.learner.beside)
    for part in arrays:
        agent.load_arrays(part)
    return agent
