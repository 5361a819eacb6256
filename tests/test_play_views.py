"""What is shown of a playback in every family, and how every action space is steered."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from play_envs import LEFT, RIGHT, Tally, go, seen, start, tally

from worldflux_dist.envs import EnvConfig
from worldflux_dist.models.base import State
from worldflux_dist.serve.controls import Controls, action_names
from worldflux_dist.serve.play import view
from worldflux_dist.serve.play.pictures import Picture, mosaic, shaded
from worldflux_dist.spaces import Spaces


@pytest.mark.parametrize(
    ("family", "options"), [("tdmpc2", {}), ("jepa", {"probe": False})], ids=["tdmpc2", "jepa"]
)
@pytest.mark.parametrize("image", [False, True], ids=["vector", "image"])
def test_a_family_without_pictures_plays(family: str, options: Any, image: bool) -> None:
    playback = start(family, env=tally(image=image, draws=True), **options)
    go(playback, RIGHT, LEFT)
    about, numbers = view.about(playback, "a run"), view.numbers(playback)
    assert "does not decode observations" in about["sentence"] and not about["pictures"]
    assert set(numbers["curves"]) == {"reward", "continue", "value"} and numbers["dims"] is None
    for curve in numbers["curves"].values():
        assert len(curve["mean"]) == len(curve["truth"]) == 3 and None not in curve["mean"]
    assert list(view.pictures(playback)) == ["real"]
    gif = Image.open(io.BytesIO(view.episode_clip(playback)))
    assert gif.n_frames > 1  # of the real side


def test_a_family_without_rewards_plays() -> None:
    playback = start()
    decode = playback.agent.world_model.decode

    def without(state: State, heads: Any = ("obs", "continue")) -> Any:
        return decode(state, [name for name in heads if name != "reward"])

    playback.agent.world_model.decode = without
    playback.do("seek", 0)
    go(playback, RIGHT)
    reward = view.numbers(playback)["curves"]["reward"]
    assert reward["mean"] == [] and reward["truth"] == [0, 2]


def test_neither_dream_nor_environment_draws() -> None:
    playback = start("tdmpc2")
    assert view.pictures(playback) == {}
    with pytest.raises(ValueError, match="draws pictures for a clip"):
        view.episode_clip(playback)


def test_pictures_of_images_are_exact() -> None:
    playback = start(env=tally(image=True))
    go(playback, RIGHT, LEFT)
    pictures = view.pictures(playback)
    assert {picture.kind for picture in pictures.values()} == {"image/png"}
    np.testing.assert_array_equal(pictures["real"].frame(), playback.record.truth(2))
    dream = playback.dreams.steps[-1].reading.obs
    np.testing.assert_array_equal(pictures["dream"].frame(), dream[0])
    error = np.abs(dream[0].astype(np.float32) - playback.record.truth(2)).mean(-1) / 255
    np.testing.assert_array_equal(pictures["difference"].frame(), shaded(error))
    curves = view.numbers(playback)["curves"]
    assert curves["obs"]["error"][-1] == pytest.approx(error.mean(), rel=1e-3)
    playback.do("dreams", 4)
    assert view.pictures(playback)["dream"].frame().shape == (34, 34, 3)
    playback.do("branch")
    playback.do("dreams", 1)
    assert "difference" not in view.pictures(playback)


def test_a_vector_is_drawn_as_its_first_numbers() -> None:
    playback = start(env=tally(draws=True))
    go(playback, RIGHT, LEFT)
    playback.do("seek", 1)
    playback.do("step")
    dims = view.numbers(playback)["dims"]
    assert dims["names"] == ["obs[0]", "obs[1]", "obs[2]"]
    assert dims["truth"]["values"][:2] == [[0, 1, 2], [0, 2, 2]]
    assert dims["dream"]["from"] == 1 and len(dims["dream"]["values"][0]) == 2
    assert view.pictures(playback)["real"].kind == "image/jpeg"  # 200 pixels wide


def test_pictures_are_lossless_while_small_and_mosaics_keep_their_parts() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (96, 64, 3)).astype(np.uint8)
    assert Picture.of(small).kind == "image/png"
    np.testing.assert_array_equal(Picture.of(small).frame(), small)
    large = np.zeros((97, 64, 1), np.uint8)
    assert Picture.of(large).kind == "image/jpeg" and Picture.of(large).frame().shape[2] == 3
    images = rng.integers(0, 256, (5, 8, 10, 3)).astype(np.uint8)
    whole = mosaic(images)  # 3 columns, 2 rows
    assert whole.shape == (8 + 2 + 8, 3 * 12 - 2, 3)
    np.testing.assert_array_equal(whole[10:, 12:22], images[4])
    assert (whole[8:10] == 255).all()


@pytest.mark.parametrize("image", [False, True], ids=["vector", "image"])
def test_a_clip_is_a_gif_of_what_led_to_the_dream_and_the_dream(image: bool) -> None:
    playback = start(env=tally(image=image, draws=True))
    go(playback, *[RIGHT] * 8)
    playback.do("seek", 7)
    playback.do("branch")
    go(playback, LEFT, LEFT, LEFT)
    gif = Image.open(io.BytesIO(view.episode_clip(playback)))
    assert gif.format == "GIF" and gif.n_frames == 5 + 1 + 3


def test_views_are_json_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "WINDOW", 8)
    playback = start()
    playback.do("dreams", 2)
    go(playback, *[RIGHT] * 20)
    playback.dreams.steps[-1].reading.curves["reward"][:] = np.nan
    numbers = json.loads(json.dumps(view.numbers(playback), allow_nan=False))
    reward = numbers["curves"]["reward"]
    assert (numbers["step"], numbers["first"], numbers["last"]) == (20, 14, 22)
    assert reward["from"] == reward["begin"] == 14 and len(reward["truth"]) == 7
    assert reward["mean"][-1] is None and len(reward["mean"]) == 7


# ------------------------------------------------------------------------------- actions


@pytest.mark.parametrize("action", ["discrete", "continuous", "mixed"])
def test_every_action_space_is_played(action: str) -> None:
    playback = start(env=tally(action=action))
    choice = {"discrete": [2], "continuous": [[0.5, -1]], "mixed": [1, [0.5, 0.25]]}[action]
    go(playback, choice)
    total = {"discrete": 2, "continuous": -0.5, "mixed": 1.75}[action]
    assert seen(playback)[-1][:2] == pytest.approx([1, total], abs=1e-6)
    assert view.numbers(playback)["choice"] == choice
    first = playback.controls.describe()["first"]
    assert first == {"discrete": [0], "continuous": [[0, 0]], "mixed": [0, [0, 0]]}[action]


@pytest.mark.parametrize("wrong", [None, [], [3], [-1], [True], ["0"], [0, 0], [[0]], {}])
def test_what_is_no_action_is_refused(wrong: Any) -> None:
    playback = start()
    assert not playback.do("act", wrong) and playback.notice
    assert playback.action.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("wrong", [[0], [[0.0]], [[0, float("nan")]], [[0, "1"]], [[0, 0, 0]]])
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    playback = start(env=tally(action="continuous"))
    assert not playback.do("act", wrong) and playback.notice


def test_no_such_command() -> None:
    playback = start()
    assert not playback.do("close") and playback.notice == "There is no command 'close'."
    assert not playback.do("agent", 1) and "neither true nor false" in playback.notice


def keys(action: Any, *names: str) -> dict[str, Any]:
    observation = Tally().observation_space
    return Controls(Spaces(observation, action), names).describe()["keys"]


def test_keys_of_action_spaces() -> None:
    from gymnasium import spaces as gym

    two = keys(gym.Discrete(2))
    assert two["1"] == two["ArrowLeft"] == {"part": 0, "index": 0}
    assert two["2"] == two["ArrowRight"] == {"part": 0, "index": 1}
    pong = keys(gym.Discrete(6), "noop", "fire", "right", "left", "rightfire", "leftfire")
    assert pong["ArrowLeft"] == {"part": 0, "index": 3} and pong["f"] == {"part": 0, "index": 1}
    assert "ArrowLeft" not in keys(gym.Discrete(4))  # nobody knows which is left
    many = keys(gym.Tuple([gym.MultiDiscrete([3, 2]), gym.Box(-1, 1, (3,))]))
    assert many["3"] == {"part": 0, "index": 2} and many["w"] == {"part": 1, "index": 1}
    assert many["ArrowUp"] == {"part": 2, "dim": 1, "value": 1}
    assert keys(gym.Discrete(12))["0"] == {"part": 0, "index": 9}


def test_names_of_actions() -> None:
    assert action_names(EnvConfig(id="CartPole-v1")) == ("left", "right")
    assert action_names(EnvConfig(id="ALE/Pong-v5"))[:3] == ("noop", "fire", "right")
    assert action_names(tally()) == ()
