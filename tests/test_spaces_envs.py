"""Every space a user brings: carried both ways, and told in full by `worldflux-dist envs check`."""

from __future__ import annotations

import copy
import json
from typing import Any

import gymnasium
import numpy as np
import pytest
import trouble_envs
from env_steps import collect
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from space_envs import SPACE_ENVS
from typer.testing import CliRunner

from worldflux_dist import cli
from worldflux_dist.envs import EnvConfig, make_envs, report
from worldflux_dist.spaces import Spaces

TROUBLES = "trouble_envs"
MLP = "read by the MLP"
CNN = "read by the image encoder"
FACTS = {
    "DictObs": [
        "Dict('camera': Box(0, 255, (16, 16, 3), uint8), 'joints': Box(-1.0, 1.0, (3,), float32))",
        f"camera image 16 x 16 x 3 uint8; conversion: none; {CNN}",
        f"joints vector of 3 float32; conversion: none; {MLP}",
        "action categorical of 2",
    ],
    "TupleInDictObs": [
        f"flag vector of 2 float32; conversion: one-hot; {MLP}",
        f"pair/0 vector of 4 float32; conversion: flattened, float64 -> float32; {MLP}",
        f"pair/1 vector of 3 float32; conversion: int8 -> float32; {MLP}",
    ],
    "DictAction": [
        "gear categorical of 3",
        "move Gaussian of 2; scaled [-1, 1] <- [-1, 1]",
    ],
    "MultiDiscreteAction": ["action categoricals of 2, 3"],
    "MultiBinaryAction": ["action categoricals of 2, 2"],
    "AsymmetricAction": ["action Gaussian of 2; scaled [-1, 3], [0, 10] <- [-1, 1]"],
    "IntegerAction": ["action Gaussian of 1; scaled [-2, 2] <- [-1, 1], rounded"],
    "DiscreteObs": ["Discrete(5, start=2)", f"obs vector of 5 float32; conversion: one-hot; {MLP}"],
    "MultiDiscreteObs": [f"obs vector of 11 float32; conversion: one-hot; {MLP}"],
    "MultiBinaryObs": ["obs vector of 4 float32; conversion: flattened, int8 -> float32"],
    "Float64Obs": [f"obs vector of 3 float32; conversion: float64 -> float32; {MLP}"],
    "ScalarObs": ["Box(-1.0, 1.0, (), float32)", "vector of 1 float32; conversion: flattened"],
    "GrayImage": [f"obs image 84 x 84 x 1 uint8; conversion: none; {CNN}"],
    "TallImage": [f"obs image 96 x 72 x 3 uint8; conversion: none; {CNN}"],
    "ChannelsFirstImage": [
        "Box(0.0, 1.0, (3, 16, 12), float32)",
        "obs image 16 x 12 x 3 uint8; conversion: 0..1 floats -> uint8, C x H x W -> H x W x C; ",
    ],
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LOOK_STEPS", 60)
    monkeypatch.setattr(report, "RUN_STEPS", 200)


def check(name: str, **options: Any) -> report.Report:
    return report.check(EnvConfig(f"{TROUBLES}:{name}", **options))


def text(found: report.Report) -> str:
    """The report with every run of blanks made one."""
    return "\n".join(" ".join(line.split()) for line in found.lines())


# ------------------------------------------------------------------------------- the spaces carried


@pytest.mark.parametrize("name", SPACE_ENVS)
def test_check_tells_what_becomes_of_the_spaces(name: str) -> None:
    found = report.check(EnvConfig(f"space_envs:{name}"))
    said = text(found)
    for fact in [*FACTS[name], f"env space_envs:{name}\n", "action repeat 1\n"]:
        assert fact in said
    assert found.usable
    assert not found.warnings
    assert found.lines()[-1] == "usable"
    assert len(found.episodes) >= 200 // 22
    assert {10 <= length <= 20 for length in found.episodes} == {True}
    assert found.steps_per_second > 0
    assert found.rewards is not None
    assert 0 <= found.rewards[0] < found.rewards[1] <= 1


@pytest.mark.parametrize("name", SPACE_ENVS)
def test_steps_obey_the_specs_and_episodes_end_both_ways(name: str) -> None:
    envs = make_envs(EnvConfig(f"space_envs:{name}", 2, max_failures=1), seed=0)
    chunk = collect(envs, 150)
    chunk.check()
    assert chunk.is_terminal.any()
    assert (chunk.is_last & ~chunk.is_terminal).any()
    for key, spec in envs.spaces.obs.items():
        assert chunk.obs[key].shape == (2, 150, *spec.shape)
        assert chunk.obs[key].dtype == spec.dtype
        assert len(np.unique(chunk.obs[key].reshape(300, -1), axis=0)) == 2  # it shows the bit
    assert chunk.reward.std() > 0.1


@pytest.mark.parametrize("name", SPACE_ENVS)
def test_actions_reach_both_ends_of_their_space(name: str) -> None:
    space = SPACE_ENVS[name].action_space
    both = Spaces(spaces.Discrete(2), space)
    ends: list[list[float]] = [[], []]  # the first of each discrete part and -1, the last and 1
    for part in both.action_parts:
        discrete = part.kind == "discrete"
        columns = np.eye(part.size)[[0, -1]] if discrete else np.outer([-1, 1], np.ones(part.size))
        for end, column in zip(ends, columns, strict=True):
            end.extend(column)
    flat = np.concatenate([np.array(ends), both.random_action(np.random.default_rng(0), 20)])
    low, high, *others = iterate(batch_space(space, 22), both.decode_action(flat))
    assert all(space.contains(action) for action in (low, high, *others))
    for leaf, least, greatest in zip(leaves(space), leaves(low), leaves(high), strict=True):
        if isinstance(leaf, spaces.Box):
            assert (least == leaf.low).all()
            assert (greatest == leaf.high).all()
        else:
            start = getattr(leaf, "start", 0)
            size = getattr(leaf, "nvec", 2 if isinstance(leaf, spaces.MultiBinary) else None)
            assert (least == start).all()
            assert (greatest == start + (leaf.n if size is None else size) - 1).all()


def leaves(nested: Any) -> list[Any]:
    if isinstance(nested, dict | spaces.Dict):
        return [leaf for key in sorted(nested) for leaf in leaves(nested[key])]
    return [nested]


# ------------------------------------------------------------------------------------- odd corners


def round_trip(space: gymnasium.Space) -> Spaces:
    saved = json.dumps(Spaces(space, space).to_json())
    back = Spaces.from_json(json.loads(saved))
    assert back.observation == space
    assert back.observation.dtype == space.dtype
    return back


@pytest.mark.parametrize(
    ("space", "shapes"),
    [
        (spaces.Discrete(1), {"obs": (1,)}),
        (spaces.Discrete(np.int64(3), start=np.int64(-2)), {"obs": (3,)}),
        (spaces.Box(0, 1, (4,), bool), {"obs": (4,)}),
        (spaces.Box(0, 1, (12, 12), bool), {"obs": (144,)}),
        (spaces.Box(-3, 3, (2, 2), np.int16), {"obs": (4,)}),
        (spaces.Box(0, 255, (1, 12, 10), np.uint8), {"obs": (12, 10, 1)}),
        (spaces.Box(0, 255, (12, 10), np.uint8), {"obs": (12, 10, 1)}),
        (spaces.MultiDiscrete([2, 3], dtype=np.uint8), {"obs": (5,)}),
        (
            spaces.Dict({str(i): spaces.Discrete(i + 1) for i in (0, 2, 10)}),
            {"0": (1,), "10": (11,), "2": (3,)},
        ),
        (spaces.Dict({0: spaces.Discrete(2), 1: spaces.Discrete(3)}), {"0": (2,), "1": (3,)}),
        (spaces.Dict({0: spaces.Discrete(2), "a": spaces.Discrete(3)}), {"0": (2,), "a": (3,)}),
        (
            spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Discrete(3)}),
            {"a": (3,), "a/b": (2,)},
        ),
    ],
)
def test_odd_spaces_are_carried_both_ways(space: gymnasium.Space, shapes: dict[str, Any]) -> None:
    space = copy.deepcopy(space)
    space.seed(0)
    both = round_trip(space)
    raw = concatenate(space, [space.sample() for _ in range(3)], create_empty_array(space, 3))
    out = both.encode_obs(raw)
    assert {key: value.shape for key, value in out.items()} == {
        key: (3, *shape) for key, shape in shapes.items()
    }
    flat = both.random_action(np.random.default_rng(0), 3)
    dealt = iterate(batch_space(space, 3), both.decode_action(flat))
    assert all(space.contains(action) for action in dealt)


