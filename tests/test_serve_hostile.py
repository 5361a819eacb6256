"""The imagination service among people who mean harm, or make mistakes: every one of them is told
what is wrong, nobody else notices, and nothing grows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import WAIT_S, address, certificate, serving
from small import look, make_case

from worldflux_dist.serve import wire
from worldflux_dist.serve.client import AsyncClient, Client, ImaginationError
from worldflux_dist.serve.dreams import Dreams
from worldflux_dist.serve.process import limits, security
from worldflux_dist.serve.requests import Limits, Requests
from worldflux_dist.serve.server import ImaginationServer, Security

CASE = ("token", "dict", "discrete")  # whose states have whole numbers, too
messages = wire.messages


@pytest.fixture(scope="module")
def dreams() -> Dreams:
    return Dreams(make_case(CASE))


@pytest.fixture(scope="module")
def server(dreams: Dreams) -> Iterator[Any]:
    few = Limits(horizon=32, lanes=64, samples=8, steps=16, request_bytes=2**20, calls=2000)
    with serving(dreams, limits=few) as found:
        yield found


@pytest.fixture(scope="module")
def methods(server: Any) -> Iterator[dict[str, Any]]:
    with grpc.insecure_channel(address(server)) as channel:
        yield wire.calls(wire.IMAGINATION, channel)


@pytest.fixture(scope="module")
def state(server: Any, dreams: Dreams) -> dict[str, np.ndarray]:
    with Client(address(server)) as client:
        return client.encode(look(dreams.agent))


def status(call: Callable[[], Any]) -> tuple[str, str]:
    """The name of the status a call ends with, and what is said."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code().name, error.value.details()


def imagine(state: dict[str, np.ndarray], **fields: Any) -> Any:
    request = messages.ImagineRequest(**{"horizon": 2} | fields)
    request.state.tensors.extend(wire.tensors(state))
    return request


# ----------------------------------------------------------------------------- wrong requests


def changed(state: dict[str, np.ndarray], name: str, value: Any) -> dict[str, np.ndarray]:
    return state | {name: np.asarray(value)}


WRONG: list[tuple[str, Callable[[dict[str, np.ndarray]], Any]]] = [
    ("start is missing", lambda s: messages.ImagineRequest(horizon=2)),
    ("horizon: 1000000000 are more than the 32", lambda s: imagine(s, horizon=10**9)),
    ("samples: 9 are more than the 8", lambda s: imagine(s, samples=9)),
    ("samples: 4294967295 are more", lambda s: imagine(s, samples=2**32 - 1)),
    ("heads has 'nonsense'", lambda s: imagine(s, heads=["nonsense"])),
    ("no replay", lambda s: messages.ImagineRequest(from_replay=3)),
    ("state lacks kv", lambda s: imagine({n: x for n, x in s.items() if n != "kv"})),
    ("state.hidden is float32", lambda s: imagine(changed(s, "hidden", s["hidden"][:, :2]))),
    ("state.hidden is float64", lambda s: imagine(changed(s, "hidden", s["hidden"].astype("f8")))),
    ("state.hidden is float32", lambda s: imagine(changed(s, "hidden", s["hidden"][:1]))),
    ("not finite", lambda s: imagine(changed(s, "hidden", s["hidden"] * np.nan))),
    ("not finite", lambda s: imagine(changed(s, "hidden", s["hidden"] + np.inf))),
    ("state.tokens has a number", lambda s: imagine(changed(s, "tokens", s["tokens"] + 10**6))),
    ("state.tokens has a number", lambda s: imagine(changed(s, "tokens", s["tokens"] - 10**6))),
    ("state.length has a number", lambda s: imagine(changed(s, "length", s["length"] + 100))),
    ("state is empty", lambda s: imagine({n: x[:0] for n, x in s.items()})),
    ("action is float32", lambda s: imagine(s, action=wire.tensor(np.zeros((2, 3, 1), "f4")))),
    (
        "horizon is 2 and action has 5",
        lambda s: imagine(s, action=wire.tensor(np.zeros((5, 3, 3), "f4"))),
    ),
    (
        "action has the datatype 'BYTES'",
        lambda s: imagine(s, horizon=0, action=messages.Tensor(datatype="BYTES", shape=[1, 1, 1])),
    ),
    (
        "action has 3 bytes, and 36 are",
        lambda s: imagine(
            s, horizon=0, action=messages.Tensor(datatype="FP32", shape=[1, 3, 3], data=b"abc")
        ),
    ),
    (
        "bytes",
        lambda s: imagine(
            s, horizon=0, action=messages.Tensor(datatype="FP32", shape=[1, 2**62, 2**62], data=b"")
        ),
    ),
    (
        "that is none",
        lambda s: imagine(
            s, horizon=0, action=messages.Tensor(datatype="FP32", shape=[-1, 3, 3], data=b"")
        ),
    ),
    (
        "that is none",
        lambda s: imagine(
            s, horizon=0, action=messages.Tensor(datatype="FP32", shape=[1] * 99, data=b"abcd")
        ),
    ),
]


