"""A replay shard as a Ray actor. Its process loads neither torch nor an environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worldflux_dist import checkpoint
from worldflux_dist.data import Batch, Chunk
from worldflux_dist.replay.buffer import ReplayBuffer, ReplayConfig


def shard_name(index: int) -> str:
    """The name by which runners find a shard, in the namespace of their run."""
    return f"replay-{index}"


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds after an insert."""

    num_steps: int
    nbytes: int
    ready: bool


class ReplayShardActor:
    """One shard of the replay. A restarted one continues from the newest checkpoint's copy."""

    def __init__(self, config: ReplayConfig, seed: int, checkpoints: Path, name: str) -> None:
        self.buffer = ReplayBuffer(config, seed)
        found = checkpoint.newest(checkpoints, name)
        if found is not None:
            self.buffer.restore(found[0] / name)

    def add(self, chunk: Chunk) -> ShardReport:
        """Store a chunk, once: a re-sent one is acknowledged and not stored again."""
        self.buffer.add(chunk)
        return self.report()

    def sample(self) -> Batch | None:
        """None where a restart has left too little to sample from."""
        return self.buffer.sample() if self.buffer.ready else None

    def report(self) -> ShardReport:
        return ShardReport(self.buffer.num_steps, self.buffer.nbytes, self.buffer.ready)

    def save(self, folder: Path) -> None:
        self.buffer.save(folder)