def test_integers_without_bounds_survive_saving() -> None:
    info = np.iinfo(np.int64)
    space = spaces.Box(info.min, info.max, (2,), np.int64)
    saved = json.dumps(Spaces(space, spaces.Discrete(2)).to_json())
    assert Spaces.from_json(json.loads(saved)).observation == space


def test_integer_actions_are_rounded_to_the_nearest() -> None:
    both = Spaces(spaces.Discrete(2), spaces.Box(-2, 2, (1,), np.int32))
    flat = np.array([[-1], [-0.7], [-0.3], [-0.2], [0.2], [0.3], [0.7], [0.8]], np.float32)
    assert both.decode_action(flat).tolist() == [[-2], [-1], [-1], [0], [0], [1], [1], [2]]


def test_actions_of_a_huge_range_stay_finite() -> None:
    space = spaces.Box(-3e38, 3e38, (1,), np.float32)
    ends = Spaces(spaces.Discrete(2), space).decode_action(np.array([[-1], [0], [1]], np.float32))
    assert ends.tolist() == [space.low.tolist(), [0], space.high.tolist()]


def test_large_one_hots_cost_what_they_hold() -> None:
    both = Spaces(spaces.Discrete(10**6), spaces.Discrete(2))  # its square would be 4 TB
    assert both.encode_obs(np.array([10**6 - 1]))["obs"].argmax() == 10**6 - 1
    with pytest.raises(ValueError, match="outside its space"):
        both.encode_obs(np.array([-1]))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Box(-1, 1, (0,)), r"space Box.* is empty: leave it out"),
        (spaces.Dict({}), "is empty"),
        (spaces.Dict(x=spaces.Tuple(())), "at x is empty"),
        (spaces.Dict({("a", 1): spaces.Discrete(2)}), "has the key .* use text"),
        (spaces.OneOf((spaces.Discrete(2), spaces.Discrete(3))), "not supported: use .*wrap"),
        (spaces.Graph(spaces.Discrete(2), None), "not supported: use .*wrap"),
        (spaces.Sequence(spaces.Discrete(2)), "not supported: use .*wrap"),
        (spaces.Dict(a=spaces.Text(4)), "not supported: use .*wrap"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_a_remedy(
    space: gymnasium.Space, words: str
) -> None:
    for pair in ((space, spaces.Discrete(2)), (spaces.Discrete(2), space)):
        with pytest.raises(ValueError, match=words):
            Spaces(*pair)


def test_two_observations_of_one_name_are_refused() -> None:
    space = spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(3))})
    with pytest.raises(ValueError, match="two observations are named 'a/b' inside: rename"):
        Spaces(space, spaces.Discrete(2))


