"""Playing inside a dream, without a browser: record, dreams, branches, and the server's doors."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from conftest import PATH
from PIL import Image
from play_envs import Tally
from play_envs import config as tally
from small import FAMILY, make_small, perturbed
from test_cli import call

from worldflux_dist import config as configs
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.models.base import State
from worldflux_dist.serve import dreams, play, record, view
from worldflux_dist.serve.controls import Controls, action_names
from worldflux_dist.serve.pictures import Picture, mosaic, shaded
from worldflux_dist.serve.playback import REPEATS_NOT, Playback
from worldflux_dist.spaces import Spaces

LEFT, STAY, RIGHT = [0], [1], [2]
PATIENCE = 120


def start(
    family: str = "dreamerv3",
    seed: int = 5,
    env: EnvConfig | None = None,
    draws: bool = True,
    **options: Any,
) -> Playback:
    """A playback of a small agent in the Tally, of which no output is zero."""
    env = env or tally()
    envs = make_envs(env, 0, 1)
    spaces = envs.spaces
    envs.close()
    torch.manual_seed(0)
    agent = perturbed(make_small(family, spaces.observation, spaces.action, **options))
    return Playback(agent, env, seed, draws)


def go(playback: Playback, *choices: list[Any]) -> None:
    for choice in choices:
        assert playback.do("act", choice) and playback.do("step"), playback.notice


def tensors(state: State) -> dict[str, Any]:
    return {name: value.numpy() for name, value in state.tensors.items()}


def seen(playback: Playback) -> list[list[float]]:
    """The record's observations."""
    return [playback.record.truth(t).tolist() for t in range(playback.record.end + 1)]


# ------------------------------------------------------------------------------ the dream


@FAMILY
def test_a_dream_is_transition_of_the_recorded_posterior(family: str) -> None:
    playback = start(family)
    go(playback, RIGHT, LEFT, RIGHT, STAY)
    assert playback.do("sampling", False) and playback.do("dreams", 3)
    assert playback.do("seek", 2) and playback.mode == "replay"
    assert playback.do("step") and playback.do("step") and playback.now == 4
    model = playback.agent.world_model
    state = model.essential(playback.record.moments[2].posterior)
    state = state.map(lambda x: x.repeat_interleave(3, 0))
    noise = None if model.noise_shape is None else torch.full((3, *model.noise_shape), 0.5)
    with torch.no_grad():
        for action in (np.eye(3)[2], np.eye(3)[1]):  # RIGHT and STAY, as recorded
            went_in = torch.tensor(action, dtype=torch.float32).expand(3, -1)
            state = model.transition(state, went_in, noise)
        preds = model.decode(state).preds
    for name, value in tensors(state).items():
        np.testing.assert_array_equal(tensors(playback.dreams.steps[2].state)[name], value)
    curves = view.numbers(playback)["curves"]
    mean = preds["reward"].mean().item()
    assert curves["reward"]["mean"][-1] == pytest.approx(mean, rel=1e-3, abs=1e-6)
    going = (preds["continue"] / model.discount).clamp(0, 1).mean().item()
    assert curves["continue"]["mean"][-1] == pytest.approx(going, rel=1e-3)


def test_posteriors_and_values_are_the_agents() -> None:
    """TD-MPC2's, which draws nothing: states by `update`, step by step."""
    playback = start("tdmpc2")
    go(playback, RIGHT, LEFT)
    model, moments = playback.agent.world_model, playback.record.moments
    with torch.no_grad():
        state = model.encode(moments[0].step.obs)
        for moment, index in zip(moments[1:], (2, 0), strict=True):
            state = model.update(state, torch.eye(3)[[index]], moment.step.obs)
    for name, value in tensors(state).items():
        np.testing.assert_array_equal(tensors(moments[2].posterior)[name], value)
    again = playback.reader.value(moments[2].posterior)
    assert float(again[0]) == moments[2].value  # nothing is drawn anew


def test_the_record_is_what_the_environment_did() -> None:
    playback = start()
    go(playback, RIGHT, RIGHT, LEFT, STAY)
    cue = playback.record.truth(0)[2]
    assert seen(playback) == [[0, 0, cue], [1, 2, cue], [2, 4, cue], [3, 4, cue], [4, 5, cue]]
    reward = view.numbers(playback)["curves"]["reward"]
    assert reward["truth"] == [0, 2, 4, 4, 5] and reward["from"] == 0
    assert playback.mode == "together" and playback.now == playback.record.end == 4


