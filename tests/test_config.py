"""Configurations: how overlays merge, what a mistake says; a saved one loads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from worldflux_dist import config
from worldflux_dist.config import ConfigError

OVERLAYS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_overlays_win_and_overrides_beat_them_all(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.yaml",
        "seed: 1\nenv: {id: A-v0, num_envs: 3}\nmodel_options: {deter: 64, units: 32}",
    )
    second = write(tmp_path / "b.yaml", "env: {id: B-v0}\nmodel_options: {deter: 128}")
    made = config.load([first, second], ["env.num_envs=5", "model_options.units=16", "seed=7"])
    assert (made.seed, made.env.id, made.env.num_envs) == (7, "B-v0", 5)
    assert made.model_options == {"deter": 128, "units": 16}
    assert config.load([second, first]).env.id == "A-v0"
    assert config.load([], ["seed=1", "seed=2"]).seed == 2
    assert config.load([write(tmp_path / "empty.yaml", "# nothing\n")]) == config.Config()


def test_values_arrive_in_their_types() -> None:
    made = config.load(
        [],
        [
            "train.env_steps=1e6",
            "train.train_ratio=64",
            "train.threshold=1e-3",
            "replay.online=false",
            "env.kwargs={n: 3, name: '7'}",
            "model_options={multipliers: [2, 4], learning_rate: 4e-5}",
        ],
    )
    assert made.train.env_steps == 1_000_000
    assert type(made.train.env_steps) is int
    assert type(made.train.train_ratio) is float
    assert made.train.threshold == 0.001
    assert made.replay.online is False
    assert made.env.kwargs == {"n": 3, "name": "7"}
    assert made.model_options == {"multipliers": [2, 4], "learning_rate": 4e-5}
    assert config.load([], ["train.threshold=null"]).train.threshold is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("env.num_env=2", "unknown config key 'env.num_env': did you mean 'num_envs'?"),
        ("trian.env_steps=2", "unknown config key 'trian': did you mean 'train'?"),
        ("zzz=1", "unknown config key 'zzz': known: seed, model, "),
        ("env=CartPole-v1", "env is a section: set env.<name>"),
        ("env.id.name=x", "env.id is {'name': 'x'}: it must be a valid string"),
        ("train.env_steps=many", "train.env_steps is 'many': it must be a valid integer"),
        ("train.env_steps=1.5", "train.env_steps is 1.5: it must be a valid integer"),
        ("train.threshold='5'", "train.threshold is '5': it must be a valid number"),
        ("seed=true", "seed is True: it must be a valid integer"),
        ("env.kwargs=3", "env.kwargs is 3: it must be a valid dictionary"),
        (
            "learner.precision=float16",
            "learner.precision is 'float16': it must be 'float32'",
        ),
        ("seed=-1", "seed is -1: it must be at least 0"),
        ("env.num_envs=0", "env.num_envs is 0: it must be at least 1"),
        ("replay.batch_size=0", "replay.batch_size is 0: it must be at least 1"),
        ("scale.num_runners=0", "scale.num_runners is 0: it must be at least 1"),
        ("train.eval_every=-1", "train.eval_every is -1: it must be at least 0"),
        ("train.train_ratio=.inf", "train.train_ratio is inf: it must be a finite number"),
        ("seed", "override 'seed' is not of the form key.subkey=value"),
        ("env.kwargs={a: 1", "override 'env.kwargs={a: 1': '{a: 1' is not valid YAML"),
    ],
)
def test_a_mistake_names_its_key_in_one_sentence(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load([], [override])
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "dreamer.yaml", "")
    with pytest.raises(ConfigError, match=r"dremer.yaml: did you mean '.*/dreamer.yaml'\?"):
        config.load([tmp_path / "dremer.yaml"])
    with pytest.raises(ConfigError, match="none there"):
        config.load([tmp_path / "nowhere" / "x.yaml"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b", "must hold a mapping of keys, not a list"), ("a: [1", "is not valid YAML")],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError, match=f"^{path} {said}.*$"):  # one line
        config.load([path])


@pytest.mark.parametrize("path", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_every_overlay_loads_and_its_yaml_loads_back_equal(path: Path, tmp_path: Path) -> None:
    family = REPOSITORY / "configs" / "dreamerv3.yaml"
    made = config.load([family, path], ["model_options={multipliers: [2, 4]}", "env.kwargs.a=1e-9"])
    assert config.load([write(tmp_path / "saved.yaml", config.to_yaml(made))]) == made


def test_environments_leave_the_model_to_its_own_file() -> None:
    """A family's file and an environment's combine in any order; only Atari's protocols name a
    ratio."""
    for path in sorted((REPOSITORY / "configs" / "envs").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        assert set(values) <= {"env", "train", "replay"}, path
        assert "train_ratio" not in values["train"] or path.name.startswith("atari"), path
        assert set(values["replay"]) == {"capacity"}, path
