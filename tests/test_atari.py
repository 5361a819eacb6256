"""Atari: the protocol is what EnvConfig says, and the time convention holds."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from env_steps import collect, stack, zeros

from worldflux_dist.envs import EnvConfig, make_envs


def test_atari_shapes_and_arrays_are_not_overwritten() -> None:
    envs = make_envs(EnvConfig("ALE/Pong-v5", 2, noop_max=0), seed=0)
    assert envs.spaces.obs["obs"].shape == (64, 64, 3)
    assert envs.spaces.action_dim == 6
    assert envs.action_repeat == 4
    kept = [envs.step(envs.spaces.random_action(np.random.default_rng(t), 2)) for t in range(30)]
    copies = [step.obs["obs"].copy() for step in kept]
    for _ in range(60):
        envs.step(zeros(envs))
    assert all((step.obs["obs"] == copy).all() for step, copy in zip(kept, copies, strict=True))
    assert any((copies[0] != copy).any() for copy in copies)
    assert copies[0].shape == (2, 64, 64, 3)
    assert copies[0].dtype == np.uint8
    frame = envs.render()
    assert frame is not None
    assert frame.shape == (64, 64, 3)
    assert (frame[..., 0] != frame[..., 2]).any()


def test_atari_gray_size_actions_and_skip() -> None:
    config = EnvConfig(
        "ALE/Pong-v5", 1, image_size=84, grayscale=True, full_action_space=True, frame_skip=2
    )
    envs = make_envs(config, seed=0)
    step = envs.step(zeros(envs))
    assert step.obs["obs"].shape == (1, 84, 84, 1)
    assert envs.spaces.action_dim == 18
    assert envs.action_repeat == 2
    frame = envs.render()
    assert frame is not None
    assert frame.shape == (84, 84, 3)


def test_atari_every_option_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    original = AtariVectorEnv.__init__

    def record(self: Any, game: str, num_envs: int, **options: Any) -> None:
        given.update(options, game=game)
        original(self, game, num_envs, **options)

    monkeypatch.setattr(AtariVectorEnv, "__init__", record)
    make_envs(EnvConfig("ALE/MsPacman-v5", 1), seed=0)
    assert given["game"] == "ms_pacman"
    expected = {
        "repeat_action_probability": 0.0,
        "reward_clipping": False,
        "use_fire_reset": False,
        "episodic_life": False,
        "life_loss_info": False,
        "noop_max": 30,
        "max_num_frames_per_episode": 108_000,
        "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP,
    }
    assert {key: given[key] for key in expected} == expected
    make_envs(EnvConfig("ALE/Pong-v5", 1, repeat_action_probability=0.25), seed=0)
    assert given["repeat_action_probability"] == 0.25


def test_atari_rewards_are_not_clipped_unless_asked() -> None:
    def best(clip: bool) -> float:
        config = EnvConfig("ALE/MsPacman-v5", 1, noop_max=0, reward_clipping=clip)
        rewards = collect(make_envs(config, seed=0), 100).reward  # the game starts at about 65
        return float(rewards.max())

    assert best(False) >= 10
    assert best(True) == 1


def test_atari_limits_and_time_convention() -> None:
    config = EnvConfig("ALE/Pong-v5", 2, noop_max=0, max_episode_steps=10)
    chunk = collect(make_envs(config, seed=0), 25)
    chunk.check()
    assert np.flatnonzero(chunk.is_last[0]).tolist() == [10, 21]  # the reset is row 0 and row 11
    assert np.flatnonzero(chunk.is_first[0]).tolist() == [0, 11, 22]
    assert not chunk.is_terminal.any()


def test_atari_life_loss_ends_the_episode_and_not_the_game() -> None:
    def play(lives: bool) -> tuple[np.ndarray, int]:
        """Lengths of the episodes, and how many different scoreboards the first five began with."""
        config = EnvConfig("ALE/Breakout-v5", 1, noop_max=0, terminal_on_life_loss=lives)
        envs = make_envs(config, seed=0)
        fire = np.eye(4, dtype=np.float32)[[1]]
        chunk = stack([envs.step(fire) for _ in range(160)])
        chunk.check()
        assert (chunk.is_last == chunk.is_terminal).all()
        boards = chunk.obs["obs"][chunk.is_first][:5, :6]  # shows the lives left
        return np.diff(np.flatnonzero(chunk.is_first[0])), len(np.unique(boards, axis=0))

    (whole, _), (split, boards) = play(False), play(True)
    assert len(split) >= 5
    assert split[:5].sum() == pytest.approx(whole[0], abs=12)
    assert boards == 5


def test_atari_seeds() -> None:
    config = EnvConfig("ALE/Breakout-v5", 2, repeat_action_probability=0.25)
    one, same, other = (collect(make_envs(config, seed), 40).obs["obs"] for seed in (3, 3, 4))
    assert (one == same).all()
    assert (one != other).any()
    assert (one[0] != one[1]).any()


def test_atari_has_no_kwargs() -> None:
    with pytest.raises(ValueError, match="obs_type"):
        make_envs(EnvConfig("ALE/Pong-v5", 1, {"obs_type": "ram"}), seed=0)