def test_a_branch_differs_and_leaves_the_record_as_it_was() -> None:
    playback = start()
    playback.do("sampling", False)
    go(playback, RIGHT, RIGHT, RIGHT)
    before = seen(playback)
    assert playback.do("seek", 1)
    playback.do("step")
    recorded = tensors(playback.dreams.steps[-1].state)
    assert playback.do("seek", 1) and playback.do("branch") and playback.mode == "branch"
    go(playback, LEFT)
    other = tensors(playback.dreams.steps[-1].state)
    assert not np.array_equal(other["deter"], recorded["deter"])
    assert playback.do("rewind") and playback.now == 1
    go(playback, RIGHT)  # from the same moment, the action that was recorded
    np.testing.assert_array_equal(
        tensors(playback.dreams.steps[-1].state)["deter"], recorded["deter"]
    )
    go(playback, LEFT, LEFT, LEFT, LEFT)
    assert playback.now == 6 and playback.record.end == 3 and seen(playback) == before
    assert view.numbers(playback)["curves"]["obs"]["error"] == [None] * 6  # no truth to compare
    assert playback.do("branch") and playback.mode == "replay" and playback.now == 1


def test_a_branch_begins_at_the_posterior_and_not_where_the_dream_was() -> None:
    playback = start()
    go(playback, RIGHT, RIGHT, RIGHT)
    playback.do("branch")
    assert playback.now == playback.dreams.start == 3
    posterior = tensors(playback.record.moments[3].posterior)
    np.testing.assert_array_equal(
        tensors(playback.dreams.steps[0].state)["deter"], posterior["deter"]
    )


def test_going_on_replays_the_record_and_does_what_was_dreamt() -> None:
    playback = start()
    go(playback, RIGHT, RIGHT, RIGHT, RIGHT)
    cue, kept = playback.record.truth(0)[2], playback.record.moments[:2]
    playback.do("seek", 1)
    playback.do("branch")
    go(playback, LEFT, STAY)
    closed, envs = Tally.closed, playback.record._envs  # held, or its end would close it
    assert playback.do("go_on"), playback.notice
    assert Tally.closed == closed + 1 and envs is not playback.record._envs
    assert seen(playback) == [[0, 0, cue], [1, 2, cue], [2, 2, cue], [3, 3, cue]]
    assert playback.record.moments[:2] == kept
    assert playback.mode == "together" and playback.now == 3 and playback.dreams.start == 1
    assert None not in view.numbers(playback)["curves"]["obs"]["error"]
    go(playback, RIGHT)
    assert seen(playback)[-1] == [4, 5, cue]


def test_going_on_from_a_rewound_moment_forgets_what_came_after() -> None:
    playback = start()
    go(playback, RIGHT, RIGHT, RIGHT)
    playback.do("seek", 1)
    assert playback.do("go_on") and playback.record.end == 1 and playback.mode == "together"
    cue = playback.record.truth(0)[2]
    go(playback, LEFT)
    assert seen(playback) == [[0, 0, cue], [1, 2, cue], [2, 2, cue]]


def test_an_environment_that_does_not_repeat_itself_is_told() -> None:
    playback = start(env=tally(forgetful=True))
    go(playback, RIGHT, RIGHT, RIGHT)
    before = seen(playback)
    playback.do("seek", 1)
    assert not playback.do("go_on") and playback.notice == REPEATS_NOT
    assert seen(playback) == before and playback.mode == "branch"
    go(playback, LEFT)  # in the dream alone
    assert seen(playback) == before and playback.now == 2


def test_what_the_environment_ends_earlier_is_told() -> None:
    playback = start(env=tally(length=3))
    go(playback, RIGHT)
    playback.do("branch")
    go(playback, LEFT, LEFT, LEFT, LEFT)
    assert not playback.do("go_on")
    assert playback.notice == "In the environment the episode ended after 3 steps."
    assert playback.now == playback.record.end == 3


