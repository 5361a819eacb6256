"""Files that others wrote, with hashes that fit: whatever a field says, one sentence refuses it.

Every field of every file takes values of another kind in turn; what is read is either as good as
before or a CheckpointError that names the file, soon and for little memory.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from worldflux_dist import checkpoint, moments, storage
from worldflux_dist.agent import Agent
from worldflux_dist.config import Config, from_dict, to_dict
from worldflux_dist.distributed.run import RunDirectory, saved_config, storage_of
from worldflux_dist.learner import Learner
from worldflux_dist.metrics import read_lines
from worldflux_dist.models.base import families
from worldflux_dist.replay import Limiter, ReplayConfig, ReplayShard
from worldflux_dist.replay.segment import STATES
from worldflux_dist.settings import Settings
from worldflux_dist.spaces import Spaces
from worldflux_dist.storage import CheckpointError

DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]
LEAVE_OUT = object()
VALUES = [
    *(None, -1, 0, 10**9, 10**400, "x", "nan", "inf", [], {}, True, 3.5, [1] * 3, float("nan")),
    *(DEEP, "x" * 10**6, "../../outside", LEAVE_OUT, "S999999999", [10**9, [1]]),
]
S, MB = 2.0, 2**20


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to all fields; of a list its first two."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from places(value[index], (*path, index))


def changed(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return {} if new is LEAVE_OUT else new
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if new is LEAVE_OUT:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return value


def mutations(value: Any, depth: int = 99, num: int = 99) -> Iterator[tuple[tuple, Any, Any]]:
    """`num` values for each field above `depth`: others for the next, so that all kinds of fields
    see all kinds of values."""
    fields = [path for path in places(value) if len(path) < depth]
    for number, path in enumerate(fields):
        for turn in range(min(num, len(VALUES))):
            new = VALUES[(number * num + turn) % len(VALUES)]
            yield path, new, changed(value, path, new)


def forge(folder: Path, name: str, text: str) -> None:
    """Write a file of a checkpoint and make its hash right."""
    (folder / name).write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = text.encode()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sign(folder, manifest)


def sign(folder: Path, manifest: Any) -> None:
    if isinstance(manifest, dict):
        manifest = manifest | {"sha256": checkpoint._manifest_digest(manifest)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB


class Reading:
    """Notes whatever is not refused as it should be."""

    def __init__(self, name: str) -> None:
        self.name, self.bad, self.refused, self.read = name, [], 0, 0
        self.memory = peak()

    def good(self, action: Any) -> None:
        """What nobody changed is read."""
        self("as it was written", action)
        assert self.read == 1, self.bad

    def __call__(self, what: Any, action: Any) -> None:
        began = time.process_time()  # of this process alone: others are busy, too
        try:
            action()
            self.read += 1
        except CheckpointError as error:
            self.refused += 1
            said = str(error)
            if self.name not in said or "\n" in said or len(said) > 2000:
                self.bad.append((what, said[:300]))
        except Exception as error:
            self.bad.append((what, repr(error)[:300]))
        if time.process_time() - began > S:
            self.bad.append((what, f"{time.process_time() - began} s"))

    def check(self) -> None:
        assert not self.bad, "\n".join(f"{what!r:.200}: {said}" for what, said in self.bad[:20])
        assert self.refused > self.read
        assert peak() - self.memory < 200


@pytest.fixture(scope="module", params=["dreamerv3:tiny", "tdmpc2:tiny"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of an agent for nested spaces."""
    run, box = tmp_path_factory.mktemp("run"), gymnasium.spaces.Box
    spaces = Spaces(
        gymnasium.spaces.Dict(
            a=box(-np.inf, np.array([1, 2, np.inf], np.float32), (3,)),
            b=gymnasium.spaces.Tuple(
                [gymnasium.spaces.Discrete(3, start=1), gymnasium.spaces.MultiDiscrete([2, 3])]
            ),
            c=gymnasium.spaces.MultiBinary(2),
        ),
        box(-1, 1, (2,)),
    )
    agent = Agent(request.param, spaces)
    folder = checkpoint.begin(run / "checkpoints", 10)
    Learner(agent, Config().learner).save(folder)
    checkpoint.commit(run / "checkpoints", folder, 10)
    return run


