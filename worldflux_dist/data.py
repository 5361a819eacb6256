"""The data everyone shares, and the one time convention. Numpy only; everything else stands on it.

A *Step* is one env.step call: the action that went in, and everything that came out.

    t            0            1                  2
    action       (zeros)      a1                 a2              went in
    obs          o0           o1                 o2              came out
    reward       0            r1                 r2
    is_first     1            0                  0               is_last, is_terminal come out too
    state        encode(o0)   update(s0,a1,o1)   update(s1,a2,o2)

`state[t]`, `action[t]` and `reward[t]` belong together and nothing shifts afterwards. The last
observation of an episode is stored. `is_last and not is_terminal` is a truncation: values
bootstrap there. A reset is a Step too (`is_first`), so `env_steps` counts it.

Shape letters: B batch, T time, N envs (or imagined starts), H horizon, A action, F features.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

FLAGS = ("is_first", "is_last", "is_terminal")
COLUMNS = ("action", "reward", *FLAGS)  # beside the observations


@dataclass
class Steps:
    """Columns of steps with any leading shape; the fields of Step, Chunk and Batch.

    obs maps names to arrays (..., *shape); action (..., A) float32; reward (...) float32; the
    three flags (...) bool. The same class carries torch tensors once a learner has made them.
    """

    obs: dict[str, Any]
    action: Any
    reward: Any
    is_first: Any
    is_last: Any
    is_terminal: Any

    def columns(self) -> dict[str, Any]:
        """Flat mapping of column names to arrays; observations are named `obs/<key>`."""
        named = {f"obs/{key}": value for key, value in self.obs.items()}
        return named | {name: getattr(self, name) for name in COLUMNS}

    @classmethod
    def from_columns(cls, columns: dict[str, Any], **more: Any) -> Self:
        obs = {name[4:]: value for name, value in columns.items() if name.startswith("obs/")}
        rest = {name: columns[name] for name in COLUMNS}
        return cls(obs=obs, **rest, **more)

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Apply `function` to every column, keeping whatever else the class carries."""
        columns = {name: function(value) for name, value in self.columns().items()}
        names = {f.name for f in fields(self)} - {"obs", *COLUMNS}
        return type(self).from_columns(columns, **{name: getattr(self, name) for name in names})

    def rows(self, index: Any) -> Self:
        """The selected rows of the leading axis."""
        return self.map(lambda value: value[index])

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.columns().values())


class Step(Steps):
    """One step of N environments: leading shape (N,)."""


@dataclass
class Chunk(Steps):
    """T consecutive steps of N environments: leading shape (N, T).

    `streams` (N,) names the environment each row comes from; rows of one stream follow each other
    from chunk to chunk. `version` is that of the oldest weights that acted in it. `key` =
    (writer, incarnation, seq) names the chunk for good, so that a re-sent one is known.
    """

    streams: Any = None
    version: int = 0
    key: tuple[str, str, int] = ("", "", 0)

    @property
    def num_steps(self) -> int:
        return int(self.reward.size)

    def rows(self, index: Any) -> Chunk:
        """The chunk of the selected environments only."""
        return replace(super().rows(index), streams=self.streams[index])

    def check(self) -> None:
        """Assert the time convention."""
        first, last = self.is_first, self.is_last
        assert not (self.is_terminal & ~last).any(), "is_terminal without is_last"
        assert not self.action[first].any(), "the action that goes into a reset is zero"
        assert not self.reward[first].any(), "a reset has no reward"
        assert (last[:, :-1] <= first[:, 1:]).all(), "is_first follows is_last"


class Batch(Steps):
    """What a learner trains on: leading shape (B, T). Rows may begin in mid-episode."""


def new_incarnation() -> str:
    """A name for one life of a writer: a restarted writer counts its chunks anew."""
    return uuid.uuid4().hex[:12]