def test_after_the_end_the_dream_goes_on_alone_or_another_episode_begins() -> None:
    playback = start(env=tally(length=2))
    go(playback, RIGHT, RIGHT)
    assert not playback.do("step") and playback.notice.startswith("The episode ended after 2 steps")
    assert view.numbers(playback)["curves"]["continue"]["truth"] == [1, 1, 0]
    playback.do("branch")
    go(playback, LEFT)
    assert playback.now == 3
    assert playback.do("episode") and playback.now == playback.record.end == 0
    assert playback.record.seed == 6 and playback.mode == "together"
    other = start(seed=6, env=tally(length=2))
    assert seen(playback) == seen(other)


def test_sampling_off_makes_all_dreams_one_and_on_makes_them_differ() -> None:
    playback = start()
    go(playback, RIGHT, LEFT)
    playback.do("dreams", 8)
    playback.do("step")
    spread = view.numbers(playback)["curves"]
    assert max(spread["reward"]["std"]) > 0 and max(spread["obs"]["spread"]) > 0
    assert max(spread["value"]["std"]) > 0
    assert playback.do("sampling", False)
    spread = view.numbers(playback)["curves"]
    for name in ("reward", "continue", "value"):
        assert max(spread[name]["std"]) == pytest.approx(0, abs=1e-6), name
    assert max(spread["obs"]["spread"]) == pytest.approx(0, abs=1e-6)
    assert playback.do("sampling", True)
    assert max(view.numbers(playback)["curves"]["obs"]["spread"]) > 0


@FAMILY
def test_equal_dreams_have_no_spread_in_any_family(family: str) -> None:
    playback = start(family)
    playback.do("sampling", False)
    playback.do("dreams", 4)
    go(playback, RIGHT, LEFT)
    for name, curve in view.numbers(playback)["curves"].items():
        assert max(curve.get("std", curve.get("spread"))) == pytest.approx(0, abs=1e-5), name


def test_the_number_of_dreams_changes_with_what_was_dreamt() -> None:
    playback = start()
    playback.do("sampling", False)
    go(playback, RIGHT, LEFT, RIGHT)
    one = view.numbers(playback)["curves"]["reward"]["mean"]
    playback.do("dreams", 5)
    assert playback.dreams.num == 5 and playback.now == 3
    assert playback.dreams.steps[-1].state.tensors["deter"].shape[0] == 5
    assert view.numbers(playback)["curves"]["reward"]["mean"] == pytest.approx(one, abs=1e-4)
    playback.do("dreams", 99)
    assert playback.dreams.num == 16
    playback.do("dreams", 0)
    assert playback.dreams.num == 1
    assert not playback.do("dreams", "many") and "whole number" in playback.notice


def test_the_agent_takes_the_wheel_and_gives_it_back() -> None:
    playback = start()
    assert playback.do("agent", True)
    for _ in range(3):
        wanted = playback.reader.choose(playback.record.moments[-1].posterior)
        assert playback.do("step")
        np.testing.assert_array_equal(playback.record.moments[-1].step.action, wanted)
    playback.do("branch")
    wanted = playback.reader.choose(playback.dreams.steps[-1].state)
    playback.do("step")
    np.testing.assert_array_equal(playback.dreams.steps[-1].action, wanted)
    playback.do("agent", False)
    go(playback, STAY)
    assert playback.dreams.steps[-1].action.tolist() == [[0, 1, 0]]


def test_back_takes_one_step_of_the_dream_or_begins_one_earlier() -> None:
    playback = start()
    go(playback, RIGHT, RIGHT, RIGHT)
    playback.do("seek", 2)
    playback.do("step")
    assert playback.do("back") and (playback.now, playback.dreams.start) == (2, 2)
    assert playback.do("back") and (playback.now, playback.dreams.start) == (1, 1)
    assert playback.do("seek", 99) and playback.now == 3
    assert playback.do("seek", -1) and playback.now == 0
    assert playback.do("back") and playback.now == 0


def test_what_fills_the_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    playback = start()
    monkeypatch.setattr(record, "MEMORY", 0)
    assert not playback.do("step") and playback.notice.startswith("There is no memory for more")
    playback.do("branch")
    assert playback.do("step")
    monkeypatch.setattr(dreams, "MEMORY", 0)
    assert not playback.do("step") and playback.notice.startswith("There is no memory for more")


# ------------------------------------------------------------------- what families give


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


# -------------------------------------------------------------------------------- server

Talk = Callable[[aiohttp.ClientSession, play.Server, list[Any]], Awaitable[None]]


