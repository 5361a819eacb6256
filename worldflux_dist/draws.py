"""The random numbers of a call, all of them from its seed: the same in any process, whoever else is
in its batch. A stream's numbers do not depend on how many another one gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldflux_dist.spaces import ActionPart

STREAMS = ("start", "look", "transition", "action")


def generator(seed: int, stream: str) -> np.random.Generator:
    """The stream's numbers from a seed of 0 .. 2^64 - 1."""
    return np.random.Generator(np.random.Philox([seed, STREAMS.index(stream)]))


def uniform(seed: int, stream: str, *shape: int) -> np.ndarray:
    """Float32 in [0, 1) of a shape."""
    return generator(seed, stream).random(shape, np.float32)


def action_noise(seed: int, parts: Sequence[ActionPart], *lead: int) -> np.ndarray:
    """What fixes sampled actions (*lead, A), as `nn.distributions.action_noise` draws it."""
    source, drawn = generator(seed, "action"), []
    for part in parts:
        draw = source.standard_normal if part.kind == "continuous" else source.random
        drawn.append(draw((*lead, part.size), np.float32))
    return np.concatenate(drawn, -1)
