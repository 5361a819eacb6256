"""What a run is doing, read from its directory alone: no process of it is asked.

It works for runs that are under way, on this machine or another one that sees the directory, and
for runs that have ended.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldflux_dist import config
from worldflux_dist.distributed.roles import BUSY
from worldflux_dist.distributed.run import saved_config, storage_of
from worldflux_dist.metrics import family, read_lines

if TYPE_CHECKING:
    from upath import UPath

IDLE = 0.5  # a role that works less of the time is no bottleneck


def bottleneck(busy: Mapping[str, float]) -> str:
    """One line that says which role to scale next, from the fraction of time that each works.

    `busy` goes from the names in BUSY to fractions of wall time; unknown names are left out.
    """
    known = {name: fraction for name, fraction in busy.items() if name in BUSY}
    if not known:
        return "bottleneck: not known yet"
    name = max(known, key=known.__getitem__)
    role = BUSY[name]
    if known[name] < IDLE:
        return f"bottleneck: none; the busiest, {role.words}, works {known[name]:.0%} of the time"
    waits = ""
    if name != "learner" and "learner" in known:
        waits = f", learners wait {max(0.0, 1 - known['learner']):.0%} of it"
    return (
        f"bottleneck: {role.words} (busy {known[name]:.0%} of the time{waits}): raise {role.more}"
    )


def lines(run_dir: Path) -> list[str]:
    """The state of the run in `run_dir`, in plain lines.

    Raises FileNotFoundError where it is no run directory.
    """
    if not (run_dir / "config.yaml").exists():
        raise FileNotFoundError(f"{run_dir} is no run directory: it has no config.yaml")
    settings = saved_config(run_dir)
    metrics = _last(run_dir / "metrics.jsonl")
    rows = [
        ("run", f"{settings.model} on {settings.env.id}, seed {settings.seed}"),
        ("state", _state(run_dir, metrics)),
        *_progress(settings, metrics),
        ("checkpoint", _checkpoint(storage_of(settings, run_dir))),
        *_scores(run_dir),
    ]
    return [f"{name:<12}{text}" for name, text in rows] + [bottleneck(family(metrics, "busy/"))]


def _state(run_dir: Path, metrics: dict[str, Any]) -> str:
    written = f"last line {_ago(metrics['time'])}" if metrics else "no line of metrics yet"
    if _locked(run_dir / ".lock"):
        return f"a process of this machine is training; {written}"
    return f"no process of this machine is training, one of another may be; {written}"


def _locked(path: Path) -> bool:
    """Whether the process that trains in the directory holds its lock."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _progress(settings: config.Config, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Counters, rates, replay, restarts and staleness, as far as there are any."""
    if not metrics:
        return
    steps, total = metrics["env_steps"], settings.train.env_steps
    yield (
        "steps",
        f"{steps:,} of {total:,} env steps ({steps / total:.0%}), "
        f"{metrics.get('gradient_steps', 0):,.0f} gradient steps, "
        f"{metrics.get('episodes', 0):,.0f} episodes",
    )
    if rates := family(metrics, "rate/"):
        each = (f"{value:,.1f} {key.replace('_', ' ')}" for key, value in rates.items())
        yield "per second", ", ".join(each)
    if shards := list(_shards(metrics)):
        yield "replay", ", ".join(shards)
    if "replay/not_durable" in metrics:
        lost = metrics["replay/not_durable"]
        yield "durability", "REPLAY CANNOT BE WRITTEN" if lost else "replay is kept on disk"
    each = (f"{role} {num:.0f}" for role, num in family(metrics, "restarts/").items() if num)
    yield "restarts", ", ".join(each) or "none"
    if "staleness" in metrics:
        text = f"{metrics['staleness']:.1f} gradient steps behind when acting"
        tail = metrics.get("staleness/p95")
        yield "staleness", text + (f", p95 {tail:.1f}" if tail is not None else "")


def _shards(metrics: dict[str, Any]) -> Iterator[str]:
    for key, steps in metrics.items():
        if match := re.fullmatch(r"replay/shard(\d+)_steps", key):
            nbytes = metrics.get(f"replay/shard{match[1]}_bytes")
            size = "" if nbytes is None else f" ({nbytes / 1024**2:,.0f} MB)"
            yield f"shard {match[1]} {steps:,.0f} steps{size}"


def _checkpoint(storage: UPath) -> str:
    """The newest one that has a manifest; its files are not verified, which may take long."""
    root = storage / "checkpoints"
    steps = [p.parent.name for p in root.glob("*/manifest.json") if p.parent.name.isdigit()]
    if not steps:
        return f"none in {root}"
    newest = root / max(steps)
    written = (newest / "manifest.json").stat().st_mtime  # 0 where the storage does not know
    return f"{int(newest.name):,} gradient steps" + (f", {_ago(written)}" if written else "")


def _scores(run_dir: Path) -> Iterator[tuple[str, str]]:
    """The newest evaluation of the agent."""
    score = _last(run_dir / "scores.jsonl", lambda line: line["method"] != "random")
    if score:
        yield (
            "score",
            f"{score['return_mean']:.1f} +- {score['return_std']:.1f} over {score['episodes']} "
            f"episodes at {score['env_steps']:,} env steps",
        )


def _last(path: Path, wanted: Any = lambda line: True) -> dict[str, Any]:
    """The last line of a .jsonl file, or nothing."""
    last: dict[str, Any] = {}
    for line in read_lines(path) if path.exists() else ():
        last = line if wanted(line) else last
    return last


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
