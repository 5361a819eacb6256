"""RLlib's episodes, where callbacks or recordings need them: made from steps, and into steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from worldflux_dist.data import Chunk, Step
from worldflux_dist.envs import Envs
from worldflux_dist.envs.single import check_obs
from worldflux_dist.spaces import Spaces

OFFLINE = "recorded"  # the writer of chunks that were recorded before


class CallbackEpisodes:
    """Builds the episodes of N environments, step by step, and calls the callbacks for them."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.episodes: list[Any] = []

    def watch(self, envs: Envs) -> WatchedEnvs:
        """Environments whose steps are seen here; earlier episodes are forgotten."""
        self.episodes = [None] * envs.num_envs
        return WatchedEnvs(envs, self)

    def see(self, envs: Envs, action: Any, step: Step) -> None:
        """What came out of one step of all environments."""
        obs, infos = envs.last
        for lane in range(envs.num_envs):
            own, info = _lane(obs, lane), _info(infos, lane)
            if step.is_first[lane] or self.episodes[lane] is None:
                self.runner._new_episode(lane, self.episodes)
                self.episodes[lane].add_env_reset(own, info)
                self._call("on_episode_start", lane)
                continue
            self.episodes[lane].add_env_step(
                own,
                _lane(action, lane),
                float(step.reward[lane]),
                infos=info,
                terminated=bool(step.is_terminal[lane]),
                truncated=bool(step.is_last[lane] and not step.is_terminal[lane]),
            )
            self._call("on_episode_step", lane)
            if step.is_last[lane]:
                self._call("on_episode_end", lane)
                self.runner._ongoing_episodes_for_metrics.clear()

    def _call(self, which: str, lane: int) -> None:
        self.runner._make_on_episode_callback(which, lane, self.episodes)


class WatchedEnvs:
    """`Envs` whose steps a `CallbackEpisodes` sees."""

    def __init__(self, envs: Envs, seen: CallbackEpisodes) -> None:
        self.envs, self.seen = envs, seen
        self.num_envs, self.spaces = envs.num_envs, envs.spaces

    def step(self, action: np.ndarray) -> Step:
        step = self.envs.step(action)
        self.seen.see(self.envs, self.spaces.decode_action(action), step)
        return step


def read_episodes(paths: Iterable[str]) -> Iterator[tuple[str, SingleAgentEpisode]]:
    """Episodes that RLlib recorded with `offline_data(output=..., output_write_episodes=True)`,
    each with its name: the file and the number in it.

    `paths` are Parquet files or folders of them. Raises ValueError where there are none, and for a
    file or an episode that cannot be read or holds numbers that are not finite in float32.
    """
    for path in map(Path, paths):
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise ValueError(
                f"offline_data: there are no Parquet files in {path}: record some with "
                "offline_data(output=..., output_write_episodes=True)"
            )
        for file in files:
            for number, item in enumerate(_items(file)):
                name = f"episode {number} of {file}"
                yield name, _episode(name, item)


def _items(file: Path) -> list[Any]:
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(
            f"offline_data: {file} cannot be read ({what}): record it again, or leave it out"
        ) from None
    if "item" not in table.column_names:
        raise ValueError(
            f"offline_data: {file} has the columns {', '.join(table.column_names)} and "
            "not RLlib's episodes: record with output_write_episodes=True"
        )
    items: list[Any] = table["item"].to_pylist()
    return items


def _episode(name: str, item: Any) -> SingleAgentEpisode:
    try:
        episode = SingleAgentEpisode.from_state(_unpacked(item))
        parts = {
            "observations": episode.get_observations(),
            "actions": episode.get_actions(),
            "rewards": episode.get_rewards(),
        }
        bad = [part for part, values in parts.items() if not _finite(values)]
    except Exception as error:  # msgpack and RLlib raise anything on bytes that are something else
        raise ValueError(
            f"offline_data: {name} cannot be read ({error!r}): record it again, or leave it out"
        ) from None
    if bad:
        raise ValueError(
            f"offline_data: {name} has {' and '.join(bad)} that are not finite (NaN, or beyond "
            "float32): leave it out, or record it again"
        )
    return episode