@pytest.mark.parametrize(("why", "make"), WRONG, ids=[why for why, _ in WRONG])
def test_what_is_wrong_is_named(
    why: str, make: Any, methods: dict[str, Any], state: dict[str, np.ndarray]
) -> None:
    code, said = status(lambda: list(methods["Imagine"](make(state), timeout=WAIT_S)))
    assert code == "INVALID_ARGUMENT"
    assert why in said and len(said) < 500


def test_wrong_observations_are_named(methods: dict[str, Any], dreams: Dreams) -> None:
    obs = look(dreams.agent)
    cases = {
        "must be image, vector": {"image": obs["image"]},
        "observations.vector is float32": obs | {"vector": obs["vector"][:, :3]},
        "observations.image is float32": obs | {"image": obs["image"].astype(np.float32)},
        "observations is empty": {name: value[:0] for name, value in obs.items()},
        "are more than the 64 of limits.lanes": {n: x.repeat(30, 0) for n, x in obs.items()},
        "axes before the shape": {name: value[0] for name, value in obs.items()},
    }
    for why, given_obs in cases.items():
        request = messages.EncodeRequest(observations={"tensors": wire.tensors(given_obs)})
        code, said = status(lambda r=request: methods["Encode"](r, timeout=WAIT_S))
        assert code == "INVALID_ARGUMENT" and why in said, said
    twice = wire.tensors(obs) + wire.tensors({"vector": obs["vector"]})
    request = messages.ActRequest(observations={"tensors": twice})
    assert "twice" in status(lambda: methods["Act"](request, timeout=WAIT_S))[1]


def test_what_is_too_large_is_refused(
    server: Any, methods: dict[str, Any], state: dict[str, np.ndarray]
) -> None:
    large = imagine(state, action=messages.Tensor(data=bytes(2**21)))
    code, said = status(lambda: list(methods["Imagine"](large, timeout=WAIT_S)))
    assert code == "RESOURCE_EXHAUSTED" and "larger than max" in said
    with Client(address(server)) as client, pytest.raises(ImaginationError, match="larger than"):
        client.rollout(state, np.zeros((2**18, 3, 3)))  # told at once, not after all tries
    few = Limits(answer_bytes=2000)
    refused = pytest.raises(ImaginationError, match="ask for fewer rows, steps or heads")
    with serving(server.dreams, limits=few) as narrow, Client(address(narrow)) as client, refused:
        client.rollout(state, horizon=30, heads=("obs",))


# ------------------------------------------------------------------------------ time and load


def test_a_deadline_ends_a_rollout(methods: dict[str, Any], state: dict[str, np.ndarray]) -> None:
    request = imagine(state, horizon=32, samples=8)
    assert (
        status(lambda: list(methods["Imagine"](request, timeout=0.001)))[0] == "DEADLINE_EXCEEDED"
    )


@pytest.mark.parametrize(("timeout", "kept"), [(None, 0.3), (0.3, 60.0)])
def test_a_rollout_nobody_waits_for_is_ended(
    timeout: float | None, kept: float, dreams: Dreams, state: dict[str, np.ndarray]
) -> None:
    """Between two steps, whether the caller left or the time of the call is over."""
    begun, ended = threading.Event(), threading.Event()

    class Slow(Dreams):
        def imagine(self, calls: Any, going: Any = lambda: True) -> Iterator[Any]:
            for block in super().imagine(calls, going):
                begun.set()
                while going():  # a step that takes until the caller has left
                    time.sleep(0.001)
                yield block
            ended.set()

    slow, few = Slow(dreams.agent), Limits(seconds=kept)
    with serving(slow, limits=few) as server, grpc.insecure_channel(address(server)) as channel:
        call = wire.calls(wire.IMAGINATION, channel)["Imagine"]
        request = imagine(state, horizon=30, by_step=True)
        assert status(lambda: list(call(request, timeout=timeout)))[0] == "DEADLINE_EXCEEDED"
        assert begun.is_set() and ended.wait(WAIT_S)
        while server.answers.batches.held:
            time.sleep(0.001)


