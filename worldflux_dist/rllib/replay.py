"""Replay in an RLlib checkpoint: the shards' segments, copied into it and out of it again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import ray
from fsspec.implementations.arrow import ArrowFSWrapper
from ray.exceptions import RayError

from worldflux_dist.config import Config
from worldflux_dist.distributed.cluster import shard_config
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace
from worldflux_dist.distributed.supervision import RETURN_S
from worldflux_dist.replay.segment import STATES
from worldflux_dist.storage import CheckpointError, delete, in_form, parse_json

if TYPE_CHECKING:
    from upath import UPath

STATES_FILE = "shards.json"


class Replay:
    """Owns the shards of one algorithm, which keep their segments under `root`.

    To RLlib it is a part of the algorithm that saves and restores itself.
    """

    def __init__(self, settings: Config, root: UPath, options: list[dict[str, Any]]) -> None:
        self.settings, self.root, self.options = settings, root, options
        self.shards: list[Any] = []
        self.start([])

    def start(self, saved: Sequence[dict[str, Any]]) -> None:
        """Start the shards, with what `saved` names of the segments under `root`."""
        self.stop()
        num, seed = self.settings.scale.num_shards, self.settings.seed * 1000
        share, life = shard_config(self.settings), f"{time.time_ns():020d}"  # later ones sort later
        make = actor(ReplayShardActor, concurrency_groups={"disk": 1})
        places = [ShardPlace(str(self.root), life, index, num) for index in range(num)]
        self.shards = [
            make.options(**where).remote(share, seed + place.index, place, list(saved))
            for place, where in zip(places, self.options, strict=True)
        ]
        ray.get([shard.report.remote() for shard in self.shards])

    def stop(self) -> None:
        for shard in self.shards:
            ray.kill(shard)
        self.shards = []

    def end(self) -> None:
        """Stop, and delete what the shards had on disk: checkpoints hold copies."""
        self.stop()
        delete(self.root)

    def total_steps(self) -> int:
        """Steps that were ever stored. Raises RayActorError while a shard restarts."""
        reports = ray.get([shard.report.remote() for shard in self.shards])
        return sum(report.total_steps for report in reports)

    def tidy(self) -> None:
        """Let the shards delete segments of which they hold nothing any more."""
        for shard in self.shards:
            shard.retain.remote(set())

    def save_to_path(self, path: Any, *, filesystem: pyarrow.fs.FileSystem, **kwargs: Any) -> None:
        """Copy all segments. Raises CheckpointError where another node has them."""
        states, files = self._seal(), ArrowFSWrapper(filesystem)
        names = sorted({segment["name"] for state in states for segment in state["segments"]})
        for name in names:
            try:
                data = (self.root / name).read_bytes()
            except FileNotFoundError:
                raise CheckpointError(
                    f"the replay's segment {self.root / name} is not on this node: set training("
                    "storage=...) to a path or URL that all nodes see, or checkpoint_replay=False"
                ) from None
            _write(files, PurePath(path) / name, data)
        _write(files, PurePath(path) / STATES_FILE, json.dumps(states).encode())

    def _seal(self) -> list[dict[str, Any]]:
        """The shards' states, all on disk; a shard that died is waited for."""
        deadline = time.monotonic() + RETURN_S
        while True:
            try:
                ray.get([shard.seal.remote() for shard in self.shards])
                states: list[dict[str, Any]] = ray.get([s.sealed.remote() for s in self.shards])
                return states
            except RayError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def restore_from_path(
        self, path: Any, *, filesystem: pyarrow.fs.FileSystem | None = None, **kwargs: Any
    ) -> None:
        """Restart the shards with what `save_to_path` wrote; their number may differ."""
        files = ArrowFSWrapper(filesystem or pyarrow.fs.LocalFileSystem())
        listed = (PurePath(path) / STATES_FILE).as_posix()
        states = in_form(parse_json(files.cat_file(listed), listed), STATES, listed)
        for state in states:
            for segment in state["segments"]:
                target = self.root / segment["name"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(files.cat_file(f"{path}/{segment['name']}"))
        self.start(states)


def _write(files: ArrowFSWrapper, path: PurePath, data: bytes) -> None:
    files.makedirs(path.parent.as_posix(), exist_ok=True)
    files.pipe_file(path.as_posix(), data)
