"""What is shown of a playback: numbers for its curves, pictures, and a clip.

What must stay true: each view is whole. Who misses one has missed nothing once the next is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from worldflux_dist.serve.play.pictures import Picture, clip, mosaic, shaded
from worldflux_dist.serve.play.playback import Playback

WINDOW = 160  # steps that curves show
MAX_DIMS = 5  # of a vector
CLIP_CONTEXT, CLIP_LENGTH = 5, 200  # steps of a clip before the dream, and at most


def about(play: Playback, name: str) -> dict[str, Any]:
    """What does not change: of what run this is, and how it is steered."""
    model = play.agent.world_model
    return {
        "title": name,
        "controls": play.controls.describe(),
        "draws": model.noise_shape is not None,
        "pictures": bool(play.agent.spaces.images) and model.decodes_obs,
        "sentence": ""
        if model.decodes_obs
        else f"{play.agent.recipe['model']} does not decode observations: it draws no "
        "pictures, and its dream is the curves.",
    }


def numbers(play: Playback) -> dict[str, Any]:
    """All that is to be drawn but the pictures, whole: who misses one misses nothing."""
    first = max(0, play.now - WINDOW * 3 // 4)
    return {
        "step": play.now,
        "start": play.dreams.start,
        "end": play.record.end,
        "mode": play.mode,
        "agent": play.agent_steers,
        "sampling": play.dreams.sampling,
        "dreams": play.dreams.num,
        "notice": play.notice,
        "seed": play.record.seed,
        "choice": play.controls.choice(play.action),
        "first": first,
        "last": first + WINDOW,
        "curves": _curves(play, first),
        "dims": _dims(play, first),
    }


def _curves(play: Playback, first: int) -> dict[str, Any]:
    moments = play.record.moments[first : first + WINDOW + 1]
    begin = max(first, play.dreams.start)
    dreamt = play.dreams.steps[begin - play.dreams.start :]
    truth = {
        "reward": [m.step.reward[0] for m in moments],
        "continue": [1.0 - m.step.is_terminal[0] for m in moments],
        "value": [m.value for m in moments],
    }
    curves: dict[str, Any] = {}
    for name, values in truth.items():
        curves[name] = {"from": first, "truth": _plain(values), "begin": begin}
        found = [step.reading.curves[name] for step in dreamt if name in step.reading.curves]
        curves[name]["mean"] = _plain(x.mean() for x in found)
        curves[name]["std"] = _plain(x.std() for x in found)
    if play.agent.world_model.decodes_obs:
        _compare(play)
        curves["obs"] = {
            "begin": begin,
            "error": _plain(step.error for step in dreamt),
            "spread": _plain(step.reading.spread for step in dreamt),
        }
    return curves


def _compare(play: Playback) -> None:
    """Note the dreams' errors where the record was given the same actions."""
    if not play.branching:
        for t in range(play.dreams.start, play.now + 1):
            step = play.dreams.steps[t - play.dreams.start]
            if step.error is None:
                step.error = step.reading.error(play.record.truth(t))


def _dims(play: Playback, first: int) -> dict[str, Any] | None:
    """The first numbers of a vector, as draw.js takes them."""
    if play.agent.spaces.images or not play.agent.world_model.decodes_obs:
        return None
    begin = max(first, play.dreams.start)
    last = min(play.record.end, first + WINDOW)
    truth = np.stack([play.record.truth(t) for t in range(min(first, last), last + 1)])
    dreamt = play.dreams.steps[begin - play.dreams.start :]
    seen = [step.reading.obs for step in dreamt if step.reading.obs is not None]
    dreams = np.stack(seen)  # (K, n, dims)
    dims = range(min(truth.shape[1], MAX_DIMS))
    mean, std = dreams.mean(1), dreams.std(1)
    return {
        "names": [f"{play.reader.key}[{i}]" for i in dims],
        "truth": {"from": min(first, last), "values": [_plain(truth[:, i]) for i in dims]},
        "dream": {
            "from": begin,
            "values": [_plain(mean[:, i]) for i in dims],
            "std": [_plain(std[:, i]) for i in dims],
        },
    }


def pictures(play: Playback) -> dict[str, Picture]:
    """The real side, the dreams, and where they differ: from each other, or one from truth."""
    pictures = {}
    real = play.record.picture(min(play.now, play.record.end))
    if real is not None:
        pictures["real"] = real
    obs = play.dreams.steps[-1].reading.obs
    if obs is None or not play.agent.spaces.images:
        return pictures
    pictures["dream"] = Picture.of(mosaic(obs))
    amount = None
    if play.dreams.num > 1:
        amount = obs.std(0, dtype=np.float32)
    elif not play.branching:
        amount = np.abs(obs[0].astype(np.float32) - play.record.truth(play.now))
    if amount is not None:
        pictures["difference"] = Picture.of(shaded(amount.mean(-1) / 255))
    return pictures


def episode_clip(play: Playback) -> bytes:
    """A GIF of the dream and what led to it; beyond the record its last step stands still.
    Raises ValueError where there is nothing to draw."""
    start = play.dreams.start
    first = max(0, start - CLIP_CONTEXT, play.now - CLIP_LENGTH)
    steps = range(first, play.now + 1)
    moments = [play.record.moments[min(t, play.record.end)] for t in steps]
    drawn = [m.drawn.frame() for m in moments if m.drawn is not None]
    frames = np.stack(drawn) if len(drawn) == len(moments) else None
    if not play.agent.world_model.decodes_obs:
        images = bool(play.agent.spaces.images)
        truths = [play.record.truth(min(t, play.record.end)) for t in steps]
        whole = np.stack(truths) if images else frames
        return clip(None, None, whole, 0)
    truth = np.stack([play.record.truth(min(t, play.record.end)) for t in steps])
    seen = [play.reader.read(play.record.moments[t].posterior) for t in range(first, start)]
    said = [*seen, *(step.reading for step in play.dreams.steps[max(0, first - start) :])]
    dream = np.stack([reading.obs[0] for reading in said if reading.obs is not None])
    return clip(truth, dream, frames, max(0, start + 1 - first))


def _plain(values: Iterable[Any]) -> list[float | None]:
    """Numbers for JSON, which has no NaN, of four digits."""
    return [
        float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
        for value in values
    ]