def test_a_thousand_at_a_time(server: Any, state: dict[str, np.ndarray]) -> None:
    """All are answered, or told that there is no room; memory comes back."""
    process = psutil.Process()

    async def ask(client: AsyncClient, seed: int) -> Any:
        return await client.rollout(state, horizon=1, seed=seed, heads=("obs", "value"))

    async def ask_all() -> list[Any]:
        async with AsyncClient(address(server), timeout=WAIT_S) as client:
            return await asyncio.gather(*(ask(client, s) for s in range(1000)))

    asyncio.run(ask_all())
    before = process.memory_info().rss
    answers = asyncio.run(ask_all())
    assert len(answers) == 1000 and all(a.values.shape == (2, 3) for a in answers)
    del answers
    assert process.memory_info().rss - before < 200 * 2**20
    assert server.answers.batches.held == 0


def test_more_calls_than_the_limit_are_refused(
    dreams: Dreams, state: dict[str, np.ndarray]
) -> None:
    free = threading.Event()

    class Waiting(Dreams):
        def encode(self, calls: Any) -> Any:
            free.wait(WAIT_S)
            return super().encode(calls)

    request = messages.EncodeRequest(observations={"tensors": wire.tensors(look(dreams.agent))})
    few = Limits(calls=3)
    with (
        serving(Waiting(dreams.agent), limits=few) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        encode = wire.calls(wire.IMAGINATION, channel)["Encode"]
        taken = [encode.future(request, timeout=WAIT_S) for _ in range(8)]
        refused = 0
        while refused < 5:
            refused = sum(c.done() and c.code().name == "RESOURCE_EXHAUSTED" for c in taken)
        free.set()
        assert sum(c.code().name == "OK" for c in taken) == 3


def test_bytes_under_way_are_bounded(dreams: Dreams, state: dict[str, np.ndarray]) -> None:
    with serving(dreams) as server, Client(address(server), timeout=1) as client:
        server.answers.batches.room = 100
        with pytest.raises(ImaginationError, match="under way"):
            client.rollout(state, horizon=30)


# --------------------------------------------------------------------------------- who may call


def test_who_has_no_token_is_refused(dreams: Dreams) -> None:
    with serving(dreams, security=Security(token="s3cret")) as server:
        with Client(address(server), token="s3cret") as client:
            assert client.model().name == "token:small"
            list(client.steps(obs=look(dreams.agent), horizon=1))
        for token in ("", "wrong", "s3cret "):
            with Client(address(server), token=token) as client:
                for call in (
                    client.model,
                    lambda c=client: client.rollout(obs=look(dreams.agent), horizon=1),
                ):
                    with pytest.raises(ImaginationError, match="UNAUTHENTICATED"):
                        call()
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        with grpc.insecure_channel(address(server)) as channel:  # what a probe asks
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


def test_tls_with_certificates_of_both_sides(dreams: Dreams, tmp_path: Path) -> None:
    ca, other = certificate(tmp_path, "ca"), certificate(tmp_path, "other")
    certificate(tmp_path, "server", ca)
    certificate(tmp_path, "client", ca)
    certificate(tmp_path, "stranger", other)

    def read(name: str) -> bytes:
        return (tmp_path / name).read_bytes()

    files = {"key": tmp_path / "server.key", "certificate": tmp_path / "server.pem"}
    secure = Security("s3cret", **files, ca=tmp_path / "ca.pem")
    with serving(dreams, security=secure, host="127.0.0.1") as server:
        right = {"ca": read("ca.pem"), "certificate": read("client.pem"), "key": read("client.key")}
        with Client(address(server), token="s3cret", **right) as client:
            assert client.model().name == "token:small"
        wrong: list[dict[str, Any]] = [
            {"ca": read("ca.pem")},  # no certificate of its own
            right | {"certificate": read("stranger.pem"), "key": read("stranger.key")},
            right | {"ca": read("other.pem")},  # the server is not who it should be
            {},  # no TLS
        ]
        for given_files in wrong:
            refused = pytest.raises(ImaginationError, match="certificates right")
            secret = {"token": "s3cret", "timeout": 1.0}
            with Client(address(server), **secret | given_files) as client, refused:
                client.model()


def test_strangers_are_not_served_by_accident(
    dreams: Dreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key.pem"
    key.write_text("")
    monkeypatch.delenv(wire.TOKEN, raising=False)
    open_ones = [Security(), Security(token="t"), Security(key=key, certificate=key)]
    for secure in open_ones:
        for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
            with pytest.raises(ValueError, match="seen by other machines"):
                ImaginationServer(dreams, security=secure, host=host)
    with pytest.raises(ValueError, match="both"):
        Security(key=key).check("127.0.0.1")
    with pytest.raises(ValueError, match="is empty"):
        security(key, None, None, None)
    with pytest.raises(ValueError, match="is no file"):
        security(tmp_path / "none", None, None, None)
    with pytest.raises(ValueError, match="to be sent safely"):
        Client("192.0.2.1:50051", token="t")
    monkeypatch.setenv(wire.TOKEN, "from the environment")
    assert security(None, None, None, None).token == "from the environment"
    assert limits(["horizon=7"]).horizon == 7
    with pytest.raises(ValueError, match="did you mean 'horizon'"):
        limits(["horizn=7"])


def test_it_listens_on_loopback_alone(server: Any, methods: dict[str, Any]) -> None:
    """Its own port; of a whole process test_serve_process.py looks at all."""
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    mine = {at.ip.removeprefix("::ffff:") for at in listening if at.port == server.port}
    assert mine and mine <= {"127.0.0.1", "::1"}


# ------------------------------------------------------------------------------------ fuzzing


@settings(max_examples=20)
@given(st.data())
def test_what_is_malformed_ends_in_a_sentence(
    dreams: Dreams, state: dict[str, np.ndarray], data: Any
) -> None:
    """Good requests with bytes changed: a ValueError, or a call that the model can answer."""
    fuzz(
        Requests(dreams, Limits()), dreams, state, data.draw(st.randoms(use_true_random=False)), 40
    )


def good_requests(dreams: Dreams, state: dict[str, np.ndarray]) -> list[Any]:
    obs = {"tensors": wire.tensors({n: x[:1] for n, x in look(dreams.agent).items()})}
    one = {"tensors": wire.tensors({name: value[:1] for name, value in state.items()})}
    act = wire.tensor(np.ones((2, 1, 3), np.float32))
    return [
        messages.EncodeRequest(observations=obs, seed=3),
        messages.ImagineRequest(state=one, action=act, heads=["reward", "obs"], by_step=True),
        messages.ImagineRequest(observations=obs, horizon=3, samples=2, greedy=True),
        messages.ActRequest(observations=obs, is_first=wire.tensor(np.ones(1, bool))),
    ]


def fuzz(requests: Requests, dreams: Dreams, state: Any, random: Any, times: int) -> int:
    """How many of `times` mutated requests got through to the model."""
    from google.protobuf.message import DecodeError

    good, through = good_requests(dreams, state), 0
    parse = {"EncodeRequest": requests.encode, "ImagineRequest": requests.imagine}
    for _ in range(times):
        message = random.choice(good)
        data = bytearray(message.SerializeToString())
        for _ in range(random.choice([1, 1, 2, 8])):
            at = random.randrange(len(data))
            kind = random.randrange(4)
            if kind == 0:
                data[at] = random.randrange(256)
            elif kind == 1:
                del data[at : at + random.randrange(1, 9)]
            elif kind == 2:
                data[at:at] = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
            else:
                data[at] ^= 1 << random.randrange(8)
            data = data or bytearray(1)
        try:
            call = parse.get(type(message).__name__, requests.act)(
                type(message).FromString(bytes(data))
            )
        except (ValueError, DecodeError):
            continue
        if call.rows * getattr(call, "horizon", 1) > 64:
            continue  # fine, and slow
        through += 1
        if hasattr(call, "horizon"):
            list(dreams.imagine([call]))
        elif hasattr(call, "action"):
            dreams.encode([call])
        else:
            dreams.act([call])
    return through


@pytest.mark.nightly
def test_a_hundred_thousand_malformed_requests(
    dreams: Dreams, state: dict[str, np.ndarray], methods: dict[str, Any]
) -> None:
    import random

    requests, source = Requests(dreams, Limits()), random.Random(0)
    through = sum(fuzz(requests, dreams, state, source, 1000) for _ in range(100))
    assert 0 < through < 100_000
    list(methods["Imagine"](imagine(state), timeout=WAIT_S))  # and the server answers
