"""The page that plays a dream by itself, in a real browser, from a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import make_small, perturbed

from worldflux_dist import config
from worldflux_dist.models.base import State

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed, reason="the extra onnx is not installed")

from worldflux_dist.serve import dream_page  # noqa: E402

STEPS = 15
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
POLE = gym_spaces.Box(-np.inf, np.inf, (4,))
SETTINGS = config.load([], ["env.id=CartPole-v1"])


def _agent() -> Any:
    torch.manual_seed(0)
    return perturbed(make_small("dreamerv3", POLE, gym_spaces.Discrete(2)))


@pytest.fixture(scope="module")
def ort() -> Path:
    """Where onnxruntime-web is: $WORLDFLUX_ORT, or node_modules in or beside the repository."""
    repository = Path(__file__).parents[1]
    named = os.environ.get("WORLDFLUX_ORT")
    for place in [Path(named)] if named else [repository, repository.parent]:
        try:
            return dream_page.runtime(place)[0].parent
        except RuntimeError:
            continue
    pytest.skip("no onnxruntime-web: npm install onnxruntime-web, or set WORLDFLUX_ORT")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as made:
        opened = made.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(ort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "dream.html"
    dream_page.write_page(_agent(), SETTINGS, path, ort)
    return path


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page, loaded; in the end nothing has gone wrong on it and nothing was asked for."""
    opened = browser.new_page()
    opened.set_default_timeout(120_000)
    wrong: list[str] = []
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    opened.evaluate("dream.ready")
    yield opened
    opened.close()
    assert not wrong
    assert file.as_uri() in asked
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def _press(page: Any, *keys: str) -> list[dict[str, Any]]:
    """The dream's history once all keys were pressed and what they asked for is done."""
    for key in keys:
        page.keyboard.press(key)
        page.evaluate("dream.settled()")
    history: list[dict[str, Any]] = page.evaluate(
        "dream.history.map((x) => ({ ...x, action: x.action && [...x.action] }))"
    )
    return history


def _state(page: Any) -> State:
    found = page.evaluate(
        "Object.entries(dream.state).map(([name, { dims, data }]) => [name, dims, [...data]])"
    )
    return State(
        {
            name.removeprefix("state/"): torch.tensor(data, dtype=torch.float32).reshape(dims)
            for name, dims, data in found
        }
    )


def _near(got: Any, want: torch.Tensor) -> None:
    size = max(1.0, want.abs().max().item())
    torch.testing.assert_close(torch.tensor(got), want, rtol=0, atol=1e-3 * size)


@pytest.mark.slow
@torch.no_grad()
def test_a_dream_steered_by_keys_is_the_models(page: Any) -> None:
    agent, start = _agent(), _state(page)
    model, noise = agent.world_model, torch.rand(STEPS, 1, *agent.world_model.noise_shape)
    page.evaluate(
        "(noise) => { dream.noise = (step, size) => Float32Array.from(noise[step - 1]); }",
        noise[:, 0].tolist(),
    )
    keys = ["ArrowRight", "ArrowLeft", "ArrowRight", "2", "1"] * 3
    history = _press(page, *keys)
    actions = torch.tensor([[0.0, 1.0] if k in ("ArrowRight", "2") else [1.0, 0.0] for k in keys])
    assert [said["action"] for said in history[1:]] == actions.tolist()
    rollout = model.rollout(start, actions[:, None], noise=noise)
    states = State.stack([rollout.states[t] for t in range(STEPS + 1)])[:, 0]
    preds = model.decode(states).preds
    _near([said["dims"] for said in history], preds["obs"])
    for name in ("reward", "continue"):
        _near([said[name] for said in history], preds[name])
    _near([said["value"] for said in history], agent.behavior.value(model.features(states)))
    for name, value in _state(page).tensors.items():
        _near(value[0].tolist(), states.tensors[name][-1])


@pytest.mark.slow
@torch.no_grad()
def test_m_gives_the_wheel_to_the_policy(page: Any) -> None:
    agent = _agent()
    taken, wanted = [], []
    page.keyboard.press("m")
    for _ in range(3):
        features = agent.world_model.features(_state(page))
        wanted.append(agent.behavior.act(features, greedy=True)[0].tolist())
        taken.append(_press(page, ".")[-1]["action"])
    assert taken == wanted
    steered = _press(page, "m", "ArrowRight" if taken[-1][0] else "ArrowLeft")
    assert steered[-1]["action"] != taken[-1]


@pytest.mark.slow
def test_a_dream_plays_pauses_and_begins_again(page: Any) -> None:
    first = _press(page)[0]
    assert page.inner_text("#count") == "step 0 of the dream, beginning 1 of 6"
    page.keyboard.press(" ")
    page.evaluate(
        "new Promise((done) => { const look = () => (dream.history.length > 5 ? done()"
        " : requestAnimationFrame(look)); look(); })"
    )
    assert "pause" in page.inner_text("#buttons")
    length = len(_press(page, " "))
    assert length > 5 and len(_press(page, ".")) == length + 1
    assert _press(page, "h") == [first]
    (other,) = _press(page, "n")
    assert other["dims"] != first["dims"]
    assert page.inner_text("#count") == "step 0 of the dream, beginning 2 of 6"


@pytest.mark.slow
def test_draws_of_the_pages_own_are_uniform_and_the_same_each_time(page: Any) -> None:
    draws = np.array(page.evaluate("[...dream.noise(1, 10_000)]"))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.std() - 12**-0.5) < 0.01
    page.reload()
    page.evaluate("dream.ready")
    assert page.evaluate("[...dream.noise(1, 10_000)]") == draws.tolist()


def test_dreams_begin_in_moments_of_real_episodes() -> None:
    agent = _agent()
    torch.manual_seed(1)
    found = dream_page.moments(agent, SETTINGS.env)
    shapes = {name: tuple(value.shape) for name, value in found.tensors.items()}
    assert shapes == {"deter": (6, 64), "stoch": (6, 8, 4)}
    assert len({tuple(row.tolist()) for row in found.tensors["deter"]}) == 6


def test_without_onnxruntime_web_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"not in .*: run `npm install onnxruntime-web` here"):
        dream_page.write_page(_agent(), SETTINGS, tmp_path / "dream.html", tmp_path)
    assert not (tmp_path / "dream.html").exists()
