"""The environments obey the time convention, survive failures and explain themselves."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from env_steps import collect, zeros
from gymnasium import spaces

from worldflux_dist.data import Step
from worldflux_dist.envs import EnvConfig, Envs, make_envs

HERE = Path(__file__).stem
TOY = "toy_envs"


class Counting(gymnasium.Env):
    """obs counts the steps, reward is ten times the count; ends at 3 by `ends` or at 2 by limit."""

    observation_space: gymnasium.Space = spaces.Box(0, 100, (1,), np.float32)
    action_space: gymnasium.Space = spaces.Box(-2, 4, (1,), np.float32)
    action_repeat = 2

    def __init__(self, ends: str = "terminated", reuse: bool = False) -> None:
        self.ends, self.reuse = ends, reuse
        self.actions: list[float] = []
        self.buffer = np.zeros(1, np.float32)

    def observe(self) -> np.ndarray:
        self.buffer[:] = self.count
        return self.buffer if self.reuse else self.buffer.copy()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.count = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count += 1
        self.actions.append(float(action[0]))
        end = self.count == 3
        flags = end and self.ends == "terminated", end and self.ends == "truncated"
        return self.observe(), 10.0 * self.count, *flags, {}


class Failing(Counting):
    """Fails at count 2 in the way asked for, in its first `lives` lives; counts its lives."""

    lives_begun = 0
    seeds: ClassVar[list[int | None]] = []

    def __init__(self, how: str = "raise", lives: int = 1) -> None:
        super().__init__("truncated", reuse=True)
        Failing.lives_begun += 1
        self.how = how if Failing.lives_begun <= lives else ""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        Failing.seeds.append(seed)
        if self.how == "reset":
            raise OSError("no simulator")
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = super().step(action)
        if self.count == 2 and self.how:
            obs[:] = 77 if self.how == "raise" else obs
            if self.how == "raise":
                raise OSError("simulator gone")
            if self.how == "hang":
                time.sleep(1000)
            if self.how == "nan reward":
                reward = float("nan")
            if self.how == "nan obs":
                obs[:] = np.nan
            if self.how == "wrong shape":
                obs = np.zeros(3, np.float32)
        return obs, reward, terminated, truncated, info


class Nested(Counting):
    """Dict and Tuple spaces; the observation shows the action that went in."""

    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (12, 10), np.uint8),
        pair=spaces.Tuple((spaces.Discrete(3), spaces.Box(-9, 9, (2,), np.float64))),
    )
    action_space = spaces.Dict(
        gear=spaces.Discrete(3), move=spaces.Tuple((spaces.Box(-2, 4, (2,)), spaces.Discrete(2)))
    )

    def observe(self, action: Any = None) -> Any:
        gear, move, flag = (0, np.zeros(2), 0) if action is None else action
        camera = np.full((12, 10), 50 * flag, np.uint8)
        return {"camera": camera, "pair": (gear, np.asarray(move, float))}

    def step(self, action: Any) -> Any:
        self.count += 1
        seen = self.observe((action["gear"], *action["move"]))
        return seen, 0.0, False, False, {}


def flags(step: Step, lane: int = 0) -> tuple[bool, bool, bool]:
    return bool(step.is_first[lane]), bool(step.is_last[lane]), bool(step.is_terminal[lane])


# ---------------------------------------------------------------------------------- time convention


@pytest.mark.parametrize(
    ("kwargs", "limit", "length", "terminal"),
    [({}, 0, 3, True), ({"ends": "truncated"}, 0, 3, False), ({}, 2, 2, False)],
)
@pytest.mark.parametrize("reuse", [False, True])
def test_time_convention_by_hand(
    kwargs: dict[str, Any], limit: int, length: int, terminal: bool, reuse: bool
) -> None:
    config = EnvConfig(
        f"{HERE}:Counting", 2, {**kwargs, "reuse": reuse}, max_episode_steps=limit, max_failures=1
    )
    envs = make_envs(config, seed=0)
    assert envs.action_repeat == 2
    went_in = np.full((2, 1), 0.5, np.float32)
    steps = [envs.step(went_in) for _ in range(2 * length + 3)]
    for t, step in enumerate(steps):
        count = t % (length + 1)
        expected = count == 0, count == length, count == length and terminal
        assert flags(step, 0) == flags(step, 1) == expected
        assert step.obs["obs"].tolist() == [[count], [count]]  # the last observation is stored
        assert step.reward.tolist() == [10 * count] * 2
        assert step.action.tolist() == [[0.0 if count == 0 else 0.5]] * 2
        assert step.obs["obs"].dtype == step.reward.dtype == step.action.dtype == np.float32
    assert went_in.tolist() == [[0.5], [0.5]]


def test_actions_reach_the_env_scaled_and_not_at_a_reset() -> None:
    envs = make_envs(EnvConfig(f"{HERE}:Counting", 1), seed=0)
    env = envs.vector.envs[0].unwrapped
    for value in (9, -1, 0, 1, 9, 5):  # the first and the fifth go into resets
        envs.step(np.array([[value]], np.float32))
    assert env.actions == [-2, 1, 4, 4]


def test_cartpole_rows() -> None:
    envs = make_envs(EnvConfig("CartPole-v1", 3, max_episode_steps=15), seed=1)
    assert envs.action_repeat == 1
    chunk = collect(envs, 200)
    chunk.check()
    assert chunk.is_first[:, 0].all()
    assert (chunk.reward == ~chunk.is_first).all()
    assert (chunk.is_last[:, :-1] == chunk.is_first[:, 1:]).all()
    position, angle = chunk.obs["obs"][..., 0], chunk.obs["obs"][..., 2]
    fell = (abs(angle) > 12 * 2 * np.pi / 360) | (abs(position) > 2.4)
    assert (chunk.is_terminal == fell).all()  # the row that fell is stored, and only it ends so
    assert chunk.is_terminal.any()
    assert (chunk.is_last & ~chunk.is_terminal).any()
    assert (abs(chunk.obs["obs"][chunk.is_first]) <= 0.05).all()


def test_seed_decides_everything_and_lanes_differ() -> None:
    config = EnvConfig("CartPole-v1", 3)
    one, same, next_seed = (collect(make_envs(config, seed), 60) for seed in (5, 5, 6))
    assert (one.obs["obs"] == same.obs["obs"]).all()
    starts = np.concatenate([one.obs["obs"][:, 0], next_seed.obs["obs"][:, 0]])
    assert len(np.unique(starts, axis=0)) == 6  # neighbouring seeds share no lane


def test_half_cheetah_scales_actions() -> None:
    envs = make_envs(EnvConfig("HalfCheetah-v5", 2, {"reset_noise_scale": 0.0}), seed=0)
    assert envs.spaces.obs["obs"].shape == (17,)
    assert envs.spaces.action_dim == 6
    envs.step(zeros(envs))
    step = envs.step(np.stack([np.full(6, 3.0), np.full(6, 1.0)]))
    assert (step.obs["obs"][0] == step.obs["obs"][1]).all()  # clipped to the space's bounds
    raw = gymnasium.make("HalfCheetah-v5", reset_noise_scale=0.0)
    raw.reset()
    obs, reward, *_ = raw.step(np.ones(6, np.float32))
    np.testing.assert_allclose(step.obs["obs"][0], obs, rtol=1e-6)
    assert step.reward[0] == np.float32(reward)


def test_nested_spaces_through_the_vector_env() -> None:
    envs = make_envs(EnvConfig(f"{HERE}:Nested", 2), seed=0)
    assert list(envs.spaces.obs) == ["camera", "pair/0", "pair/1"]
    envs.step(zeros(envs))
    gear, move, flag = np.eye(3)[[2, 1]], [[-1, 1], [0, 0]], np.eye(2)[[1, 0]]
    step = envs.step(np.concatenate([gear, move, flag], -1).astype(np.float32))
    assert step.obs["camera"].shape == (2, 12, 10, 1)
    assert step.obs["camera"].dtype == np.uint8
    assert step.obs["camera"][:, 0, 0, 0].tolist() == [50, 0]
    assert step.obs["pair/0"].tolist() == gear.tolist()
    assert step.obs["pair/1"].tolist() == [[-2, 4], [1, 1]]


# ----------------------------------------------------------------------------------------- failures


@pytest.fixture(autouse=True)
def _first_life() -> None:
    Failing.lives_begun, Failing.seeds = 0, []


@pytest.mark.parametrize("how", ["raise", "hang", "nan reward", "nan obs", "wrong shape"])
def test_failed_episode_is_a_truncation(how: str, caplog: pytest.LogCaptureFixture) -> None:
    config = EnvConfig(f"{HERE}:Failing", 1, {"how": how}, patience=0.2)
    envs = make_envs(config, seed=0)
    with caplog.at_level(logging.WARNING):
        steps = [envs.step(zeros(envs)) for _ in range(7)]
    assert [float(step.obs["obs"][0, 0]) for step in steps] == [0, 1, 1, 0, 1, 2, 3]
    assert [float(step.reward[0]) for step in steps] == [0, 10, 0, 0, 10, 20, 30]
    assert [flags(step) for step in steps[1:4]] == [
        (False, False, False),
        (False, True, False),
        (True, False, False),
    ]
    assert Failing.lives_begun == 2  # rebuilt once
    assert Failing.seeds[0] != Failing.seeds[1]
    assert None not in Failing.seeds
    (record,) = caplog.records
    line = record.getMessage()
    assert f"{HERE}:Failing lane 0" in line
    words = {"raise": "OSError: simulator gone", "wrong shape": "shape (3,)"}
    assert words.get(how, "env.patience seconds" if how == "hang" else "") in line


def test_only_the_lane_that_hangs_is_reset() -> None:
    """T2: the others go on, in the same process."""
    envs = make_envs(EnvConfig(f"{HERE}:Failing", 3, {"how": "hang"}, patience=0.2), seed=0)
    steps = [envs.step(zeros(envs)) for _ in range(5)]
    lasts = np.array([step.is_last for step in steps])
    # Only the first environment made has the fault: it ends at its second step, others at three.
    assert lasts[:, 0].tolist() == [False, False, True, False, False]
    assert lasts[:, 1].tolist() == lasts[:, 2].tolist() == [False, False, False, True, False]


def test_failed_reset_is_tried_again_and_ends_no_episode(caplog: pytest.LogCaptureFixture) -> None:
    envs = make_envs(EnvConfig(f"{HERE}:Failing", 1, {"how": "reset", "lives": 3}), seed=0)
    steps = [envs.step(zeros(envs)) for _ in range(2)]
    assert [flags(step) for step in steps] == [(True, False, False), (False, False, False)]
    assert len(caplog.records) == 3
    assert Failing.lives_begun == 4


@pytest.mark.parametrize("how", ["raise", "reset"])
def test_repeated_failures_stop_the_run(how: str) -> None:
    config = EnvConfig(f"{HERE}:Failing", 1, {"how": how, "lives": 99}, max_failures=3)
    envs = make_envs(config, seed=0)
    with pytest.raises(RuntimeError, match=f"env {HERE}:Failing lane 0 failed 3 times.*simulator"):
        collect(envs, 12)
    assert Failing.lives_begun == 3


def test_old_failures_are_forgotten_after_a_good_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(envs: Envs) -> None:
        guard = envs.vector.envs[0]
        guard.env.unwrapped.how, guard.env.unwrapped.count = "raise", 1
        envs.step(zeros(envs))

    for steps, survives in ((50, False), (140, True)):  # a reset every fourth row
        envs = make_envs(EnvConfig(f"{HERE}:Failing", 1, {"lives": 0}, max_failures=2), seed=0)
        envs.step(zeros(envs))
        fail(envs)
        for _ in range(steps):
            step = envs.step(zeros(envs))
        while step.is_last[0]:
            step = envs.step(zeros(envs))
        if survives:
            fail(envs)
        else:
            with pytest.raises(RuntimeError, match="2 times in a row"):
                fail(envs)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPol-v1", "unknown env CartPol-v1, did you mean CartPole-v1"),
        ("ALE/Pog-v5", "ALE/Pong-v5"),
        ("qqqqqqqqqq", "module:factory"),
        ("no_such_module:make", "no module no_such_module"),
        (f"{TOY}:EchoEnvv", "unknown env"),
        ("HalfCheetah-v3", "not installed"),
        (f"{HERE}:not_an_env", "returned a int, it must return a gymnasium.Env"),
        (f"{HERE}:Text", f"{HERE}:Text: observation space Text.* is not supported"),
        (f"{HERE}:needs_dm_control", r"worldflux_dist\[dmc\]"),
    ],
)
def test_what_cannot_be_built_says_why(env_id: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_envs(EnvConfig(env_id, 1), seed=0)


@pytest.mark.parametrize(
    "options", [{"num_envs": 0}, {"frame_skip": 0}, {"repeat_action_probability": 25}]
)
def test_config_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"env.{name} is {options[name]}: it must"):
        EnvConfig(**options)


def not_an_env() -> int:
    return 3


def needs_dm_control() -> gymnasium.Env:
    raise ModuleNotFoundError("No module named 'dm_control'", name="dm_control")


class Text(Counting):
    observation_space = spaces.Text(5)


def test_module_ids_of_ones_own(tmp_path: Path) -> None:
    """In the current directory: a factory, and a Gymnasium id that the module registers."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import gymnasium
            def make(**kwargs):
                return gymnasium.make("Pendulum-v1", **kwargs)
            gymnasium.register("Mine-v0", entry_point=lambda: make(), max_episode_steps=7)
            """
        )
    )
    script = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from worldflux_dist.envs import EnvConfig, make_envs\n"
        "print(make_envs(EnvConfig('mine:make', 1, {'g': 5.0}), 0).vector.get_attr('g'))\n"
        "print(make_envs(EnvConfig('mine:Mine-v0', 1), 0).spaces.action_dim)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == ["(5.0,)", "1"]


# ---------------------------------------------------------------------------------------- rendering


def test_frames_for_videos(caplog: pytest.LogCaptureFixture) -> None:
    envs = make_envs(EnvConfig("CartPole-v1"), seed=0, num_envs=1, render=True)
    envs.step(zeros(envs))
    frame = envs.render()
    assert frame is not None
    assert frame.shape == (400, 600, 3)
    assert frame.dtype == np.uint8
    assert len(np.unique(frame)) > 2
    plain = make_envs(EnvConfig("CartPole-v1"), seed=0, num_envs=1)
    plain.step(zeros(plain))
    assert plain.render() is None
    assert plain.num_envs == 1


class Blind(Counting):
    """Says it can draw, and cannot."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        raise OSError("no display")


def test_env_that_cannot_draw_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    envs = make_envs(EnvConfig(f"{HERE}:Blind", 1), seed=0, render=True)
    envs.step(zeros(envs))
    assert envs.render() is None
    assert envs.render() is None
    (record,) = caplog.records
    assert "no display" in record.getMessage()
    assert "MUJOCO_GL" in record.getMessage()


def test_an_observation_of_another_kind_is_a_failure_and_a_reward_in_an_array_is_none() -> None:
    """What Gymnasium's vector environment would raise in the middle of a run."""
    envs = make_envs(EnvConfig("trouble_envs:Unholdable", max_failures=2), 0, num_envs=1)
    with pytest.raises(RuntimeError, match=r"failed 2 times in a row.*as declared"):
        collect(envs, 30)
    envs = make_envs(EnvConfig("trouble_envs:ArrayReward", max_failures=1), 0, num_envs=1)
    assert collect(envs, 30).reward.max() == 1
