"""Families and behaviors of other packages: trained, saved, loaded, and refused where broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worldflux_dist import storage

REPOSITORY = Path(__file__).parent.parent
FAMILIES, BEHAVIORS = "worldflux_dist.families", "worldflux_dist.behaviors"


def install(folder: Path, name: str, entry_points: dict[str, str], source: str) -> Path:
    """What pip leaves of a package `name` in a folder: its module and its metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = [f"[{group}]\n{line}\n" for group, line in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(groups))
    (folder / f"{name}.py").write_text(source)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = (REPOSITORY / "tests" / "toy_worlds.py").read_text()
    entries = {FAMILIES: "toy = toy_worlds", BEHAVIORS: "brief = toy_worlds:Brief"}
    return install(tmp_path_factory.mktemp("packages"), "toy_worlds", entries, source)


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that finds the packages of these folders."""
    path = os.pathsep.join(map(str, (*folders, REPOSITORY)))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )


def create(*names: str) -> str:
    """Code that prints, for each name, the sentence in which it is refused."""
    return f"""
from gymnasium import spaces
from worldflux_dist import create_world_model
for name in {names!r}:
    try:
        create_world_model(name, spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    except ValueError as error:
        print(error)
"""


LOAD = """
import sys
from worldflux_dist import Agent
from worldflux_dist.storage import CheckpointError
try:
    agent = Agent.load(sys.argv[1] if len(sys.argv) > 1 else {path!r})
    print(type(agent.world_model).__module__, agent.recipe["behavior"]["horizon"])
    print(agent.act([0.1, 0.2, 0.3, 0.4]) in (0, 1))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.ray
def test_what_another_package_brings_trains_through_ray_and_is_loaded(
    toy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = f"""
from worldflux_dist.cli import main
import sys
sys.argv = ["worldflux-dist", "train", "configs/debug.yaml", "model=toy:tiny"]
sys.argv += ["--run-dir", {str(run)!r}]
main()
"""
    done = python(train, toy)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [storage.read_json(path) for path in sorted(run.glob("checkpoints/*/agent.json"))]
    assert lines[-1]["packages"] == ["toy_worlds"]
    with_it, without = (python(LOAD.format(path=str(run)), *folders) for folders in ([toy], []))
    assert with_it.stdout.split("\n")[:2] == ["toy_worlds 3", "True"], with_it.stderr
    assert "needs toy_worlds, which is not installed here: pip install" in without.stdout


BROKEN = {
    "no_model": ("PRESETS = {}", "has no Model"),
    "no_presets": ("from toy_worlds import Model\nPRESETS = {}", "has no PRESETS"),
    "no_config": ("from toy_worlds import Model\nPRESETS = {'tiny': {}}", "a preset 'tiny' that"),
    "no_verb": (
        "import toy_worlds\nfrom toy_worlds import PRESETS, WorldModel\n"
        "class Model(WorldModel):\n    initial = update = toy_worlds.Model.update",
        "lacks decode, features, ",
    ),
    "raises": ("1 / 0", "cannot be imported from raises (ZeroDivisionError: division by zero)"),
}


def test_broken_packages_are_named_in_a_sentence_each(toy: Path, tmp_path: Path) -> None:
    for name, (source, _) in BROKEN.items():
        install(tmp_path, name, {FAMILIES: f"{name} = {name}"}, source)
    names = [f"{name}:tiny" for name in BROKEN]
    done = python(create(*names, "toy:tinny"), tmp_path, toy)
    *lines, fine = done.stdout.splitlines()
    for line, (name, (_, message)) in zip(lines, BROKEN.items(), strict=True):
        assert message in line and f"the package {name} " in line
    assert fine == "no preset 'toy:tinny': did you mean 'toy:tiny'?"  # which is not touched


def test_a_name_that_two_packages_use_is_refused(toy: Path, tmp_path: Path) -> None:
    folder = install(tmp_path, "other", {FAMILIES: "toy = other"}, "")
    done = python(create("toy:tiny"), folder, toy)
    assert "bring 'toy' in worldflux_dist.families: remove one of them" in done.stdout
    ours = install(tmp_path / "ours", "thief", {FAMILIES: "tdmpc2 = thief"}, "")
    done = python(create("tdmpc2:tiny"), ours)
    assert "package thief brings 'tdmpc2'" in done.stdout and done.stdout.count("\n") == 1
