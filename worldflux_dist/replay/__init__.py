"""Experience on its way from env runners to learners: the buffer, and the pace at which it is read.

Numpy only, no Ray and no threads: a replay shard and the one-process loop use the same classes.
"""

from worldflux_dist.replay.buffer import ReplayBuffer, ReplayConfig
from worldflux_dist.replay.limiter import Limiter

__all__ = ["Limiter", "ReplayBuffer", "ReplayConfig"]