# ----------------------------------------------------------------------------------------- troubles


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Outside", "obs takes the value 7, outside its declared bounds [-1, 1]; it is passed on"),
        ("Bright", "obs takes the value 200, outside its declared bounds [0, 1]; it is clipped"),
        ("WiderType", "obs is handed out as float64 and declared as float32: it is converted"),
        ("Unseeded", "two resets with the seed 0 gave different observations"),
        ("IntImage", "obs of shape (16, 12) looks like an image and is read as a vector"),
        ("FloatImage", "obs of shape (16, 12, 3) looks like an image and is read as a vector"),
        ("Large", "an observation takes 1.0 MB in replay: make images smaller"),
        ("Endless", "no episode ended in 200 steps and no time limit is known: set env.max_epi"),
    ],
)
def test_warnings(name: str, words: str) -> None:
    found = check(name)
    assert found.usable
    (line,) = (line for line in text(found).splitlines() if line.startswith("warning"))
    assert line.startswith(f"warning {words}")
    assert found.lines()[-1] == "usable"


@pytest.mark.parametrize("name", ["OutsideByRounding", "ArrayReward"])
def test_no_warning_of_what_does_no_harm(name: str) -> None:
    assert check(name).usable and not check(name).warnings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Unholdable", "obs is handed out as float64 and declared as uint8, which cannot hold it"),
        ("NotFinite", "obs: the observation is not finite"),
        ("WrongShape", "obs: the observation has shape (3,), not (2,)"),
        ("WrongValue", "obs: the observation 3 is not in Discrete(3)"),
        ("PartMissing", "the observation lacks b: return all its parts"),
        ("TextReward", "the reward is 'one': return one finite number"),
        ("NoReward", "the reward is None: return one finite number"),
        ("Unbounded", "action space Box(-inf, inf, (2,), float32) has no finite bounds: give it"),
        ("HalfBounded", "action space Box([ 0. -1.], [inf 1.], (2,), float32) has no finite boun"),
        ("Unsupported", "observation space Text("),
        ("Raises", "step raised ZeroDivisionError: division by zero (" + trouble_envs.__file__),
        ("FourThings", "step must return five things"),
        ("OnlyObs", "reset must return two things"),
        ("NotThere", f"unknown env {TROUBLES}:NotThere"),
    ],
)
def test_what_cannot_be_used_says_why(name: str, words: str) -> None:
    found = check(name)
    assert not found.usable
    assert text(found).splitlines()[-1].startswith(f"not usable: {words}")


