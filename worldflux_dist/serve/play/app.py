"""The page that plays inside a dream: a server for one person at this machine.

What must stay true: it listens on 127.0.0.1 alone and answers only to who knows the token in its
URL; each page has a playback of its own, which ends with its WebSocket; all that computes runs in
one thread beside the event loop; and of what a page has not seen yet only the newest is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from worldflux_dist.agent import Agent
from worldflux_dist.envs import EnvConfig
from worldflux_dist.serve.play import view
from worldflux_dist.serve.play.playback import Playback

PAGE = Path(__file__).parents[1] / "page"
HOST = "127.0.0.1"
FASTEST = 60.0  # steps per second
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Work = Callable[..., Awaitable[Any]]  # a function and its arguments, run in the one thread


class Server:
    """Owns the thread, the token and the open sockets. `start` gives each page its playback, from
    whether the environment may be asked to draw itself."""

    def __init__(self, start: Callable[[bool], Playback], title: str) -> None:
        self.token = secrets.token_urlsafe(24)
        self._start, self._title, self._draws = start, title, True
        self._thread = ThreadPoolExecutor(1, "playback")
        self._sockets: set[web.WebSocketResponse] = set()
        self.app = web.Application()
        self.app.router.add_get(f"/{self.token}/socket", self._socket)
        self.app.router.add_get(f"/{self.token}/{{name:[a-z.]*}}", self._file)
        self.app.router.add_get("/{other:.*}", self._refuse)
        self.app.on_shutdown.append(self._shut)
        self.app.on_cleanup.append(self._end)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _begin(self) -> Playback:
        playback = self._start(self._draws)
        self._draws = playback.record.draws
        return playback

    async def rehearse(self) -> None:
        """Begin once: what is wrong is raised here, before there is a page."""
        playback = await self._run(self._begin)
        await self._run(playback.close)

    async def _refuse(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPForbidden(text="This page needs the whole URL that the command printed.")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = PAGE / (request.match_info["name"] or "index.html")
        if not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path, headers=HEADERS)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Origin") != f"http://{request.host}":
            raise web.HTTPForbidden(text="Another page than this server's own asked.")
        socket = web.WebSocketResponse(heartbeat=20, max_msg_size=2**16, compress=False)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            playback = await self._run(self._begin)
            try:
                await _Page(socket, playback, self._run).serve(self._title)
            finally:
                await asyncio.shield(self._run(playback.close))
        finally:
            self._sockets.discard(socket)
        return socket

    async def _shut(self, _: web.Application) -> None:
        for socket in list(self._sockets):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server ends")

    async def _end(self, _: web.Application) -> None:
        self._thread.shutdown()


class _Page:
    """One socket: reads what a person does, plays on by the clock, and shows the newest view."""

    def __init__(self, socket: web.WebSocketResponse, playback: Playback, run: Work) -> None:
        self._socket, self._playback, self._run = socket, playback, run
        self._playing, self._stale, self._seen = (asyncio.Event() for _ in range(3))
        self._stale.set()
        self._seen.set()
        self._speed = 15.0  # steps per second

    async def serve(self, title: str) -> None:
        """Until the socket closes."""
        try:
            await self._socket.send_json({"about": view.about(self._playback, title)})
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(task) for task in (self._play(), self._show())]
                async for message in self._socket:
                    if message.type == WSMsgType.TEXT:
                        await self._do(message.data)
                for task in tasks:
                    task.cancel()
        except* ConnectionResetError:
            pass  # it closed while something was sent

    async def _do(self, text: str) -> None:
        """One command, {"do": name, "value": ...}."""
        try:
            command = json.loads(text)
            name, value = str(command["do"]), command.get("value")
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        if name == "seen":
            self._seen.set()
        elif name == "play":
            (self._playing.set if value is True else self._playing.clear)()
        elif name == "speed":
            if isinstance(value, int | float) and 1 <= value <= FASTEST:
                self._speed = float(value)
        elif name == "clip":
            await self._clip()
        else:
            await self._run(self._playback.do, name, value)
        if name != "seen":
            self._stale.set()

    async def _play(self) -> None:
        """Steps by the clock, while it plays."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._playing.wait()
            due = clock() + 1 / self._speed
            if not await self._run(self._playback.do, "step"):
                self._playing.clear()
            self._stale.set()
            await asyncio.sleep(max(0.0, due - clock()))

    async def _show(self) -> None:
        """The newest view, whenever the page has drawn the one before: slow pages skip some."""
        while True:
            await self._stale.wait()
            await self._seen.wait()
            self._stale.clear()
            self._seen.clear()
            await self._socket.send_bytes(await self._run(self._view))

    def _view(self) -> bytes:
        return packed(
            view.numbers(self._playback)
            | {"playing": self._playing.is_set(), "speed": self._speed},
            {name: (p.kind, p.data) for name, p in view.pictures(self._playback).items()},
        )

    async def _clip(self) -> None:
        try:
            data = await self._run(view.episode_clip, self._playback)
        except ValueError as error:
            self._playback.notice = f"{error}"
            return
        name = re.sub(r"[^\w.-]+", "-", self._playback.config.id)
        name = f"{name}-step{self._playback.now}.gif"
        await self._socket.send_bytes(packed({"clip": name}, {"clip": ("image/gif", data)}))


def packed(numbers: dict[str, Any], files: dict[str, tuple[str, bytes]]) -> bytes:
    """One message: the length of a JSON head in four bytes (big-endian), the head, the files one
    after the other. The head is `numbers` and "files", [name, media type, length] of each."""
    index = [[name, kind, len(data)] for name, (kind, data) in files.items()]
    head = json.dumps(numbers | {"files": index}, allow_nan=False).encode()
    return b"".join([len(head).to_bytes(4, "big"), head, *(data for _, data in files.values())])


def play(agent: Agent, config: EnvConfig, seed: int, title: str, port: int) -> None:
    """Serve the page until Ctrl-C. Raises ValueError for a port that is taken, or an environment
    that cannot be built."""
    with suppress(KeyboardInterrupt):
        server = Server(lambda draws: Playback(agent, config, seed, draws), title)
        asyncio.run(_serve(server, port))
    print("stopped")


async def _serve(server: Server, port: int) -> None:
    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await server.rehearse()
        site = web.TCPSite(runner, HOST, port)
        try:
            await site.start()
        except OSError as error:
            raise ValueError(
                f"port {port} of {HOST} cannot be had ({error.strerror}): choose another by "
                "--port, or leave it out for a free one"
            ) from error
        print(f"open http://{HOST}:{runner.addresses[0][1]}/{server.token}/", flush=True)
        print("Ctrl-C ends it", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
