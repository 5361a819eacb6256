"""The record of one real episode: its steps, the agent's posteriors, and pictures.

What must stay true: the record never changes but at its end, and a record that is repeated up to
some step has been seen to be the same up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.data import Step
from worldflux_dist.envs import EnvConfig, Envs, make_envs
from worldflux_dist.models.base import State
from worldflux_dist.serve.play.dreams import MEMORY, Reader
from worldflux_dist.serve.play.pictures import Picture


@dataclass(frozen=True)
class Moment:
    """One recorded step (N = 1), the agent's posterior after it (1 row) and the value of that;
    `drawn` is the environment's own picture, where it draws and no image is observed."""

    step: Step
    posterior: State
    value: float
    drawn: Picture | None

    @property
    def over(self) -> bool:
        return bool(self.step.is_last[0])


class Record:
    """Owns the environment of one episode, which stands at the last of `moments`.

    `draws` says whether the environment has pictures of its own that are wanted. One that could not
    draw is not asked again: without a display MuJoCo waits for ever the second time.
    """

    def __init__(self, reader: Reader, config: EnvConfig, seed: int, draws: bool = True) -> None:
        self.config, self.seed = config, seed
        self.draws = draws and not reader.agent.spaces.images
        self._agent: Agent = reader.agent
        self._reader = reader
        self.moments: list[Moment] = []
        self._envs = self._make()
        self._add(self._envs.step(self._nothing))
        self.draws = self.moments[0].drawn is not None

    @property
    def _nothing(self) -> np.ndarray:
        return np.zeros((1, self._agent.spaces.action_dim), np.float32)

    def _make(self) -> Envs:
        return make_envs(self.config, self.seed, num_envs=1, render=self.draws)

    @property
    def end(self) -> int:
        """The newest step."""
        return len(self.moments) - 1

    @property
    def full(self) -> bool:
        """Whether it has used up its memory."""
        states = self.moments[-1].posterior.tensors.values()
        size = sum(x.nbytes for x in states) + self.moments[-1].step.nbytes
        return size * len(self.moments) > MEMORY

    def truth(self, t: int) -> np.ndarray:
        """The observation (*shape) of step t that is shown."""
        seen: np.ndarray = self.moments[t].step.obs[self._reader.key][0]
        return seen

    def picture(self, t: int) -> Picture | None:
        return Picture.of(self.truth(t)) if self._agent.spaces.images else self.moments[t].drawn

    def act(self, action: np.ndarray) -> None:
        """Go on in the environment with a flat action (1, A)."""
        assert not self.moments[-1].over, "the episode is over"
        self._add(self._envs.step(action))

    @torch.no_grad()
    def _add(self, step: Step) -> None:
        model = self._agent.world_model
        if self.moments:
            went_in = torch.as_tensor(step.action, device=self._agent.device)
            posterior = model.update(self.moments[-1].posterior, went_in, step.obs)
        else:
            posterior = model.encode(step.obs)
        frame = self._envs.render() if self.draws else None
        drawn = None if frame is None else Picture.of(frame)
        value = float(self._reader.value(posterior)[0])
        self.moments.append(Moment(step, posterior, value, drawn))

    def go_on(self, actions: Sequence[np.ndarray]) -> bool:
        """Let the episode be the one of these actions (1, A): a fresh environment of the same seed
        repeats what they share with the record and goes on from there.

        False, with the record as it was, where the environment does not repeat itself.
        """
        same = 0
        while same < min(len(actions), self.end) and np.array_equal(
            actions[same], self.moments[same + 1].step.action
        ):
            same += 1
        if same == len(actions) == self.end:
            return True
        envs = self._make()
        for t in range(same + 1):
            step = envs.step(actions[t - 1] if t else self._nothing)
            if not _equal(step, self.moments[t].step):
                envs.close()
                return False
        self._envs.close()
        self._envs = envs
        del self.moments[same + 1 :]
        for action in actions[same:]:
            if self.moments[-1].over:
                break
            self.act(action)
        return True

    def close(self) -> None:
        self._envs.close()


def _equal(one: Step, other: Step) -> bool:
    theirs = other.columns()
    return all(np.array_equal(value, theirs[name]) for name, value in one.columns().items())
