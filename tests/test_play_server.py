"""The server of the page, without a browser: its doors, its sockets, and the command line."""

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
import pytest
from aiohttp import web
from conftest import PATH
from PIL import Image
from play_envs import LEFT, RIGHT, Tally, start, tally
from test_cli import call

from worldflux_dist import config as configs
from worldflux_dist.envs import EnvConfig
from worldflux_dist.serve.play import app as play
from worldflux_dist.serve.play.playback import Playback

PATIENCE = 120


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
    monkeypatch.delitem(sys.modules, "worldflux_dist.serve.play.app")
    monkeypatch.delattr("worldflux_dist.serve.play.app")
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
