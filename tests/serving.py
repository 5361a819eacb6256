"""Imagination servers for tests, on free ports of loopback: in a thread of this process, or as the
command starts them."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from worldflux_dist import checkpoint, config, storage
from worldflux_dist.envs import make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.replay.shard import ReplayShard
from worldflux_dist.runner import EnvRunner
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


# --------------------------------------------------------------------------------- runs on disk


def write_run(
    folder: Path, agent: Any, gradient_steps: int = 1, env_id: str = "CartPole-v1", steps: int = 64
) -> None:
    """What a run leaves behind that is served: its settings, a checkpoint, and replay of `steps`
    random steps where there was none."""
    settings = config.from_dict({"model": agent.recipe["model"], "env": {"id": env_id}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    root = storage.as_path(folder)
    made = checkpoint.begin(root / "checkpoints", gradient_steps)
    agent.save(made)
    counters = {"gradient_steps": {"agent": gradient_steps}}
    checkpoint.commit(root / "checkpoints", made, gradient_steps, counters=counters)
    if steps and not (folder / "replay").exists():
        shard = ReplayShard(settings.replay, 0, root / "replay", "0001", 0, 1)
        with closing(make_envs(settings.env, 0, num_envs=2)) as envs:
            shard.add(EnvRunner(envs, random_act(envs.spaces, 0)).collect(steps))
        shard.seal().result(WAIT_S)
        shard.close()


@contextmanager
def process(run: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`worldflux-dist serve` in a process of its own, once it serves, and where."""
    command = [sys.executable, "-m", "worldflux_dist.cli", "serve", str(run), "--port", "0"]
    found = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert found.stdout is not None
        line = found.stdout.readline()
        at = re.search(r" at ([^ ,]+:\d+)", line)
        assert at, line
        yield found, at[1]
    finally:
        found.kill()
        found.wait()


# -------------------------------------------------------------------------------- certificates


def certificate(folder: Path, name: str, ca: Any = None) -> Any:
    """A key and certificate for 127.0.0.1, PEM files `name`.key and `name`.pem, signed by `ca`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca[1].subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
    )
    made = builder.sign(ca[0] if ca else key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(key.private_bytes(pem, *plain))
    (folder / f"{name}.pem").write_bytes(made.public_bytes(pem))
    return key, made