def serve(talk: Talk, env: EnvConfig | None = None) -> None:
    """Run `talk` with a client, a server and a list of weak references to all its playbacks."""
    alive: list[Any] = []

    def begin(draws: bool) -> Playback:
        playback = start(env=env, draws=draws)
        alive.append(weakref.ref(playback))
        return playback

    async def run() -> None:
        server = play.Server(begin, "a run")
        runner = web.AppRunner(server.app, shutdown_timeout=1)  # as the command serves
        await runner.setup()
        await web.TCPSite(runner, play.HOST, 0).start()
        url = f"http://{play.HOST}:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(url, headers={"Origin": url}) as client:
            await asyncio.wait_for(talk(client, server, alive), PATIENCE)
        await runner.cleanup()

    asyncio.run(run())


async def open_page(client: aiohttp.ClientSession, server: play.Server) -> Any:
    page = await client.ws_connect(f"/{server.token}/socket")
    assert (await page.receive_json())["about"]["title"] == "a run"
    return page


async def next_view(page: Any) -> dict[str, Any]:
    data = await page.receive_bytes()
    length = int.from_bytes(data[:4], "big")
    head = json.loads(data[4 : 4 + length])
    assert len(data) == 4 + length + sum(size for _, _, size in head["files"])
    head["data"] = data[4 + length :]
    return head


