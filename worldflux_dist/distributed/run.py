"""The run directory: everything a run leaves behind, the same everywhere.

    config.yaml manifest.json metrics.jsonl scores.jsonl tb/ checkpoints/ video/ curve.png

Opened again with the same configuration it goes on; with another one it is refused.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from worldflux_dist import checkpoint, config, figures
from worldflux_dist.evaluate import OpenLoop
from worldflux_dist.metrics import RunLog, read_lines
from worldflux_dist.replay.limiter import Limiter

if TYPE_CHECKING:
    from worldflux_dist.checkpoint import AnyPath

# What may differ when a run goes on: how long, how fast, where and on how many processes, and how
# often to look; not what is learned.
FREE = {
    *("train.env_steps", "train.train_ratio", "train.threshold", "train.checkpoint_every"),
    *("train.eval_every", "train.eval_episodes", "learner.device", "learner.threads"),
    *("scale.num_runners", "scale.num_shards", "scale.num_learners", "scale.runner_threads"),
    *(
        "scale.acting",
        "scale.patience",
        "scale.max_staleness",
        "imagination.num_imaginers",
        "imagination.queue_size",
    ),
    *("imagination.num_policy_learners", "imagination.max_staleness"),
}


class RunDirectory:
    """Owns the files of one run. Use as a context manager; one process at a time."""

    def __init__(self, path: Path, settings: config.Config) -> None:
        self.path, self.settings = path, settings
        self.storage = storage_of(settings, path)
        self.checkpoints = self.storage / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise config.ConfigError(
                f"another process is training in {path}: stop it or choose another run directory"
            ) from None
        self._check_config()
        text, saved = config.to_yaml(settings), path / "config.yaml"
        if not saved.exists() or saved.read_text() != text:
            (path / "config.yaml.tmp").write_text(text)
            (path / "config.yaml.tmp").replace(saved)
        checkpoint.write_json(path / "manifest.json", _manifest())
        self.log = RunLog(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        self._lock.close()

    def explain(self, error: OSError) -> Exception:
        """A full disk as the sentence that says what is safe; any other error as it is."""
        if not checkpoint.disk_full(error):
            return error
        found = checkpoint.newest(self.checkpoints)
        safe = f"{found[0]} is safe on disk" if found else "no checkpoint had been written"
        return checkpoint.CheckpointError(
            f"the disk of {self.path} is full; {safe}: free some space and run the same command "
            "again"
        )

    def resume(self, limiter: Limiter, num_steps: int) -> tuple[AnyPath, dict[str, Any]] | None:
        """The newest good checkpoint and its counters, the limiter set and later lines dropped.

        `num_steps` is what runners collect at a time.
        """
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            self.log.truncate_after(-1)
            return None
        folder, manifest = found
        limiter.load_state_dict(manifest["counters"]["limiter"], num_steps)
        self.log.truncate_after(limiter.env_steps)
        return folder, manifest["counters"]

    def score(
        self, env_steps: int, action_repeat: int, returns: Iterable[float], method: str
    ) -> None:
        """Append one evaluation to scores.jsonl."""
        frames, s = env_steps * action_repeat, self.settings
        self.log.score(env_steps, frames, returns, task=s.env.id, method=method, seed=s.seed)

    def scores(self) -> list[dict[str, Any]]:
        path = self.path / "scores.jsonl"
        return read_lines(path) if path.exists() else []

    def last_score(self) -> int:
        """Env steps at the newest evaluation of the agent; -1 where there is none."""
        return max((s["env_steps"] for s in self.scores() if s["method"] != "random"), default=-1)

    def methods(self) -> set[str]:
        """Methods that have been scored."""
        return {line["method"] for line in self.scores()}

    def draw(
        self,
        dream: OpenLoop | None,
        frames: np.ndarray | None,
        threshold: float | None,
        random: float,
    ) -> None:
        """curve.png, and video/open_loop.gif of a dream or video/episode.gif of frames."""
        scores = [line for line in self.scores() if line["method"] != "random"]
        title = f"{self.settings.model} on {self.settings.env.id}"
        figures.learning_curve(scores, self.path / "curve.png", threshold, random, title)
        (self.path / "video").mkdir(exist_ok=True)
        if dream is not None:
            figures.open_loop_gif(
                dream.truth,
                dream.dream,
                self.path / "video" / "open_loop.gif",
                dream.context,
                frames=dream.frames if dream.truth.dtype != "uint8" else None,
            )
        if frames is not None:
            figures.video(frames, self.path / "video" / "episode.gif", fps=30)

    def _check_config(self) -> None:
        """Raise ConfigError where the directory belongs to a run with other settings."""
        saved = self.path / "config.yaml"
        if not saved.exists():
            return
        old, new = (_flat(config.to_dict(c)) for c in (config.load([saved]), self.settings))
        differing = [k for k in old | new if k not in FREE and old.get(k) != new.get(k)]
        if differing:
            listed = ", ".join(f"{k} ({old.get(k)} before, {new.get(k)} now)" for k in differing)
            raise config.ConfigError(
                f"{self.path} holds a run with other settings: {listed}; choose another run "
                "directory or remove this one"
            )


def storage_of(settings: config.Config, path: Path) -> AnyPath:
    """Where the run in `path` keeps checkpoints and replay: there, or in a folder of its name."""
    root = settings.scale.storage
    return checkpoint.as_path(root) / path.resolve().name if root else path


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _manifest() -> dict[str, Any]:
    """Versions that a result depends on."""
    names = ("worldflux_dist", "torch", "numpy", "ray", "gymnasium", "ale-py", "mujoco")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": versions,
    }
