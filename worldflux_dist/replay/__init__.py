"""Experience on its way from env runners to learners: the buffer, and the pace at which it is read.

No Ray and no torch: a replay shard and the one-process loop use the same classes, and
the journal brings a shard back after its process has died.
"""

from worldflux_dist.replay.buffer import ReplayBuffer
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.replay.journal import FencedError
from worldflux_dist.replay.limiter import Limiter
from worldflux_dist.replay.shard import ReplayShard, ShardReport

__all__ = ["FencedError", "Limiter", "ReplayBuffer", "ReplayConfig", "ReplayShard", "ShardReport"]
