"""Runs whose processes are killed, and proof of what is left of their replay.

Every observation of NumberedEnv says where it belongs: which object made it, in which episode and
at which step. With the chunk's own number this leaves exactly one place for each row on disk.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
from gymnasium import spaces
from toy_run import PATIENCE_S, ToyRun

from worldflux_dist import checkpoint, storage
from worldflux_dist.data import Chunk
from worldflux_dist.replay import ReplayConfig, ReplayShard
from worldflux_dist.replay.journal import INDEX
from worldflux_dist.replay.marks import Key
from worldflux_dist.replay.segment import read_segment

EPISODE = 9  # actions; the reset is one more row
LENGTH = 8  # steps of a chunk
RATIO = 4
ENDLESS = (
    "env.id=fault_runs:NumberedEnv",
    "env.kwargs.pause=0.004",
    "env.num_envs=2",
    "train.env_steps=10_000_000",
    "train.eval_every=0",
    "train.eval_episodes=1",
    "train.threshold=null",
    "train.prefill=128",
    f"train.train_ratio={RATIO}",
    "train.checkpoint_every=1",
    f"scale.chunk_length={LENGTH}",
    "replay.batch_size=16",
    "replay.capacity=1_000_000",
    "replay.flush_every=0.2",
    "learner.device=cpu",
    "learner.threads=1",
)
BATCH_STEPS = 16 * 6
TWO_IN_ACTORS = (
    "imagination.mode=actors",
    "imagination.num_imaginers=2",
    "imagination.num_policy_learners=2",
    "scale.num_learners=2",
)
Shards = list[list[Chunk]]  # the chunks of each shard, in the order they were stored
Line = dict[str, float]


class NumberedEnv(gymnasium.Env):
    """Observes (name of this object in two numbers, episode, step); `pause` seconds a step.

    Episodes end after EPISODE steps, by turns at a terminal state and by truncation.
    """

    observation_space = spaces.Box(0, 2**24, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, pause: float = 0.0) -> None:
        self._pause = pause
        self._life = [random.SystemRandom().randrange(2**24) for _ in range(2)]  # whole in float32
        self._episode = -1

    def _numbers(self) -> np.ndarray:
        return np.array([*self._life, self._episode, self._step], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._numbers(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(self._pause)
        self._step += 1
        ended, terminal = self._step == EPISODE, self._episode % 2 == 0
        return self._numbers(), float(action), ended and terminal, ended and not terminal, {}


# --------------------------------------------------------------------------- what is on disk


def live_shards(run_dir: Path) -> Shards:
    """All chunks that a shard killed at this moment would come back with."""
    return [_live_shard(run_dir / "replay", folder) for folder in shard_folders(run_dir)]


def shard_folders(run_dir: Path) -> list[Path]:
    """The folders of the newest life's shards."""
    lives = sorted((run_dir / "replay").glob("[0-9]*"))
    return sorted(lives[-1].glob("shard-*")) if lives else []


def _live_shard(root: Path, folder: Path) -> list[Chunk]:
    index = storage.read_json(folder / INDEX)
    names = [segment["name"] for segment in index.get("segments", [])]
    own = sorted(f"{folder.parent.name}/{folder.name}/{p.name}" for p in folder.glob("*.seg"))
    return _read(root, names + [name for name in own if name >= index.get("oldest_open", "")])


def saved_shards(run_dir: Path, manifest: dict[str, Any]) -> Shards:
    """All chunks that a checkpoint's manifest names."""
    states = manifest["counters"]["shards"]
    names = [[segment["name"] for segment in state["segments"]] for state in states]
    return [_read(run_dir / "replay", each) for each in names]


def _read(root: Path, names: Iterable[str]) -> list[Chunk]:
    return [chunk for name in names for chunk in read_segment((root / name).read_bytes())[1]]


