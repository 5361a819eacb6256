"""Imagination servers for tests: in a thread of this process, on a free port of loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from worldflux_dist.serve.dreams import Dreams
from worldflux_dist.serve.server import ImaginationServer

WAIT_S = 120.0  # after so long waiting has failed


@contextmanager
def serving(dreams: Any, **options: Any) -> Iterator[Any]:
    """A server of an agent, or of dreams. `halt` cuts it off from its callers."""
    dreams = dreams if isinstance(dreams, Dreams) else Dreams(dreams)
    server, loop = ImaginationServer(dreams, **options), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(WAIT_S)

    run(server.start())
    server.halt = lambda: run(server.server.stop(0))  # as a process that dies
    try:
        yield server
    finally:
        run(server.stop(0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


def address(server: ImaginationServer) -> str:
    return f"127.0.0.1:{server.port}"
