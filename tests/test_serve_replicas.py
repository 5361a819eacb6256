"""Replicas: the imagination server as Ray actors, with authentication on; killed, added, and given
newer weights while clients go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from serving import WAIT_S, certificate, write_run
from small import same_sums
from test_serve_process import make_agent

from worldflux_dist import storage
from worldflux_dist.serve import places, replicas
from worldflux_dist.serve.client import Client
from worldflux_dist.serve.dreams import Dreams
from worldflux_dist.serve.here import Here
from worldflux_dist.serve.run import ServedRun
from worldflux_dist.serve.server import Security

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(small_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("served")
    write_run(folder, make_agent(), gradient_steps=10)
    assert is_token_auth_enabled()
    yield folder
    replicas.stop(str(folder))


@pytest.fixture(scope="module")
def serving(run: Path, tmp_path_factory: pytest.TempPathFactory) -> replicas.Serving:
    """With TLS and a token, as on a cluster, and on loopback, as all of these tests."""
    files = tmp_path_factory.mktemp("tls")
    certificate(files, "server", certificate(files, "ca"))
    pair = {"key": files / "server.key", "certificate": files / "server.pem"}
    return replicas.Serving(str(run), host="127.0.0.1", port=0, security=Security("s3cret", **pair))


@pytest.fixture(scope="module")
def two(run: Path, serving: replicas.Serving) -> list[str]:
    return replicas.start(str(run), serving, 2)


def client_of(serving: replicas.Serving, addresses: Any) -> Client:
    assert serving.security.key is not None
    ca = (serving.security.key.parent / "ca.pem").read_bytes()
    return Client(addresses, token="s3cret", ca=ca, timeout=WAIT_S)


def pid_of(run: Path, index: int) -> int:
    """The process of a replica, found by what it listens on."""
    address = storage.read_json(storage.as_path(run) / f"imagination/replica-{index}.json")
    port = int(address["address"].rpartition(":")[2])
    mine = psutil.Process().children(recursive=True)
    return next(
        p.pid
        for p in mine
        for c in p.net_connections()
        if c.status == "LISTEN" and c.laddr.port == port
    )


def test_replicas_answer_as_the_model_does(
    run: Path, serving: replicas.Serving, two: list[str]
) -> None:
    assert places.addresses(str(run)) == two
    local = Here(ServedRun(storage.as_path(run)).dreams())
    want = local.rollout(from_replay=6, horizon=5, seed=3)
    for address in two:
        with client_of(serving, address) as client:
            assert client.model().version == (0, 10)
            got = client.rollout(from_replay=6, horizon=5, seed=3)
            same_sums(got.rewards, want.rewards)
    assert list(replicas.status(str(run))) == [0, 1]


def test_no_call_is_lost(run: Path, serving: replicas.Serving, two: list[str]) -> None:
    """While clients call, a replica is killed and comes back, one is added, and weights change."""
    over, newer, failures = threading.Event(), threading.Event(), []

    def ask(number: int) -> None:
        with client_of(serving, two) as client:
            seed = number
            while not over.is_set():
                try:
                    got = client.rollout(from_replay=4, horizon=4, seed=seed)
                    if got.version == (0, 20):
                        newer.set()
                    assert got.rewards.shape == (4, 4) and np.isfinite(got.rewards).all()
                except Exception as error:
                    failures.append(error)
                    newer.set()
                    return
                seed += 7

    callers = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for caller in callers:
        caller.start()
    os.kill(pid_of(run, 0), signal.SIGKILL)
    added = replicas.start(str(run), serving, 3)
    assert len(set(added)) == 3 and added[1] == two[1]  # the first may have another port now
    write_run(run, make_agent(seed=1), gradient_steps=20)
    assert newer.wait(WAIT_S)
    over.set()
    for caller in callers:
        caller.join(WAIT_S)
    assert not failures
    lines = replicas.status(str(run))
    while not all("version 20" in line for line in lines.values()):
        lines = replicas.status(str(run))
    assert len(lines) == 3
    with client_of(serving, places.addresses(str(run))) as client:
        want = Here(Dreams(make_agent(seed=1), ServedRun(storage.as_path(run)).dreams().chunks))
        got: Any = client.rollout(from_replay=4, horizon=4, seed=5)
        same_sums(got.rewards, want.rollout(from_replay=4, horizon=4, seed=5).rewards)


def test_fewer_are_asked_for_and_none(run: Path, serving: replicas.Serving, two: list[str]) -> None:
    replicas.start(str(run), serving, 1)
    assert list(replicas.status(str(run))) == [0]
    assert len(places.addresses(str(run))) == 1
    assert replicas.stop(str(run)) == [0]
    assert replicas.status(str(run)) == {} and places.addresses(str(run)) == []


def test_on_addresses_that_others_see_there_must_be_tls_and_a_token(run: Path) -> None:
    with pytest.raises(ValueError, match="set --tls-key"):
        replicas.start(str(run), replicas.Serving(str(run)), 1)
    assert replicas.status(str(run)) == {}