def test_agent_json(learned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(learned, run)
    folder = run / "checkpoints" / "0000000010"
    saved = json.loads((folder / "agent.json").read_text())
    reading = Reading(folder.name)  # the weights are named where they are of another shape
    reading.good(lambda: Agent.load(str(run)))
    for path, new, value in mutations(saved, num=5):
        forge(folder, "agent.json", json.dumps(value))
        reading((path, new), lambda: Agent.load(str(run)))
    reading.check()


def test_what_a_learner_goes_on_with(learned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(learned / "checkpoints" / "0000000010", folder)
    learner = Learner(Agent.load(str(folder)), Config().learner)
    learner.load(folder)
    saved = json.loads((folder / "learner-agent.json").read_text())
    reading = Reading("learner-agent.json")
    for path, new, value in mutations(saved):
        if len(path) < 5:
            (folder / "learner-agent.json").write_text(json.dumps(value))
            reading((path, new), lambda: moments.load(learner.optimizers, "agent", folder))
    assert not reading.bad, reading.bad[:20]


SETTINGS = from_dict({"model": "dreamerv3:tiny", "planner": {"horizon": 3}})


def chunks(shard: ReplayShard) -> None:
    from test_shard import fill

    fill(shard, 0, 6)


def test_config_yaml(tmp_path: Path) -> None:
    reading = Reading("config.yaml")
    for path, new, value in mutations(to_dict(SETTINGS), num=7):
        if new is DEEP and len(path) != 1:
            continue  # YAML reads what is nested slowly, and one level or another is the same
        if path and isinstance(value, dict):  # a small file, since YAML is read slowly
            value = {path[0]: value[path[0]]} if path[0] in value else {}
        (tmp_path / "config.yaml").write_text(json.dumps(value))  # JSON is YAML

        def load() -> None:
            settings = saved_config(tmp_path)
            hash(json.dumps(to_dict(settings)))

        reading((path, new), load)
    for text in (
        "&a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n"
            for i in range(9)
        ),
        "[" * 10_000,
        "{a: " * 5000,
        "!!python/object/apply:os.getcwd []",
        "- " * 30_000,
    ):
        (tmp_path / "config.yaml").write_text(text)
        reading(text[:40], lambda: saved_config(tmp_path))
    assert not reading.bad, reading.bad[:20]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint as a run leaves it, and what its shard holds."""
    path = tmp_path / "run"
    with RunDirectory(path, SETTINGS) as directory:
        directory.log.log(10, {"loss": 1.0})
        directory.score(10, 1, [1.0, 2.0], "random")
    config = ReplayConfig(batch_size=2, batch_length=4, capacity=64, prioritized=0.5)
    shard = ReplayShard(config, 0, path / "replay", "0001", 0, 1)
    chunks(shard)
    state = shard.seal().result()
    shard.close()
    limiter = Limiter(32, 8, 4)
    limiter.inserted(40)
    folder = checkpoint.begin(path / "checkpoints", 10)
    steps = {"agent": 10}
    counters = {"limiter": limiter.state_dict(), "episodes": 3, "gradient_steps": steps}
    counters |= {"effective_steps": steps, "lost_steps": steps, "shards": [state]}
    checkpoint.commit(path / "checkpoints", folder, 10, counters=counters)
    return path


def resume(path: Path) -> Any:
    with RunDirectory(path, SETTINGS) as directory:
        limiter = Limiter(32, 8, 4)
        resumed = directory.resume(limiter, 4)
        assert limiter.owed >= 0
        return resumed


def test_the_manifest_and_its_counters(run: Path) -> None:
    folder = run / "checkpoints" / "0000000010"
    saved = json.loads((folder / "manifest.json").read_text())
    assert resume(run) is not None
    reading = Reading("manifest.json")
    for path, new, value in mutations(saved):
        if path != ("sha256",):  # a wrong one is another test's
            sign(folder, value)
            reading((path, new), lambda: checkpoint.verify(folder) and resume(run))
    reading.check()


def test_a_shard_is_restored_from_states_of_any_kind(run: Path, tmp_path: Path) -> None:
    """States that pass the form and lie: the shard refuses them, or holds what it can."""
    saved = json.loads((run / "checkpoints/0000000010/manifest.json").read_text())
    state, config = saved["counters"]["shards"][0], ReplayConfig(2, 4, 64, prioritized=0.5)
    reading = Reading("")

    def restore(value: Any) -> None:
        try:
            states = storage.in_form(value, STATES, run / "manifest.json")
            shard = ReplayShard(config, 0, run / "replay", "0002", 0, 1, states)
            shard.close()
        finally:
            shutil.rmtree(run / "replay" / "0002", ignore_errors=True)

    reading.good(functools.partial(restore, [state]))
    for path, new, value in mutations([state]):
        reading((path, new), functools.partial(restore, value))
    reading.check()


def test_a_shards_index(run: Path) -> None:
    config = ReplayConfig(batch_size=2, batch_length=4, capacity=64, prioritized=0.5)
    shutil.copytree(run / "replay", run / "kept")
    saved = json.loads((run / "replay/0001/shard-0/index.json").read_text())
    reading = Reading("replay")
    for path, new, value in mutations(saved):
        (run / "replay/0001/shard-0/index.json").write_text(json.dumps(value))

        def restore() -> None:
            ReplayShard(config, 0, run / "replay", "0001", 0, 1).close()

        reading((path, new), restore)
        shutil.rmtree(run / "replay")
        shutil.copytree(run / "kept", run / "replay")
    reading.check()


@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
def test_whose_run_it_is(name: str, run: Path) -> None:
    saved = json.loads((run / name).read_text())
    reading = Reading("")
    for path, new, value in mutations(saved, depth=2, num=7):
        (run / name).write_text(json.dumps(value))

        def load() -> None:
            try:
                with RunDirectory(run, SETTINGS) as directory:
                    assert directory.storage == storage_of(SETTINGS, run) == run
            except ValueError as error:
                raise CheckpointError(str(error)) from None  # another run's: as good a sentence

        reading((path, new), load)
    assert not reading.bad, reading.bad[:20]


@pytest.mark.parametrize("name", ["metrics.jsonl", "scores.jsonl"])
def test_lines(name: str, run: Path) -> None:
    saved = json.loads((run / name).read_text())
    reading = Reading(f"{name} is malformed: line 1")
    reading.good(lambda: list(read_lines(run / name)))
    for path, new, value in mutations(saved):
        (run / name).write_text(json.dumps(value) + "\n")
        reading((path, new), lambda: list(read_lines(run / name)))
    assert not reading.bad, reading.bad[:20]
    assert reading.refused > reading.read


def settings_classes(kind: type = Settings) -> Iterator[type]:
    for sub in kind.__subclasses__():
        yield sub
        yield from settings_classes(sub)


def test_every_number_of_the_settings_has_limits() -> None:
    for family in families():
        importlib.import_module(f"worldflux_dist.models.{family}")
    classes = list(settings_classes())
    assert len(classes) >= 12
    for kind in classes:
        for name, hint in kind.__annotations__.items():
            default = getattr(kind(), name)
            numbers = isinstance(default, int | float) and not isinstance(default, bool)
            if numbers:
                for value in (10**30, -(10**30)):
                    with pytest.raises(ValueError, match=rf"{name} is .*: it must be"):
                        kind(**{name: value})
            assert hint, name
