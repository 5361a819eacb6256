"""Configurations: how overlays merge, what a mistake says; a saved one loads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from worldflux_dist import config
from worldflux_dist.config import ConfigError
from worldflux_dist.settings import differences

OVERLAYS = sorted((REPOSITORY / "configs").rglob("*.yaml"))

# Differs from the defaults in every field.
MARKED = config.from_dict(
    {
        "seed": 1,
        "model": "tdmpc2:5m",
        "model_options": {"a": 1},
        "behavior": {"a": 1},
        "planner": {"a": 1},
        "env": {
            **dict(id="x", num_envs=1, kwargs={"a": 1}, max_episode_steps=1, max_failures=1),
            **dict(patience=1.0, image_size=8, dmc_obs="pixels", dmc_action_repeat=1),
            **dict(grayscale=True, frame_skip=1, repeat_action_probability=0.5, noop_max=1),
            **dict(terminal_on_life_loss=True, reward_clipping=True, full_action_space=True),
            **dict(use_fire_reset=True, max_episode_frames=1),
        },
        "replay": {
            **dict(batch_size=2, batch_length=2, capacity=100, capacity_bytes=1, online=False),
            **dict(uniform=0.5, recent=0.5, prioritized=0.5, storage="lz4", compress="none"),
            **dict(segment_bytes=1, flush_every=1.0, pending_bytes=1),
        },
        "learner": {
            **dict(precision="bfloat16", device="cpu", threads=2, accumulate=2, compile=True),
            **dict(pin_memory=True),
        },
        "train": {
            **dict(env_steps=7, train_ratio=1.0, prefill=1, eval_every=0, eval_episodes=1),
            **dict(checkpoint_every=1.0, threshold=1.0),
        },
        "scale": {
            **dict(num_runners=1, num_shards=1, chunk_length=1, runner_threads=2, patience=1.0),
            **dict(acting="actor", storage="x", max_staleness=8),
        },
        "imagination": {
            **dict(mode="actors", num_imaginers=2, num_policy_learners=2, queue_size=2),
            **dict(max_staleness=32),
        },
    }
)


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no file"),
        (b"\x80\x04pickle", "is not text in UTF-8"),
        ("seed: 1\n".encode("utf-16"), "is not text in UTF-8"),
        (b"seed: \x00", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (b"3", "must hold a mapping of keys, not a int"),
        (b"[]", "must hold a mapping of keys, not a list"),
        (b"a: &a [*a]", "is nested more than"),
        (b"# " * 100_000, "has more than 65536 bytes"),
    ],
)
def test_what_is_no_config_file_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path} {said}.*$"):
        config.load([path])


def test_what_does_not_change_learning_may_differ_on_resume() -> None:
    fixed = {name for name, *_ in differences(config.Config(), MARKED)}
    assert fixed == {
        *("seed", "model", "model_options.a", "behavior.a", "planner.a", "env.id", "env.kwargs.a"),
        *("env.image_size", "env.dmc_obs", "env.dmc_action_repeat", "env.grayscale"),
        *("env.frame_skip", "env.repeat_action_probability", "env.noop_max"),
        *("env.terminal_on_life_loss", "env.reward_clipping", "env.full_action_space"),
        *("env.use_fire_reset", "env.max_episode_frames", "replay.batch_size"),
        *("replay.batch_length", "replay.capacity", "replay.capacity_bytes", "replay.online"),
        *("replay.uniform", "replay.recent", "replay.prioritized", "learner.precision"),
        *("learner.accumulate", "train.prefill", "imagination.mode"),
    }


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
