"""The newest steps of a run's replay, read beside the run: nothing is taken over or changed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from worldflux_dist.data import Chunk
from worldflux_dist.replay.segment import MAX_SEGMENT, SEGMENT, read_segment

if TYPE_CHECKING:
    from upath import UPath

_NAME = re.compile(SEGMENT)


def recent_chunks(root: UPath, num_steps: int) -> list[Chunk]:
    """Chunks of at least `num_steps` steps, or all there are; the newest first. Segments that are
    written anew or deleted meanwhile, or damaged, are passed over."""
    found: list[Chunk] = []
    for name in sorted(_segments(root), key=_age, reverse=True):
        if sum(chunk.num_steps for chunk in found) >= num_steps:
            break
        path = root / name
        try:
            if path.stat().st_size > MAX_SEGMENT:
                continue
            found += reversed(list(read_segment(path.read_bytes())[1]))
        except (OSError, ValueError):
            continue
    return found


def _segments(root: UPath) -> list[str]:
    """Names of all segments, of every life and shard."""
    if not root.exists():
        return []
    folders = [shard for life in root.iterdir() if life.is_dir() for shard in life.iterdir()]
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    names = ["/".join(path.parts[-3:]) for path in paths]
    return [name for name in names if _NAME.fullmatch(name)]


def _age(name: str) -> tuple[str, str]:
    """Of lives, and within one of segments: those of all shards grow alike."""
    life, _, segment = name.split("/")
    return life, segment