async def until(page: Any, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first view that is as wanted, each one answered."""
    while True:
        head = await next_view(page)
        await page.send_json({"do": "seen"})
        if wanted(head):
            return head


def test_only_the_token_opens() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        for path in ("/", "/wrong/", "/page.js", "/wrong/page.js", "/wrong/socket", "/a/b/c"):
            assert (await client.get(path)).status == 403, path
        for name in ("", "index.html", "page.css", "page.js", "draw.js"):
            answer = await client.get(f"/{server.token}/{name}")
            assert answer.status == 200, name
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert (await client.get(f"/{server.token}/none.js")).status == 404
        assert (await client.get(f"/{server.token}/..")).status in (403, 404)
        assert not alive

    serve(talk)


def test_a_foreign_page_is_refused() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        own = client.headers["Origin"]
        socket_url = f"{own}/{server.token}/socket"
        for origin in ("http://example.org", own.replace("http", "https"), "null", None):
            headers = {"Origin": origin} if origin else {}
            async with aiohttp.ClientSession(headers=headers) as stranger:
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await stranger.ws_connect(socket_url)
            assert refused.value.status == 403
        assert not alive

    serve(talk)


def test_a_closed_page_frees_all_that_was_its_own() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page, other = await open_page(client, server), await open_page(client, server)
        await next_view(page)
        first, second = alive
        assert first() is not None and first() is not second()
        closed, envs = Tally.closed, first().record._envs  # held, or its end would close it
        await page.close()
        while Tally.closed == closed:
            await asyncio.sleep(0.01)
        while first() is not None:
            gc.collect()
            await asyncio.sleep(0.01)
        assert envs is not second().record._envs  # a page has a playback of its own
        await next_view(other)
        await other.close()

    serve(talk)


def test_a_server_that_ends_tells_its_pages_and_closes_their_environments() -> None:
    closed: list[Any] = []

    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page = await open_page(client, server)
        await next_view(page)
        before = Tally.closed
        await server.app.shutdown()
        closed.append((await page.receive()).data)
        while Tally.closed == before:
            await asyncio.sleep(0.01)

    serve(talk)
    assert closed == [aiohttp.WSCloseCode.GOING_AWAY]


def test_a_page_that_closes_while_it_plays_frees_its_own() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page = await open_page(client, server)
        await page.send_json({"do": "speed", "value": 60})
        await page.send_json({"do": "play", "value": True})
        await until(page, lambda head: head["step"] > 3)
        await page.close()
        while alive[0]() is not None:
            gc.collect()
            await asyncio.sleep(0.01)

    serve(talk)


def test_what_could_not_draw_is_not_asked_again() -> None:
    """Without a display MuJoCo's second attempt never returns."""

    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        await server.rehearse()
        before = Tally.drawings
        page = await open_page(client, server)
        for command in ("step", "rewind", "go_on", "episode", "step"):
            await page.send_json({"do": command})
        head = await until(page, lambda head: (head["seed"], head["step"]) == (6, 1))
        assert head["files"] == [] and Tally.drawings == before
        await page.close()

    serve(talk, tally(draws="wrongly"))


def test_a_slow_page_loses_views_and_nothing_else() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page = await open_page(client, server)
        assert (await next_view(page))["step"] == 0
        await page.send_json({"do": "act", "value": LEFT})
        await page.send_json({"do": "act", "value": RIGHT})  # only the newest counts
        for _ in range(5):
            await page.send_json({"do": "step"})
        while alive[0]().now < 5:
            await asyncio.sleep(0.01)
        await page.send_json({"do": "seen"})
        head = await next_view(page)  # of those in between none was sent
        assert head["step"] == 5
        assert head["curves"]["reward"]["truth"] == [0, 2, 4, 6, 8, 10]
        await page.close()

    serve(talk)


def test_it_plays_by_the_clock_until_it_pauses_or_ends() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page = await open_page(client, server)
        await page.send_json({"do": "speed", "value": 60})
        await page.send_json({"do": "play", "value": True})
        await until(page, lambda head: head["step"] >= 3 and head["playing"])
        await page.send_json({"do": "play", "value": False})
        await until(page, lambda head: not head["playing"])
        await page.send_json({"do": "play", "value": True})
        head = await until(page, lambda head: head["notice"] != "")
        assert head["step"] == 12 and "ended after 12 steps" in head["notice"]
        await until(page, lambda head: not head["playing"]) if head["playing"] else None
        await page.close()

    serve(talk, tally(length=12))


def test_nonsense_ends_nothing_and_a_clip_comes_as_a_gif() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page = await open_page(client, server)
        for text in ("", "[]", "{", '{"do": []}', '{"do": "act"}', '{"do": "speed", "value": NaN}'):
            await page.send_str(text)
        await page.send_json({"do": "speed", "value": 10**9})
        for _ in range(3):
            await page.send_json({"do": "step"})
        head = await until(page, lambda head: head["step"] == 3)
        assert head["speed"] == 15
        await page.send_json({"do": "clip"})
        head = await until(page, lambda head: "clip" in head)
        assert head["clip"] == "play_envs-Tally-step3.gif"
        assert Image.open(io.BytesIO(head["data"])).n_frames > 1
        await page.close()

    serve(talk, tally(image=True))


def test_a_clip_that_cannot_be_is_a_sentence() -> None:
    async def talk(client: aiohttp.ClientSession, server: play.Server, alive: list[Any]) -> None:
        page = await open_page(client, server)
        alive[0]().agent.world_model.decodes_obs = False
        await page.send_json({"do": "clip"})
        await until(page, lambda head: "draws pictures for a clip" in head["notice"])
        await page.close()

    serve(talk)


# -------------------------------------------------------------------------- command line


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of an untrained agent in the Tally."""
    env = tally(image=True)
    playback = start(env=env)
    playback.close()
    settings = configs.load([], ["model=dreamerv3:size1m", f"env.id={env.id}"])
    text = configs.to_yaml(settings).replace("  kwargs: {}", "  kwargs: {image: true}")
    (tmp_path / "config.yaml").write_text(text)
    playback.agent.save(str(tmp_path))
    return tmp_path


def test_mistakes_are_one_sentence(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def said(*args: object) -> str:
        assert call(monkeypatch, "play", *args) == 2
        return capfd.readouterr().err

    assert said(tmp_path / "none") == (
        f"error: {tmp_path / 'none'} is no run directory: it has no config.yaml\n"
    )
    with socket.socket() as taken:
        taken.bind((play.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert said(run_dir, "--port", port).startswith(f"error: port {port} of 127.0.0.1 cannot ")
    (run_dir / "agent.json").unlink()
    assert said(run_dir).startswith(f"error: no agent in {run_dir}")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "worldflux_dist.serve.play")
    monkeypatch.delattr("worldflux_dist.serve.play")
    assert said(run_dir) == (
        "error: the page needs aiohttp: run `pip install 'worldflux_dist[serve]'`\n"
    )


@pytest.mark.slow
def test_ctrl_c_ends_it(run_dir: Path) -> None:
    command = [sys.executable, "-m", "worldflux_dist.cli", "play", str(run_dir)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": PATH},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("open http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and out.endswith("stopped\n")
    assert "Traceback" not in err
