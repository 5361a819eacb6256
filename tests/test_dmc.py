"""Tests of DeepMind Control: the time convention, seeds, pixels, and what is said without GL."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldflux_dist.data import Step
from worldflux_dist.envs import EnvConfig, Envs, make_envs

BALANCE = "dmc/cartpole-balance"


@pytest.fixture(scope="module")
def suite() -> Any:
    return pytest.importorskip("dm_control.suite", reason="the extra dmc is not installed")


def roll(envs: Envs, num: int, seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [envs.step(envs.spaces.random_action(rng, envs.num_envs)) for _ in range(num)]


def say(code: str, **environ: str) -> str:
    """What a fresh process prints, with no display and only the given MUJOCO_GL."""
    gone = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    head = "from worldflux_dist.envs import EnvConfig, make_envs\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        cwd=Path(__file__).parents[1],
        env=kept | environ,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def make(options: str = "", gl: dict[str, str] | None = None, env_id: str = BALANCE) -> str:
    return say(
        f"try: print(make_envs(EnvConfig('{env_id}', 1, {options}), 0).spaces.obs)\n"
        "except ValueError as error: print('said:', error)",
        **gl or {},
    )


# --------------------------------------------------------------------------------------- episodes


def test_episode_is_500_steps_that_sum_two_rewards(suite: Any) -> None:
    envs = make_envs(EnvConfig("dmc/walker-walk", 1), seed=3)
    assert envs.action_repeat == 2
    assert envs.spaces.obs["obs"].shape == (24,)
    assert envs.spaces.action_dim == 6
    rows = roll(envs, 503)
    assert [bool(row.is_first[0]) for row in rows] == [t in (0, 501) for t in range(503)]
    assert [bool(row.is_last[0]) for row in rows] == [t == 500 for t in range(503)]
    assert not any(row.is_terminal[0] for row in rows)  # the time limit

    raw = suite.load("walker", "walk", task_kwargs={"random": int(envs._seeds[0])})
    time_step = raw.reset()
    for row in rows[:501]:
        if not row.is_first[0]:
            reward = 0.0
            for _ in range(2):
                time_step = raw.step(row.action[0])
                reward += time_step.reward
            assert row.reward[0] == np.float32(reward)
        numbers = np.concatenate([np.ravel(value) for value in time_step.observation.values()])
        np.testing.assert_array_equal(row.obs["obs"][0], numbers.astype(np.float32))
    assert time_step.last()
    assert reward > 0


def test_repeat_stops_where_the_episode_ends(suite: Any) -> None:
    config = EnvConfig(BALANCE, 1, {"time_limit": 0.065}, dmc_action_repeat=3)  # 7 control steps
    envs = make_envs(config, seed=0)
    assert envs.action_repeat == 3
    rows = roll(envs, 4)
    assert [bool(row.is_last[0]) for row in rows] == [False, False, False, True]
    assert all(2 < row.reward[0] <= 3 for row in rows[1:3])
    assert 0 < rows[3].reward[0] <= 1


def test_only_a_zero_discount_is_terminal(suite: Any) -> None:
    envs = make_envs(EnvConfig(BALANCE, 1), seed=0)
    task = envs.vector.envs[0].unwrapped._env.task
    roll(envs, 3)
    task.get_termination = lambda physics: 0.0
    (row,) = roll(envs, 1)
    assert row.is_last[0] and row.is_terminal[0]
    assert row.reward[0] <= 1  # the second control step of the repeat was not taken
    assert roll(envs, 1)[0].is_first[0]


def test_max_episode_steps_counts_steps(suite: Any) -> None:
    rows = roll(make_envs(EnvConfig(BALANCE, 1, max_episode_steps=5), seed=0), 7)
    assert [bool(row.is_last[0]) for row in rows] == [t == 5 for t in range(7)]
    assert not rows[5].is_terminal[0]


def test_seed_decides_everything_and_lanes_differ(suite: Any) -> None:
    config = EnvConfig("dmc/ball_in_cup-catch", 2, max_episode_steps=5)
    one, same, other = (roll(make_envs(config, seed), 15) for seed in (5, 5, 6))
    for row, again in zip(one, same, strict=True):
        assert (row.obs["obs"] == again.obs["obs"]).all()
    starts = [row.obs["obs"][lane] for row in (one[0], other[0]) for lane in (0, 1)]
    starts += [row.obs["obs"][0] for row in one if row.is_first[0]][1:]  # later episodes too
    assert len(np.unique(starts, axis=0)) == len(starts) == 6


def test_seeded_reset_forgets_the_life_before(suite: Any) -> None:
    envs = make_envs(EnvConfig("dmc/walker-walk", 2), seed=0)
    used, fresh = envs.vector.envs
    used.reset(seed=1)
    for _ in range(50):
        used.step(np.ones(6, np.float32))
    used.reset(seed=7)
    fresh.reset(seed=7)
    for _ in range(20):
        action = np.full(6, 0.5, np.float32)
        (obs, reward, *_), (obs2, reward2, *_) = used.step(action), fresh.step(action)
        assert reward == reward2
        np.testing.assert_array_equal(obs, obs2)


def test_actions_span_the_tasks_own_bounds(suite: Any) -> None:
    envs = make_envs(EnvConfig("dmc/quadruped-walk", 1), seed=0)
    highest = envs.spaces.decode_action(np.ones((1, 12), np.float32))[0]
    np.testing.assert_allclose(highest[:3], [1, 1.1, 0.8], rtol=1e-6)


# -------------------------------------------------------------------------------------- bad input


def test_missing_extra_names_the_command() -> None:
    hide = "import sys; sys.modules['dm_control'] = None\n"
    out = say(f"{hide}make_envs(EnvConfig('{BALANCE}', 1), 0)")
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: env {BALANCE} needs dm_control")
    assert "pip install 'worldflux_dist[dmc]'" in last


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("dmc/walker-wakl", "unknown env dmc/walker-wakl, did you mean dmc/walker-walk"),
        ("dmc/cup-catch", "dmc/ball_in_cup-catch"),
        ("dmc/q", "dmc/<domain>-<task>"),
        ("dmc/lqr-lqr_2_1", r"env dmc/lqr-lqr_2_1: action space Box\(-inf, inf"),
    ],
)
def test_what_cannot_be_built_says_why(suite: Any, env_id: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_envs(EnvConfig(env_id, 1), seed=0)


def test_options_out_of_range(suite: Any) -> None:
    with pytest.raises(
        ValueError, match=r"env.dmc_obs is 'state': it must be 'proprio' or 'pixels'"
    ):
        EnvConfig(dmc_obs="state")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"env.dmc_action_repeat is 0: it must be at least 1"):
        EnvConfig(dmc_action_repeat=0)
    with pytest.raises(ValueError, match=r"could not be made: TypeError.*'wind'"):
        make_envs(EnvConfig(BALANCE, 1, {"wind": 1}), seed=0)


# ---------------------------------------------------------------------------------------- drawing


@pytest.mark.slow
def test_proprio_needs_no_display_and_says_nothing(suite: Any) -> None:
    out = make()
    assert out.startswith("{'obs'")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("gl", [{}, {"MUJOCO_GL": "glfw"}, {"MUJOCO_GL": "disable"}])
@pytest.mark.slow
def test_pixels_without_a_display_name_the_variable(suite: Any, gl: dict[str, str]) -> None:
    (line,) = make("dmc_obs='pixels'", gl).splitlines()
    assert line.startswith(f"said: env {BALANCE} could not be made: ")
    assert "set MUJOCO_GL=egl or MUJOCO_GL=osmesa" in line


@pytest.mark.slow
def test_proprio_task_that_draws_names_the_variable_too(suite: Any) -> None:
    out = make(gl={"MUJOCO_GL": "disable"}, env_id="dmc/quadruped-escape")
    assert "said: env dmc/quadruped-escape could not be made: " in out
    assert "set MUJOCO_GL=egl or MUJOCO_GL=osmesa" in out


@pytest.mark.slow
def test_nonsense_in_the_variable_is_named(suite: Any) -> None:
    (line,) = make("", {"MUJOCO_GL": "nonsense"}).splitlines()
    assert line.startswith(f"said: env {BALANCE}: MUJOCO_GL=nonsense cannot be used here")
    assert "set MUJOCO_GL=egl or MUJOCO_GL=osmesa" in line


@pytest.mark.slow
def test_video_without_a_display_warns_once(suite: Any) -> None:
    out = say(
        "import logging, numpy as np; logging.basicConfig()\n"
        f"envs = make_envs(EnvConfig('{BALANCE}', 1), 0, render=True)\n"
        "envs.step(np.zeros((1, 1)))\n"
        "print(envs.render(), envs.render())"
    )
    warning, printed = sorted(out.splitlines(), reverse=True)
    assert printed == "None None"
    assert "there is no display" in warning and "MUJOCO_GL" in warning


DRAWS = """
import numpy as np
config = EnvConfig('dmc/cartpole-swingup', 2, dmc_obs='pixels')
envs = make_envs(config, 0, render=True)
def step(value):
    return envs.step(np.full((2, 1), value, np.float32))
