"""The run directory: everything a run leaves behind, the same everywhere.

    config.yaml manifest.json metrics.jsonl scores.jsonl tb/ checkpoints/ video/ curve.png

Opened again with the same configuration it goes on; with another one it is refused. Checkpoints
and replay lie there, too, or in a folder of `scale.storage`. That folder says in run.json whose it
is, the run directory in manifest.json which run it is and the folder's name, so that one may be
moved or copied and another run of the same name is kept out.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import platform
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import StringConstraints, TypeAdapter
from typing_extensions import TypedDict

from worldflux_dist import checkpoint, config, figures, storage
from worldflux_dist.evaluate import OpenLoop
from worldflux_dist.metrics import RunLog, read_lines
from worldflux_dist.replay.limiter import Limiter
from worldflux_dist.replay.segment import ShardState
from worldflux_dist.settings import STRICT, Whole, differences

if TYPE_CHECKING:
    from upath import UPath

IDENTITY = "run.json"
Name = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class _Own(TypedDict, total=False):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    run: Name
    folder: Annotated[str, StringConstraints(max_length=255, pattern=r"^[^/]*[^/.][^/]*$")]


class _Held(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    run: Name
    path: Annotated[str, StringConstraints(max_length=4096)]
    config: dict[str, Any]


class _Limiter(TypedDict):
    env_steps: Whole
    gradient_steps: Whole
    forgiven: Whole
    redone: Whole
    again: Whole
    debt: Annotated[str, StringConstraints(pattern=r"^-?\d{1,40}(/0*[1-9]\d{0,40})?$")]


class _Counters(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    limiter: _Limiter
    episodes: Whole
    gradient_steps: dict[str, Whole]
    effective_steps: dict[str, Whole]
    lost_steps: dict[str, Whole]
    shards: list[ShardState]


_OWN, _HELD = TypeAdapter(_Own), TypeAdapter(_Held)
COUNTERS: TypeAdapter[Any] = TypeAdapter(_Counters)  # of a checkpoint's manifest


@dataclass(frozen=True)
class Pictures:
    """What is to be drawn of an agent: a dream, or frames (T, h, w, 3) of an episode. `problems`
    say in a sentence each why there is less."""

    dream: OpenLoop | None = None
    frames: np.ndarray | None = None
    problems: list[str] = field(default_factory=list)


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
        run = self._identity()
        text, saved = config.to_yaml(settings).encode(), path / "config.yaml"
        if not saved.exists() or saved.read_bytes() != text:
            storage.write(saved, text)
        own = {"run": run, "folder": self.storage.name}
        storage.write_json(path / "manifest.json", own | _manifest())
        self.log = RunLog(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        self._lock.close()

    def explain(self, error: OSError) -> Exception:
        """A full disk as the sentence that says what is safe; any other error as it is."""
        if not storage.disk_full(error):
            return error
        newest = checkpoint.newest(self.checkpoints)
        safe = f"{newest[0]} is safe on disk" if newest else "no checkpoint had been written"
        return storage.CheckpointError(
            f"the disk of {self.path} is full; {safe}: free some space and run the same command "
            "again"
        )

    def resume(self, limiter: Limiter, num_steps: int) -> tuple[UPath, dict[str, Any]] | None:
        """The newest good checkpoint and its counters, the limiter set and later lines dropped.

        `num_steps` is what runners collect at a time.
        """
        newest = checkpoint.newest(self.checkpoints)
        if newest is None:
            self.log.truncate_after(-1, 0)
            return None
        folder, manifest = newest
        where = folder / checkpoint.MANIFEST
        counters = storage.in_form(manifest["counters"], COUNTERS, where, "counters")
        apart = self.settings.imagination.mode == "actors"
        for name in ("gradient_steps", "lost_steps"):
            if set(counters[name]) != ({"world_model", "behavior"} if apart else {"agent"}):
                raise storage.CheckpointError(f"{where}: counters.{name} is not of these learners")
        limiter.load_state_dict(counters["limiter"], num_steps)
        self.log.truncate_after(limiter.env_steps, limiter.gradient_steps)
        return folder, counters

    def score(
        self, env_steps: int, action_repeat: int, returns: Iterable[float], method: str
    ) -> None:
        """Append one evaluation to scores.jsonl."""
        frames, s = env_steps * action_repeat, self.settings
        self.log.score(env_steps, frames, returns, task=s.env.id, method=method, seed=s.seed)

    def scores(self) -> list[dict[str, Any]]:
        path = self.path / "scores.jsonl"
        return list(read_lines(path)) if path.exists() else []

    def last_score(self) -> int:
        """Env steps at the newest evaluation of the agent; -1 where there is none."""
        return max((s["env_steps"] for s in self.scores() if s["method"] != "random"), default=-1)

    def methods(self) -> set[str]:
        """Methods that have been scored."""
        return {line["method"] for line in self.scores()}

    def draw(self, pictures: Pictures, threshold: float | None, random: float) -> list[str]:
        """curve.png, and video/open_loop.gif of a dream or video/episode.gif of frames; what could
        not be drawn, one sentence each."""
        scores = [line for line in self.scores() if line["method"] != "random"]
        title = f"{self.settings.model} on {self.settings.env.id}"
        dream, frames, video = pictures.dream, pictures.frames, self.path / "video"
        drawings: dict[Path, Callable[[Path], None]] = {
            self.path / "curve.png": lambda path: figures.learning_curve(
                scores, path, threshold, random, title
            )
        }
        if dream is not None:
            beside = dream.frames if dream.truth.dtype != "uint8" else None
            drawings[video / "open_loop.gif"] = lambda path: figures.open_loop_gif(
                dream.truth, dream.dream, path, dream.context, beside
            )
        if frames is not None:
            drawings[video / "episode.gif"] = lambda path: figures.video(frames, path, fps=30)
        problems = []
        for path, draw in drawings.items():
            try:
                draw(path)
            except Exception as error:  # of any kind: the run itself is over and went well
                problems.append(f"{path} could not be drawn: {type(error).__name__}: {error}")
        return problems

    def _identity(self) -> str:
        """The name of this run for good, which its storage bears, too.

        Raises ConfigError where the directory or the storage belongs to a run with other settings,
        or the storage to another run.
        """
        own, held = _own(self.path), _held(self.storage)
        began = (self.path / "config.yaml").exists()
        before = saved_config(self.path) if began else self.settings
        if differing := _listed(before, self.settings):
            raise config.ConfigError(
                f"{self.path} holds a run with other settings: {differing}; choose another run "
                "directory or remove this one"
            )
        if held is None:
            self._check_storage(began, before.scale.storage)
        elif held["run"] != own.get("run"):
            # A run directory that was lost, or of a release that kept no identity.
            known = "run" in own or held["path"] != str(self.path)
            if known or _listed(config.from_dict(held["config"]), self.settings):
                raise stranger(self.storage, held, self.path)
        run = held["run"] if held else own.get("run", uuid.uuid4().hex)
        value = {"run": run, "path": str(self.path), "config": config.to_dict(self.settings)}
        self.storage.mkdir(parents=True, exist_ok=True)
        storage.write_json(self.storage / IDENTITY, value)
        return run

    def _check_storage(self, began: bool, before: str) -> None:
        """Raise ConfigError where a storage that names no run cannot be this one's. One that an
        earlier release left is, where this directory has begun with the same settings."""
        now, there = self.settings.scale.storage, checkpoint.kept(self.checkpoints)
        if began and before != now and not there:
            raise config.ConfigError(
                f"{self.path} has its checkpoints elsewhere: scale.storage ({before!r} before, "
                f"{now!r} now); move their folder to {self.storage} first, with its {IDENTITY}"
            )
        if not began and there:
            raise config.ConfigError(
                f"{self.storage} has checkpoints of a run that is not in {self.path}: put its "
                "config.yaml there to go on with it, or choose another name for this run"
            )


def saved_config(run_dir: Path) -> config.Config:
    """The settings of a run. Raises CheckpointError where config.yaml cannot be used."""
    saved = run_dir / "config.yaml"
    try:
        return config.load([saved])
    except config.ConfigError as error:
        text = str(error)
        raise storage.CheckpointError(text if str(saved) in text else f"{saved}: {text}") from None


def storage_of(settings: config.Config, path: Path) -> UPath:
    """Where the run in `path` keeps checkpoints and replay: there, or in a folder of the name that
    the run directory had at first. Raises ConfigError where another run does."""
    root, own = settings.scale.storage, _own(path)
    if not root:
        return storage.as_path(path)
    place = storage.as_path(root) / own.get("folder", path.resolve().name)
    held = _held(place)
    if held and held["run"] != own.get("run", held["run"]):
        raise stranger(place, held, path)
    return place


def stranger(place: UPath, held: Any, path: Path) -> config.ConfigError:
    of = " ".join(f"{key}={held['config'].get(key)!r:.80}" for key in ("model", "seed"))
    return config.ConfigError(
        f"{place} belongs to another run, that of {held['path']} ({of}): choose another name for "
        f"{path}, or another scale.storage"
    )


def _own(path: Path) -> Any:
    """What manifest.json says of the run's identity; a release that kept none says nothing."""
    saved = storage.as_path(path) / "manifest.json"
    return storage.read_form(saved, _OWN) if saved.exists() else {}


def _held(place: UPath) -> Any:
    """Whose storage it is, None where that is not said."""
    saved = place / IDENTITY
    return storage.read_form(saved, _HELD) if saved.exists() else None


def _listed(old: config.Config, new: config.Config) -> str:
    changed = differences(old, new)
    return ", ".join(f"{name} ({before!r} before, {now!r} now)" for name, before, now in changed)


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
