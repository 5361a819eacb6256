"""A long run in which a random process dies every 10 to 20 seconds, and what must hold at its end.

WORLDFLUX_SOAK_S sets its seconds (600), WORLDFLUX_SOAK_SEED the random killer.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import fault_runs as f
import psutil
import pytest
from fault_runs import FaultRun

from worldflux_dist import config

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SECONDS = float(os.environ.get("WORLDFLUX_SOAK_S", "600"))
SEED = int(os.environ.get("WORLDFLUX_SOAK_SEED", "0"))
MORE_FDS = 20  # what the driver may have open beyond what it had early on
# What a process of each role is seen to do once it works again; a shard is seen on disk. There are
# two groups of learners, the model's and the policy's, so they are hit twice as often.
WORK = {
    "EnvRunnerActor": ".collect",
    "ReplayShardActor": "",
    "LearnerActor": ".step",
    "ImaginerActor": ".imagine",
    "WeightStore": "",
}
ROLES = [*WORK, "LearnerActor"]


@dataclass
class Killer:
    """Kills at random, and looks how long it takes until each role works again."""

    run: FaultRun
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    recovered: dict[str, list[float]] = field(default_factory=lambda: {role: [] for role in WORK})
    on_disk: set[f.Key] = field(default_factory=set)
    family: set[psutil.Process] = field(default_factory=set)
    waiting: list[tuple[str, float, Callable[[], bool]]] = field(default_factory=list)

    def strike(self) -> None:
        """Kill a random process of a random role that has one."""
        self.on_disk |= f.keys(f.live_shards(self.run.run_dir))
        role = self.rng.choice(ROLES)
        victims = self.run.started(role)
        if not victims:
            return  # all of them are on their way back
        pids, owners = {p.pid for p in victims}, f.shard_owners(self.run.run_dir)
        victim = self.rng.choice(sorted(victims, key=lambda p: p.pid))
        since = f.kill(victim)

        def back() -> bool:
            if role == "ReplayShardActor":
                return f.stores_again(self.run.run_dir, since, owners)
            at_work = {p.pid for p in self.run.processes(f"ray::{role}{WORK[role]}")}
            return bool(at_work & {p.pid for p in self.run.started(role)} - pids)

        self.waiting.append((role, since, back))

    def look(self) -> bool:
        """Note whoever works again, and every process there is; whether all of them do."""
        self.family |= set(self.run.processes())
        for item in list(self.waiting):
            role, since, back = item
            if back():
                self.waiting.remove(item)
                self.recovered[role].append(time.time() - since)
                f.note_recovery(f"soak: {role}", time.time() - since)
        return not self.waiting

    def watch(self, until: float) -> None:
        while time.time() < until:
            assert self.run.running, self.run.output
            self.look()
            time.sleep(0.2)

    def table(self) -> str:
        lines = [f"{'role':<18}{'kills':>6}{'median s':>10}{'longest s':>11}"]
        for role, seconds in self.recovered.items():
            ordered = sorted(seconds) or [0.0]
            middle, longest = ordered[len(ordered) // 2], ordered[-1]
            lines.append(f"{role:<18}{len(seconds):>6}{middle:>10.1f}{longest:>11.1f}")
        return "\n".join(lines)


def shared_memory(family: set[psutil.Process]) -> set[str]:
    """Files in /dev/shm that processes have mapped."""
    found = set()
    for process in family:
        try:
            found |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
        except psutil.Error:
            continue
    return found


def test_random_deaths_for_minutes(tmp_path: Path) -> None:
    overrides = (*f.TWO_IN_ACTORS, "env.kwargs.pause=0.01", "train.checkpoint_every=5")
    with FaultRun(tmp_path, *overrides) as run:
        run.wait_for_line("training of both parts", lambda x: x["weights_version"] > 0)
        killer, began = Killer(run), time.time()
        killer.watch(began + min(60, SECONDS / 10))
        fds, memory = run.driver.num_fds(), shared_memory(set(run.processes()))
        while time.time() < began + SECONDS:
            killer.strike()
            killer.watch(time.time() + killer.rng.uniform(10, 20))
        run.wait_until(killer.look, "the last recoveries")
        line = run.wait_for_training(after=time.time(), steps=64)
        at_last = run.driver.num_fds()
        memory |= shared_memory(set(run.processes()))
        killer.look()
        run.interrupt()
        assert run.wait() == 130, run.output
        _, alive = psutil.wait_procs(killer.family, timeout=60)
    print(killer.table())
    print(f"fds of the driver {fds} -> {at_last}; last line {line}")
    assert not alive
    assert at_last <= fds + MORE_FDS
    assert not [path for path in memory if Path(path.removesuffix(" (deleted)")).exists()]
    assert "everything is saved" in run.output
    f.check_counters(run.lines())
    f.check_ratio(run.last(), runners=2)
    _check_replay(run, killer.on_disk, tmp_path / "restored")


def _check_replay(run: FaultRun, on_disk: set[f.Key], root: Path) -> None:
    """What was ever seen on disk is there in the end, once, and comes back in whole windows."""
    _, manifest = f.newest(run.run_dir)
    print({name: manifest["counters"][name] for name in ("lost_steps", "gradient_steps")})
    shards = f.saved_shards(run.run_dir, manifest)
    f.check_shards(shards)
    assert on_disk <= f.keys(shards)
    lost = f.missing(shards)
    print(f"{len(f.keys(shards))} chunks kept, {len(lost)} lost that were not on disk yet")
    settings = config.load([run.run_dir / "config.yaml"]).replay
    for shard in f.restored(run.run_dir, manifest, root, "9001", settings):
        f.check_windows(shard)
