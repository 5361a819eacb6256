"""What a user may say about replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReplayConfig:
    """How much is kept, what a sample looks like, and how a shard's journal is written.

    `batch_size` windows of `batch_length` steps; at most `capacity` steps and, unless 0, at most
    `capacity_bytes` bytes of them (before packing); `online` trains each fresh segment once before
    all else. The rest of a batch is drawn in the shares `uniform`, `recent` (exponential in age,
    a tenth of the ring on average) and `prioritized`. `storage: lz4` keeps images packed in memory.
    The journal packs (`compress`) segments of about `segment_bytes`, writes them every
    `flush_every` seconds, and holds at most `pending_bytes` that are not on disk.
    """

    batch_size: int = 16
    batch_length: int = 64
    capacity: int = 1_000_000
    capacity_bytes: int = 0
    online: bool = True
    uniform: float = 1.0
    recent: float = 0.0
    prioritized: float = 0.0
    storage: Literal["raw", "lz4"] = "raw"
    compress: Literal["lz4", "none"] = "lz4"
    segment_bytes: int = 16 << 20
    flush_every: float = 2.0
    pending_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "batch_length": 2, "capacity_bytes": 0, "segment_bytes": 1}
        least |= {"capacity": 2 * self.batch_length, "pending_bytes": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(
                    f"replay {name} {getattr(self, name)} is too small: give it at least {limit} "
                    f"(batch_length is {self.batch_length})"
                )
        if not 0 < self.flush_every < math.inf:
            raise ValueError(f"replay flush_every {self.flush_every} must be seconds above 0")
        if not (min(self.shares) >= 0 and 0 < sum(self.shares) < math.inf):
            raise ValueError(
                f"replay shares uniform, recent, prioritized are {self.shares}: give numbers of 0 "
                "or more, one of them above 0"
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        return (self.uniform, self.recent, self.prioritized)
