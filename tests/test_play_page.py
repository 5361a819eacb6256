"""The page of `worldflux-dist play` in a real browser: keys, dreams, curves and the clip."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image
from play_envs import start, tally

from worldflux_dist.serve.play import app as play

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect: Any = playwright.expect
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
ARGUMENTS = "no-sandbox disable-gpu disable-quic disable-background-networking"
ARGUMENTS += " disable-component-update disable-sync"
PATIENCE_MS = 120_000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome is installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        options = [f"--{name}" for name in ARGUMENTS.split()]
        browser = driver.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


class Served:
    """A server in a thread of its own, until `stop`."""

    def __init__(self, **options: Any) -> None:
        self._server = play.Server(lambda draws: start(**options), "a run")
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._ready.wait(120)

    async def _run(self) -> None:
        runner, self._ended = web.AppRunner(self._server.app, shutdown_timeout=1), asyncio.Event()
        await runner.setup()
        await web.TCPSite(runner, play.HOST, 0).start()
        self.url = f"http://{play.HOST}:{runner.addresses[0][1]}/{self._server.token}/"
        self._ready.set()
        await self._ended.wait()
        await runner.cleanup()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(120)
        assert not self._thread.is_alive()
        self._loop.close()


class Opened:
    """A page on a server of its own, what it complained of and where it asked."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.served = Served(**options)
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda asked: self.requests.append(asked.url))
        self.page.goto(self.served.url)
        self.at(0)

    def at(self, step: int, mode: str | None = None) -> None:
        """Wait until a view of this step is drawn."""
        expect(self.page.locator("body")).to_have_attribute("data-step", str(step), **PATIENT)
        if mode is not None:
            expect(self.page.locator("body")).to_have_attribute("data-mode", mode, **PATIENT)

    def press(self, key: str, step: int, mode: str | None = None) -> None:
        self.page.keyboard.press(key)
        self.at(step, mode)

    def drawn(self, selector: str) -> str:
        """What is drawn on a canvas, as a data URL."""
        drawn: str = self.page.locator(selector).evaluate("canvas => canvas.toDataURL()")
        return drawn

    def close(self) -> None:
        self.page.close()
        self.served.stop()


PATIENT = {"timeout": PATIENCE_MS}


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens pages; in the end none has complained, and all asked this machine alone."""
    pages: list[Opened] = []

    def open_page(**options: Any) -> Opened:
        pages.append(Opened(browser, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
        assert not page.complaints
        assert page.requests and all(
            re.match(r"(http|ws)://127\.0\.0\.1:|blob:http://127\.0\.0\.1:|data:", url)
            for url in page.requests
        ), page.requests


def test_keys_move_the_dream_and_its_curves(opened: Any) -> None:
    page = opened(env=tally(image=True))
    canvases = ["#real canvas", "#dream canvas", "#difference canvas"]
    canvases += ["canvas#reward", "canvas#continue", "canvas#value", "canvas#obs"]
    before = {name: page.drawn(name) for name in canvases}
    page.press("ArrowRight", 1, "together")  # no click came before
    page.press("3", 2)
    for name in canvases:
        assert page.drawn(name) != before[name], name
    expect(page.page.locator('[data-part="0"][data-index="2"]')).to_have_attribute(
        "aria-pressed", "true"
    )
    page.press(",", 1)
    page.press("h", 0)
    page.page.keyboard.press("d")
    page.page.locator('[data-part="0"][data-index="0"]').click()  # a click steps like a key
    page.at(1)


def test_a_branch_differs_and_can_be_done_for_real(opened: Any) -> None:
    page = opened(env=tally(image=True))
    page.page.keyboard.press("s")
    expect(page.page.locator("#do-sampling")).to_have_attribute("aria-pressed", "false", **PATIENT)
    for step in (1, 2, 3):
        page.press("3", step)
    page.press("h", 0, "replay")
    page.press(".", 1)
    recorded, real = page.drawn("#dream canvas"), page.drawn("#real canvas")
    page.press("h", 0)
    page.press("b", 0, "branch")
    page.press("1", 1)
    assert page.drawn("#dream canvas") != recorded and page.drawn("#real canvas") == real
    expect(page.page.locator("#count")).to_contain_text("step 1, 3 recorded")
    page.press("g", 1, "together")
    expect(page.page.locator("#count")).to_contain_text("step 1, 1 recorded")
    assert page.drawn("#real canvas") != real


def test_it_plays_while_the_agent_steers_and_pauses(opened: Any) -> None:
    page = opened(env=tally(length=6))
    page.page.keyboard.press("m")
    expect(page.page.locator("#do-agent")).to_have_attribute("aria-pressed", "true", **PATIENT)
    page.page.keyboard.press(" ")
    page.at(6)
    expect(page.page.locator("#notice")).to_contain_text(
        "The episode ended after 6 steps", **PATIENT
    )
    expect(page.page.locator("#do-play")).to_have_attribute("aria-pressed", "false", **PATIENT)
    page.press("n", 0, "together")


def test_sliders_steer_start_loops_and_set_the_dreams(opened: Any) -> None:
    page = opened(env=tally(action="mixed"))
    page.page.locator("#actions input").first.fill("0.5")
    for step in (1, 2, 3):
        page.press(".", step)
    page.page.locator("#timeline").fill("1")
    page.at(1, "replay")
    page.page.locator("#dreams").fill("4")
    expect(page.page.locator("#dream figcaption")).to_contain_text("4 dreams", **PATIENT)
    page.press(".", 2, "replay")
    expect(page.page.locator("#count")).to_contain_text("step 2, 3 recorded")


def test_the_clip_comes_as_a_file(opened: Any, tmp_path: Path) -> None:
    page = opened(env=tally(image=True))
    page.press("3", 1)
    page.press("3", 2)
    with page.page.expect_download(**PATIENT) as download:
        page.page.keyboard.press("c")
    assert download.value.suggested_filename == "play_envs-Tally-step2.gif"
    download.value.save_as(tmp_path / "clip.gif")
    clip = Image.open(tmp_path / "clip.gif")
    assert clip.format == "GIF" and clip.n_frames == 3


@pytest.mark.parametrize("image", [False, True], ids=["vector", "image"])
def test_a_family_without_pictures_says_so(opened: Any, image: bool) -> None:
    page = opened(family="tdmpc2", env=tally(image=image))
    before = page.drawn("canvas#value")
    page.press("3", 1)
    assert page.drawn("canvas#value") != before
    expect(page.page.locator("#dream")).to_have_attribute("title", re.compile("draws no pictures"))
    assert page.page.locator("canvas#obs").is_hidden()
    assert page.page.locator("#do-sampling").is_disabled()


def test_all_is_on_one_screen(opened: Any) -> None:
    page = opened(env=tally(action="mixed"))
    size = page.page.locator("html").evaluate("html => [html.scrollWidth, html.scrollHeight]")
    assert size == [1280, 800]
    box = page.page.locator("#controls").bounding_box()
    assert box["y"] + box["height"] <= 800


def test_a_server_that_ends_is_told(opened: Any) -> None:
    page = opened()
    page.served.stop()
    expect(page.page.locator("#notice")).to_contain_text("The server is gone", **PATIENT)
    page.served = Served()  # for the fixture to stop