def test_what_a_run_makes_anew_is_a_warning() -> None:
    """Here in the look, and in the run that is the judge."""
    for life, warning in (
        (4, f"env {TROUBLES}:RaisesLate lane 0 failed (1 of at most 5 in a row): ZeroDivisionErr"),
        (3, "step raised ZeroDivisionError: division by zero (" + trouble_envs.__file__),
    ):
        trouble_envs.RaisesLate.lives, trouble_envs.RaisesLate.broken_life = 0, life
        found = check("RaisesLate")
        assert found.lines()[-1] == "usable"
        (said,) = found.warnings.values()
        assert said.startswith(warning)


def test_one_that_fails_slowly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too slow to fail max_failures times while it is looked at: nothing shows that it goes on."""
    monkeypatch.setattr(report, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(report, "RUN_STEPS", 10)
    found = check("Raises", max_failures=1000)
    assert found.lines()[-1].startswith("not usable: step raised ZeroDivisionError")


def test_an_unsupported_space_is_still_shown() -> None:
    assert "observation space Dict('name': Text(" in text(check("Unsupported"))


def test_a_time_limit_is_told() -> None:
    found = check("Endless", max_episode_steps=30)
    assert "time limit 30 steps\n" in text(found)
    assert "episodes 6 ended after 30 steps\n" in text(found)
    assert not found.warnings


# ----------------------------------------------------------------------------------------- command


def test_command_takes_settings_after_the_id() -> None:
    done = CliRunner().invoke(
        cli.app, ["envs", "check", "ALE/Pong-v5", "env.image_size=32", "env.frame_skip=3"]
    )
    said = " ".join(done.stdout.split())
    assert done.exit_code == 0
    assert f"obs image 32 x 32 x 3 uint8; conversion: none; {CNN}" in said
    assert "time limit 36,000 steps action repeat 3 usable" in said


def test_command_fails_where_the_environment_cannot_be_used() -> None:
    done = CliRunner().invoke(cli.app, ["envs", "check", f"{TROUBLES}:Raises"])
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1].startswith("not usable: step raised ZeroDivisionError")
