"""Playing inside a dream: the record, dreams that leave it, branches, and going on for real."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from play_envs import LEFT, RIGHT, STAY, Tally, go, seen, start, tally, tensors
from small import FAMILY

from worldflux_dist.serve.play import dreams, record, view
from worldflux_dist.serve.play.playback import REPEATS_NOT


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
