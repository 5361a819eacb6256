"""What is served of a run: its newest agent, and replayed steps to start from. Only read here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from worldflux_dist import checkpoint
from worldflux_dist.agent import Agent
from worldflux_dist.replay.recent import recent_chunks
from worldflux_dist.serve.dreams import Dreams

if TYPE_CHECKING:
    from upath import UPath

STEPS = 4096  # of replay that are read


class ServedRun:
    """A run's storage: checkpoints and replay, with its agent on `device`."""

    def __init__(self, folder: UPath, device: str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)

    def dreams(self) -> Dreams:
        """The newest. Raises CheckpointError or FileNotFoundError where there is none."""
        found = self._load()
        if found is None:
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint yet: serve it once the run has saved one"
            )
        return found

    def newer(self, than: tuple[int, int]) -> Dreams | None:
        """Dreams of later weights than `than`, where a checkpoint has some."""
        kept = checkpoint.kept(self.folder / "checkpoints")
        if not any(_version(manifest) > than for manifest in kept):
            return None
        found = self._load()  # an older one, where the newest is broken
        return found if found is not None and found.version > than else None

    def _load(self) -> Dreams | None:
        newest = checkpoint.newest(self.folder / "checkpoints")
        if newest is None:
            return None
        folder, manifest = newest
        agent = Agent.load(folder).to(self.device)
        chunks = recent_chunks(self.folder / "replay", STEPS)
        dreams = Dreams(agent, chunks, _version(manifest))
        if dreams.num_starts:  # before it is served, not within a call
            assert dreams.starts
        return dreams


def _version(manifest: dict) -> tuple[int, int]:
    steps = manifest["counters"].get("gradient_steps", {})
    return 0, min(steps.values(), default=0)