def _unpacked(item: bytes) -> dict[str, Any]:
    """An episode's state from its bytes, in which objects, as pickle has them, are not read."""
    import msgpack  # with the next, an extra: RLlib records with them
    import msgpack_numpy

    def plain(value: dict[Any, Any]) -> Any:
        """An array as msgpack_numpy writes it, of plain numbers: it would unpickle all others."""
        kind = value.get(b"type")
        if b"nd" in value and not re.fullmatch(r"[|<>]?[biuf]\d{1,2}", str(kind)):
            raise ValueError("it holds an array of objects")
        return msgpack_numpy.decode(value)

    state = msgpack.unpackb(item, object_hook=plain, strict_map_key=False)
    if not isinstance(state, dict):
        raise ValueError("it is no episode")
    return state


def _finite(nested: Any) -> bool:
    """Whether all numbers are finite in float32, which is what replay holds."""
    if isinstance(nested, dict):
        return all(map(_finite, nested.values()))
    if isinstance(nested, tuple | list):
        return all(map(_finite, nested))
    value = np.asarray(nested)
    with np.errstate(over="ignore"):
        return value.dtype.kind != "f" or bool(np.isfinite(value.astype(np.float32)).all())


def to_chunk(
    episode: SingleAgentEpisode,
    spaces: Spaces,
    stream: int,
    number: int,
    normalized: bool = False,
    name: str = "an episode",
) -> Chunk:
    """One recorded episode, or a part of one, as a chunk (1, T + 1) of `stream`.

    A part that begins in mid-episode loses its first observation's past: it counts as a beginning.
    `normalized` is said of the actions, see `Spaces.encode_action`. Raises ValueError, with `name`,
    for an episode of another environment.
    """
    length = len(episode)
    action = np.zeros((length + 1, spaces.action_dim), np.float32)
    reward = np.zeros(length + 1, np.float32)
    try:
        raw = _stack(episode.get_observations())
        check_obs(spaces.observation, _lane(raw, 0))
        obs = spaces.encode_obs(raw)
        action[1:] = spaces.encode_action(_stack(episode.get_actions()), normalized)
        reward[1:] = episode.get_rewards()
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"offline_data: {name} does not fit this environment ({error!r}): give the path of "
            "episodes that were recorded in it"
        ) from None
    first, last, terminal = np.zeros((3, length + 1), bool)
    first[0] = True
    last[-1] = True  # what follows in the stream is another episode, or another part
    terminal[-1] = episode.is_terminated
    columns = {f"obs/{key}": value for key, value in obs.items()}
    columns |= {"action": action, "reward": reward}
    columns |= {"is_first": first, "is_last": last, "is_terminal": terminal}
    columns = {name: value[None] for name, value in columns.items()}
    chunk = Chunk.from_columns(
        columns, streams=np.array([stream]), key=(f"{OFFLINE}-{stream}", OFFLINE, number)
    )
    chunk.check()
    return chunk


def _stack(values: Any) -> Any:
    """A list of observations or actions, or what is stacked already, as a batch."""
    if not isinstance(values, list):
        return values
    if isinstance(values[0], dict):
        return {key: _stack([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple | list):  # a tuple comes out of a file as a list
        return tuple(_stack([value[i] for value in values]) for i in range(len(values[0])))
    return np.stack(values)


def _lane(batch: Any, lane: int) -> Any:
    if isinstance(batch, dict):
        return {key: _lane(part, lane) for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_lane(part, lane) for part in batch)
    return batch[lane]


def _info(infos: Any, lane: int) -> dict[str, Any]:
    """One environment's part of a vector environment's infos: `_key` says who has `key`."""
    if isinstance(infos, list):
        return infos[lane]
    return {
        key: _info(value, lane) if isinstance(value, dict) else value[lane]
        for key, value in infos.items()
        if not key.startswith("_") and f"_{key}" in infos and infos[f"_{key}"][lane]
    }