def newest(run_dir: Path) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint and its manifest."""
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    return found


def keys(shards: Shards) -> set[Key]:
    return {chunk.key for chunks in shards for chunk in chunks}


def lives(shards: Shards) -> set[tuple[str, str]]:
    """Writers and their incarnations."""
    return {(writer.split("/")[0], incarnation) for writer, incarnation, _ in keys(shards)}


def rows(shards: Shards) -> set[tuple[float, ...]]:
    """The observations, each of which there is once."""
    return {tuple(row) for c in _all(shards) for row in c.obs["obs"].reshape(-1, 4).tolist()}


def _all(shards: Shards) -> list[Chunk]:
    return [chunk for chunks in shards for chunk in chunks]


def check_shards(shards: Shards) -> None:
    """No key twice in a shard, no row twice, every row where its chunk's number puts it, and no
    writer that went back to older weights."""
    num_rows = 0
    for index, chunks in enumerate(shards):
        twice = [key for key, num in Counter(c.key for c in chunks).items() if num > 1]
        assert not twice, twice
        for chunk in chunks:
            assert (chunk.streams % len(shards) == index).all(), (chunk.key, chunk.streams)
            _check_chunk(chunk)
            num_rows += chunk.num_steps
    assert len(rows(shards)) == num_rows
    made_by: dict[tuple[float, ...], tuple[str, str, int]] = {}
    for chunk in _all(shards):
        for stream, life in zip(chunk.streams.tolist(), chunk.obs["obs"][:, 0, :2], strict=True):
            writer = (chunk.key[0].split("/")[0], chunk.key[1], stream)
            assert made_by.setdefault(tuple(life.tolist()), writer) == writer
    acted: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for chunk in _all(shards):
        acted.setdefault(chunk.key[:2], []).append((chunk.key[2], chunk.version))
    for life, found in acted.items():
        versions = [version for _, version in sorted(found)]
        assert versions == sorted(versions), life


def _check_chunk(chunk: Chunk) -> None:
    obs = chunk.obs["obs"].astype(int)  # (N, T, 4)
    assert (obs[..., :2] == obs[:, :1, :2]).all(), "one chunk of two environments"
    ticks = obs[..., 2] * (EPISODE + 1) + obs[..., 3]
    assert (ticks == chunk.key[2] * LENGTH + np.arange(LENGTH)).all(), (chunk.key, ticks)
    assert (chunk.is_first == (obs[..., 3] == 0)).all()
    assert (chunk.is_last == (obs[..., 3] == EPISODE)).all()


def restored(
    run_dir: Path, manifest: dict[str, Any], root: Path, life: str, settings: ReplayConfig
) -> Iterator[ReplayShard]:
    """The shards of a checkpoint as they come back, one by one, in a folder of their own."""
    states = manifest["counters"]["shards"]
    for segment in (segment for state in states for segment in state["segments"]):
        (root / segment["name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir / "replay" / segment["name"], root / segment["name"])
    for index in range(len(states)):
        shard = ReplayShard(settings, 0, root, life, index, len(states), states)
        yield shard
        shard.close()


def next_ids(
    run_dir: Path, manifest: dict[str, Any], root: Path, life: str, settings: ReplayConfig
) -> Iterator[Any]:
    """For each shard, the blocks and steps of the next batches."""
    for shard in restored(run_dir, manifest, root, life, settings):
        found = [shard.buffer.sample_with_ids(16) for _ in range(5)]
        yield [np.column_stack([ids, batch.obs["obs"][:, 0]]) for batch, ids in found]


def check_windows(shard: ReplayShard) -> int:
    """Nothing is missing inside a window, and an abandoned episode ends as a truncation. Gives the
    number of those ends that were seen."""
    batch = shard.buffer.sample(20_000)
    obs, last, first = batch.obs["obs"].astype(int), batch.is_last, batch.is_first
    assert (last[:, :-1] == first[:, 1:]).all()
    ticks = obs[..., 2] * (EPISODE + 1) + obs[..., 3]
    same = (obs[:, 1:, :2] == obs[:, :-1, :2]).all(-1)
    assert (same | first[:, 1:]).all()
    assert ((np.diff(ticks) == 1) | first[:, 1:] | ~same).all()
    abandoned = last & (obs[..., 3] < EPISODE)
    assert not batch.is_terminal[abandoned].any()
    return int((abandoned[:, :-1] & ~same).sum())


def owe(run_dir: Path, debt: int) -> None:
    """Write the newest checkpoint anew, with another debt."""
    root = run_dir / "checkpoints"
    folder, manifest = newest(run_dir)
    fresh = checkpoint.begin(root, manifest["step"])
    for name in manifest["files"]:
        shutil.copy(folder / name, fresh / name)
    counters = manifest["counters"]
    counters["limiter"]["debt"] = str(debt)
    checkpoint.commit(root, fresh, manifest["step"], 2, counters)


def missing(shards: Shards) -> set[Key]:
    """Chunks that are not there although a later one of the same writer is."""
    seqs: dict[tuple[str, str], set[int]] = {}
    for writer, incarnation, seq in keys(shards):
        seqs.setdefault((writer, incarnation), set()).add(seq)
    return {(*life, seq) for life, found in seqs.items() for seq in set(range(max(found))) - found}


# ------------------------------------------------------------------------------------ the run


class FaultRun(ToyRun):
    """A run of the numbered environment that ends only when it is told to."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        super().__init__(folder, *ENDLESS, *overrides)

    def wait_until(self, true: Callable[[], Any], what: str) -> Any:
        """Wait for something that is true, and give it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := true()):
            assert self.running, f"ended before {what}: {self.output}"
            assert time.monotonic() < deadline, f"waited for {what} in vain: {self.output}"
            time.sleep(0.1)
        return found

    def next_manifest(self) -> dict[str, Any]:
        """The manifest of a checkpoint that was put in place from now on."""
        step = self.checkpoint_steps()[-1]
        while True:
            step = self.wait_for_checkpoint(step)
            try:
                return checkpoint.verify(self.checkpoint_path(step))
            except (storage.CheckpointError, FileNotFoundError):
                assert step < self.checkpoint_steps()[-1]  # a later one has made the run remove it

    def lines(self) -> list[Line]:
        """Whole lines of metrics so far."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def last(self) -> Line:
        return (self.lines() or [{}])[-1]

    def wait_for_line(self, what: str, true: Callable[[Line], bool], after: float = 0.0) -> Line:
        """The first line since the time `after` of which something is true."""
        return self.wait_until(
            lambda: next((x for x in self.lines() if x["time"] > after and true(x)), None), what
        )

    def wait_for_training(self, after: float = 0.0, steps: int = 8) -> Line:
        """The first line that has `steps` more gradient steps than the first one since `after`."""
        first = self.wait_for_line("metrics", lambda _: True, after)["gradient_steps"]
        return self.wait_for_line("training", lambda x: x["gradient_steps"] >= first + steps, after)

    def started(self, role: str) -> list[psutil.Process]:
        """Processes of a role that are past their constructor."""
        starting = {process.pid for process in self.processes(f"ray::{role}.__init__")}
        return [p for p in self.processes(f"ray::{role}") if p.pid not in starting]


