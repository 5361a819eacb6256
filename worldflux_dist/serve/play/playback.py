"""Playing inside a dream: a record of the real environment, and dreams that leave one of its steps.

There are three ways to go on. Together: the environment and the dreams are given the same action.
Replay: within the record, the dreams are given the recorded actions. Branch: the dreams alone are
given other ones. What must stay true: `now` is the dreams' newest step, the record is changed by
going on in the environment alone, and what is shown follows from the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from worldflux_dist.agent import Agent
from worldflux_dist.envs import EnvConfig
from worldflux_dist.serve.controls import Controls, action_names
from worldflux_dist.serve.play.dreams import MAX_DREAMS, Dreams, Reader
from worldflux_dist.serve.play.record import Record

REPEATS_NOT = (
    "This environment does not repeat itself: the record stays as it was, and only the dream goes "
    "on from here."
)
FULL = "There is no memory for more: dream here (d) or begin another episode (n)."


class Playback:
    """One person's play. Owns the record, the dreams, and what was chosen last. `draws` is False
    where the environment is known not to draw itself."""

    def __init__(self, agent: Agent, config: EnvConfig, seed: int, draws: bool = True) -> None:
        self.agent, self.config = agent, config
        self.controls = Controls(agent.spaces, action_names(config))
        self.reader = Reader(agent)
        self.action = self.controls.flat(self.controls.describe()["first"])
        self.agent_steers, self.branching, self.notice = False, False, ""
        self.record = Record(self.reader, config, seed, draws)
        self.dreams = self._dreams(0)

    def _dreams(self, start: int, num: int = 1, sampling: bool = True) -> Dreams:
        return Dreams(self.reader, self.record.moments[start].posterior, start, num, sampling)

    @property
    def now(self) -> int:
        return self.dreams.now

    @property
    def mode(self) -> str:
        if self.branching:
            return "branch"
        return "replay" if self.now < self.record.end else "together"

    # ------------------------------------------------------------------------------- going on

    def step(self) -> None:
        """One step on, in the mode that it is in. Raises ValueError where there is none."""
        if self.dreams.full or (self.mode == "together" and self.record.full):
            raise ValueError(FULL)
        if self.mode == "replay":
            action = self.record.moments[self.now + 1].step.action
        elif self.mode == "together":
            if self.record.moments[-1].over:
                raise ValueError(
                    f"The episode ended after {self.record.end} steps: begin another (n) or let "
                    "the dream go on alone (b)."
                )
            action = self._chosen(self.record.moments[-1].posterior)
            self.record.act(action)
        else:
            action = self._chosen(self.dreams.steps[-1].state)
        self.dreams.step(action)

    def _chosen(self, state: Any) -> np.ndarray:
        if self.agent_steers:
            self.action = self.reader.choose(state)
        return self.action

    def back(self) -> None:
        """Take the last dreamt step back, or begin one step earlier."""
        if self.now > self.dreams.start:
            self.dreams.cut(self.now - 1)
        else:
            self.seek(self.now - 1)

    def rewind(self) -> None:
        """Back to where the dreams began, to act otherwise from the same moment."""
        self.dreams.cut(self.dreams.start)

    def seek(self, t: int) -> None:
        """Dream from step t of the record on."""
        t = min(max(t, 0), self.record.end)
        self.branching = False
        self.dreams = self._dreams(t, self.dreams.num, self.dreams.sampling)

    def branch(self) -> None:
        """Leave the record with the dreams, from its moment `now`; or come back to it."""
        if self.branching:
            self.seek(self.dreams.start)
        else:
            self.seek(self.now)
            self.branching = True

    def go_on(self) -> None:
        """Let the environment do what the dreams did: after it, the two go on together."""
        before = [moment.step.action for moment in self.record.moments[1 : self.dreams.start + 1]]
        if not self.record.go_on([*before, *(step.action for step in self.dreams.steps[1:])]):
            self.notice = REPEATS_NOT
            self.branching = True
            return
        self.branching = False
        if self.now > self.record.end:
            self.dreams.cut(self.record.end)
            self.notice = f"In the environment the episode ended after {self.record.end} steps."

    def new_episode(self) -> None:
        """Another record, of the next seed."""
        record = Record(self.reader, self.config, self.record.seed + 1, self.record.draws)
        self.record.close()
        self.record = record
        self.seek(0)

    def dream(self, num: int | None = None, sampling: bool | None = None) -> None:
        """The same dream once more, by so many dreams, with or without the family's draws."""
        num = self.dreams.num if num is None else min(max(num, 1), MAX_DREAMS)
        sampling = self.dreams.sampling if sampling is None else sampling
        self.dreams = self.dreams.again(num, sampling)

    def do(self, name: str, value: Any = None) -> bool:
        """What a page asks for. False with a notice where it went wrong, or not as asked."""
        self.notice = ""
        try:
            if name not in _COMMANDS:
                raise ValueError(f"There is no command {name!r:.40}.")
            _COMMANDS[name](self, value)
        except (ValueError, RuntimeError) as error:
            self.notice = f"{error}"
        return not self.notice

    def close(self) -> None:
        self.record.close()


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.40} is neither true nor false")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r:.40} is no whole number")
    return value


def _set(name: str, read: Callable[[Playback, Any], Any]) -> Callable[[Playback, Any], None]:
    return lambda play, value: setattr(play, name, read(play, value))


_COMMANDS: dict[str, Callable[[Playback, Any], Any]] = {
    "act": _set("action", lambda play, value: play.controls.flat(value)),
    "look": lambda play, _: None,
    "agent": _set("agent_steers", lambda play, value: _switch(value)),
    "step": lambda play, _: play.step(),
    "back": lambda play, _: play.back(),
    "rewind": lambda play, _: play.rewind(),
    "seek": lambda play, value: play.seek(_whole(value)),
    "dream": lambda play, _: play.seek(play.now),
    "branch": lambda play, _: play.branch(),
    "go_on": lambda play, _: play.go_on(),
    "episode": lambda play, _: play.new_episode(),
    "sampling": lambda play, value: play.dream(sampling=_switch(value)),
    "dreams": lambda play, value: play.dream(num=_whole(value)),
}
