"""What a user may say about replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from worldflux_dist.settings import Count, Positive, Scale, Settings, Whole, free

MAX_PRIORITIES = 4_000_000  # 11 bytes each, of the 64 MB that a checkpoint's manifest may have


@dataclass(frozen=True)
class ReplayConfig(Settings):
    """How much is kept, what a sample looks like, and how a shard's journal is written.

    `batch_size` windows of `batch_length` steps; at most `capacity` steps and, unless 0, at most
    `capacity_bytes` bytes of them (before packing); `online` trains each fresh segment once before
    all else. The rest of a batch is drawn in the shares `uniform`, `recent` (exponential in age,
    a tenth of the ring on average) and `prioritized`. `storage: lz4` keeps images packed in memory.
    The journal packs (`compress`) segments of about `segment_bytes`, writes them every
    `flush_every` seconds, and holds at most `pending_bytes` that are not on disk.
    """

    section: ClassVar[str] = "replay"

    batch_size: Count = 16
    batch_length: Annotated[int, Ge(2), Le(2**20)] = 64
    capacity: Annotated[int, Ge(1), Le(2**40)] = 1_000_000
    capacity_bytes: Whole = 0
    online: bool = True
    uniform: Scale = 1.0
    recent: Scale = 0.0
    prioritized: Scale = 0.0
    storage: Literal["raw", "lz4"] = free("raw")
    compress: Literal["lz4", "none"] = free("lz4")
    segment_bytes: Annotated[int, Ge(1), Le(2**30)] = free(16 << 20)
    flush_every: Positive = free(2.0)
    pending_bytes: Annotated[int, Ge(1), Le(2**40)] = free(256 << 20)

    def check(self) -> None:
        if self.capacity < 2 * self.batch_length:
            raise ValueError(
                f"replay.capacity {self.capacity} is too small: give it at least "
                f"{2 * self.batch_length} (batch_length is {self.batch_length})"
            )
        if self.prioritized and self.capacity // self.batch_length > MAX_PRIORITIES:
            raise ValueError(
                f"replay.prioritized keeps a number for each replay.batch_length steps in "
                f"checkpoints, and at most {MAX_PRIORITIES}: replay.capacity must be at most "
                f"{MAX_PRIORITIES * self.batch_length}"
            )
        if not any(self.shares):
            raise ValueError("replay.uniform, recent and prioritized are 0: one must be above 0")

    @property
    def shares(self) -> tuple[float, float, float]:
        return (self.uniform, self.recent, self.prioritized)
