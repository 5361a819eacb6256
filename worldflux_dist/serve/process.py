"""`worldflux-dist serve`: one process that serves a run until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.serve import wire
from worldflux_dist.serve.requests import Limits
from worldflux_dist.serve.run import ServedRun
from worldflux_dist.serve.server import ImaginationServer, Security
from worldflux_dist.settings import parse

if TYPE_CHECKING:
    from upath import UPath


def security(
    token_file: Path | None, key: Path | None, certificate: Path | None, ca: Path | None
) -> Security:
    """Who may call. The token is in a file or the environment: an argument is seen by everyone on
    the machine. Raises ValueError for files that are missing or empty."""
    token = os.environ.get(wire.TOKEN, "")
    for path in (token_file, key, certificate, ca):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file")
    if token_file is not None:
        token = token_file.read_text().strip()
        if not token:
            raise ValueError(f"{token_file} is empty: put the token into it")
    return Security(token, key, certificate, ca)


def limits(settings: Sequence[str]) -> Limits:
    """From text such as horizon=64. Raises ValueError."""
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"limit {setting!r} is not of the form name=number")
        values[name] = yaml.safe_load(value)
    found: Limits = parse(Limits(), values, "there is no limit {}")
    return found


def serve(
    folder: UPath,
    device: str,
    threads: int,
    follow: bool,
    host: str,
    port: int,
    secure: Security,
    allowed: Limits,
) -> None:
    """Serve until SIGINT or SIGTERM; calls under way are answered first."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}: it must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: leave --device out")
    secure.check(host)  # before a large model is read
    run = ServedRun(folder, device)
    server = ImaginationServer(
        run.dreams(), allowed, secure, host, port, run.newer if follow else None
    )
    asyncio.run(_serve(server))


async def _serve(server: ImaginationServer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    dreams = server.answers.dreams
    tls = "TLS" if server.security.key else "no TLS"
    token = "a token" if server.security.token else "no token"
    print(
        f"serving {dreams.agent.recipe['model']} (version {dreams.version[1]}) at "
        f"{server.host}:{server.port}, {tls}, {token}, {dreams.num_starts} starts from replay",
        flush=True,
    )
    await stop.wait()
    await server.stop()