def kill(victim: psutil.Process) -> float:
    """SIGKILL; gives the time of it, in seconds since the epoch."""
    now = time.time()
    victim.kill()
    return now


def note_recovery(what: str, seconds: float, **more: Any) -> None:
    """Print a recovery time, and append it as JSON to the file WORLDFLUX_RECOVERY_LOG names."""
    line = json.dumps({"what": what, "seconds": round(seconds, 2), **more})
    print(f"recovery: {line}")
    if path := os.environ.get("WORLDFLUX_RECOVERY_LOG"):
        with Path(path).open("a") as file:
            file.write(line + "\n")


def runner_back(run: FaultRun, since: float, before: Shards) -> float:
    """Wait until a new life of a runner has a chunk on disk; seconds since the kill."""
    known = lives(before)
    run.wait_until(lambda: lives(live_shards(run.run_dir)) - known, "a runner's new life")
    return time.time() - since


def shard_back(run: FaultRun, since: float, owners: dict[Path, str]) -> float:
    """Wait until a shard has a new owner and on disk what that one was sent; seconds."""
    run.wait_until(lambda: stores_again(run.run_dir, since, owners), "a shard that stores")
    return time.time() - since


def stores_again(run_dir: Path, since: float, owners: dict[Path, str]) -> bool:
    """Whether a shard has another owner than before, who has written since."""
    changed = [f for f, owner in shard_owners(run_dir).items() if owners.get(f) != owner]
    return any(_newer(path, since) for folder in changed for path in folder.glob("*.seg"))


def _newer(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def shard_owners(run_dir: Path) -> dict[Path, str]:
    """Which process writes each shard's folder."""
    return {f: storage.read_json(f / INDEX)["owner"] for f in shard_folders(run_dir)}


def learner_back(run: FaultRun, since: float, restarts: float) -> float:
    """Wait until a group was started again and steps on; seconds until its first steps are seen."""
    again = run.wait_for_line(
        "a learner's restart", lambda x: x["restarts/learner"] > restarts, since
    )
    run.wait_for_line(
        "steps after it",
        lambda x: (
            x["gradient_steps"] > again["gradient_steps"]
            and x["weights_version"] > again["weights_version"]
        ),
        since,
    )
    return again["time"] - since


def store_back(run: FaultRun, since: float) -> float:
    """Wait until runners act with weights published after the kill; seconds."""
    version = run.wait_for_line("metrics", lambda _: True, since)["gradient_steps"]

    def newer() -> bool:
        return any(c.version > version for c in _all(live_shards(run.run_dir)))

    run.wait_until(newer, "weights from the new store")
    return time.time() - since


def check_counters(lines: Sequence[Line]) -> None:
    """Counters never go back."""
    names = ("env_steps", "gradient_steps", "episodes", "weights_version", "gradient_steps/redone")
    for name in names:
        values = [line[name] for line in lines]
        assert values == sorted(values), name


def check_ratio(line: Line, runners: int, envs: int = 2) -> None:
    """No gradient step before it is owed, and no more owed than the limiter lets be."""
    per_step, request = RATIO / BATCH_STEPS, runners * envs * LENGTH
    done = line["gradient_steps"] - line["gradient_steps/redone"]
    owed = line["env_steps"] * per_step - done
    assert -1e-6 <= owed <= 17 + 3 * request * per_step, (owed, line)