first, *_, last = [step(0), *(step(1) for _ in range(10))]
image = last.obs['obs']
print(image.shape, image.dtype, image.std() > 5, (image != first.obs['obs']).any())
frame = envs.render()
print(frame.shape, frame.dtype, frame.std() > 5)
envs.close()
"""


@pytest.mark.slow
def test_pixels_and_videos(suite: Any) -> None:
    for gl in ("egl", "osmesa"):
        if "said" not in make("dmc_obs='pixels'", {"MUJOCO_GL": gl}):
            break
    else:
        pytest.skip("neither EGL nor OSMesa can draw on this machine")
    assert say(DRAWS, MUJOCO_GL=gl).splitlines() == [
        "(2, 64, 64, 3) uint8 True True",
        "(256, 256, 3) uint8 True",
    ]


def test_warnings_of_the_simulator_go_to_the_logger(
    suite: Any, caplog: pytest.LogCaptureFixture
) -> None:
    envs = make_envs(EnvConfig("dmc/walker-walk", 1), seed=0)
    roll(envs, 2)
    physics = envs.vector.envs[0].unwrapped._env.physics
    physics.data.qpos[:] = 1e11
    with caplog.at_level(logging.INFO):
        (row,) = roll(envs, 1)
    assert row.is_last[0] and not row.is_terminal[0]  # the Guard closed the episode
    (record,) = [one for one in caplog.records if "huge value in QPOS" in one.message]
    assert record.name.startswith("worldflux_dist")
