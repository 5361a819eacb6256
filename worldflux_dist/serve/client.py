"""The client of the imagination service, for asyncio and for plain code, with numpy in and out.

Loads neither torch nor Ray. Of several addresses one is asked; a call that it does not answer goes
to the next with the same seed, which gives the same answer as long as the weights are the same.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc
import numpy as np
from typing_extensions import TypedDict, Unpack

from worldflux_dist.serve import wire
from worldflux_dist.serve.results import Arrays, ModelInfo, Trajectories, Version, version_of

# What another server may still answer; a call is cancelled by the server alone, where it ends.
ELSEWHERE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
}
RETRY_S = 0.1  # after all addresses were tried
# Of a name with several servers all are taken that are ready by the standard health service.
BALANCED = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": wire.IMAGINATION},
}
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class ImaginationError(RuntimeError):
    """The service refused a call, or none answered; the message says why."""


class How(TypedDict, total=False):
    """What else of a rollout: first looks `obs` or `from_replay` starts in place of states,
    trajectories of each start, seed, heads, and whether the policy takes its likeliest action."""

    obs: Any
    from_replay: int
    samples: int
    seed: int
    heads: Sequence[str]
    greedy: bool


class Access(TypedDict, total=False):
    """What servers ask for, and how long a call may take: see AsyncClient."""

    token: str
    ca: bytes | None
    certificate: bytes | None
    key: bytes | None
    timeout: float


class AsyncClient:
    """Calls for asyncio. Close it, or use it in an `async with`.

    `addresses` are host:port of one or several servers, or dns:///name:port. `token` and the PEM
    texts `ca` (the servers'), `certificate` and `key` (the client's own) are what they ask for. A
    call may take `timeout` seconds, all tries together. Every method raises ImaginationError.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        token: str = "",
        ca: bytes | None = None,
        certificate: bytes | None = None,
        key: bytes | None = None,
        timeout: float = 30.0,
    ) -> None:
        self.addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self.addresses:
            raise ValueError("a client needs an address, such as 127.0.0.1:50051")
        if ca is None and (certificate or (token and not all(map(_near, self.addresses)))):
            raise ValueError("a token or certificate wants `ca`, the servers', to be sent safely")
        self.timeout, self._turn = timeout, 0
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._credentials = grpc.ssl_channel_credentials(ca, key, certificate) if ca else None
        self._channels: dict[str, Any] = {}
        self._calls: dict[str, dict[str, Any]] = {}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    # ----------------------------------------------------------------------------------- the calls

    async def model(self) -> ModelInfo:
        """What is served."""
        return ModelInfo(await self._one("GetModel", wire.messages.GetModelRequest()))

    async def encode(
        self,
        obs: Any,
        actions: np.ndarray | None = None,
        is_first: np.ndarray | None = None,
        state: Arrays | None = None,
        seed: int = 0,
    ) -> Arrays:
        """The states (N, ...) after observations (N, ...), or sequences (N, T, ...) with actions
        (N, T, A). `obs` are converted (`spaces.encode_obs`), by name or the only one."""
        request = wire.messages.EncodeRequest(observations=_named(obs), seed=seed)
        _put(request, action=_float(actions), is_first=_bool(is_first))
        if state is not None:
            request.state.tensors.extend(wire.tensors(state))
        answer = await self._one("Encode", request)
        return wire.arrays(answer.state.tensors, "state")

    async def rollout(
        self,
        state: Arrays | None = None,
        actions: np.ndarray | None = None,
        horizon: int | None = None,
        **how: Unpack[How],
    ) -> Trajectories:
        """As WorldModel.rollout: from states (N, ...) with actions (H, N, A), or `horizon` steps of
        the served policy."""
        request = _imagine(False, state, actions, horizon, **how)
        async for version, outputs in self._stream(request):
            return Trajectories.of(version, outputs)
        raise ImaginationError("the server ended a rollout without an answer")

    async def steps(
        self,
        state: Arrays | None = None,
        actions: np.ndarray | None = None,
        horizon: int | None = None,
        **how: Unpack[How],
    ) -> AsyncGenerator[tuple[Version, Arrays], None]:
        """As `rollout`, as the steps come: the version, and outputs (1, N, ...) by the names of
        ImagineResponse. Where a server dies another goes on at that step."""
        async for step in self._stream(_imagine(True, state, actions, horizon, **how)):
            yield step

    async def act(
        self,
        obs: Any,
        is_first: np.ndarray | None = None,
        carry: Arrays | None = None,
        greedy: bool = True,
        seed: int = 0,
    ) -> tuple[np.ndarray, Arrays]:
        """Flat actions (N, A) for observations (N, ...), and the carry of the next call."""
        request = wire.messages.ActRequest(observations=_named(obs), greedy=greedy, seed=seed)
        _put(request, is_first=_bool(is_first))
        if carry is not None:
            request.carry.tensors.extend(wire.tensors(carry))
        answer = await self._one("Act", request)
        return wire.array(answer.action, "action"), wire.arrays(answer.carry.tensors, "carry")

    # ---------------------------------------------------------------------------------- the tries

    async def _one(self, method: str, request: Any) -> Any:
        async for call, left in self._tries(method):
            with call.noted():
                return await call.made(request, timeout=left, metadata=self._metadata)
        raise AssertionError("tries end with an error")

    async def _stream(self, request: Any) -> AsyncIterator[tuple[Version, Arrays]]:
        done, began = 0, None
        async for call, left in self._tries("Imagine"):
            with call.noted():
                made = call.made(request, timeout=left, metadata=self._metadata)
                async for message in made:
                    version = version_of(message)
                    if message.first_step < done:
                        continue  # another server has sent it
                    if done and version != began:
                        raise ImaginationError(
                            f"a server stopped at step {done} and the next one has other weights: "
                            "call again"
                        )
                    done, began = message.first_step + 1, version
                    yield version, wire.arrays(message.outputs, "outputs")
                return

    async def _tries(self, method: str) -> AsyncIterator[tuple[_Try, float]]:
        """Tries, at the address that answered last first, and the seconds that are left.

        Raises ImaginationError once there are none, or where no address would answer.
        """
        deadline = time.monotonic() + self.timeout
        missed: dict[str, str] = {}
        while (left := deadline - time.monotonic()) > 0:
            address = self.addresses[self._turn % len(self.addresses)]
            attempt = _Try(self._at(address)[method])
            yield attempt, left
            assert attempt.error is not None
            code, said = attempt.error.code(), attempt.error.details() or ""
            if code not in ELSEWHERE or "larger than max" in said:
                if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                    break
                raise ImaginationError(f"{address} refused ({code.name}): {said}")
            missed[address] = f"{address}: {said}"
            self._turn += 1
            if len(missed) == len(self.addresses):
                await asyncio.sleep(RETRY_S)
        raise ImaginationError(
            f"no answer in {self.timeout:g} s ({'; '.join(missed.values()) or 'too slow'}): are "
            "the servers running, and are address, token and certificates right?"
        )

    def _at(self, address: str) -> dict[str, Any]:
        """What calls each method at an address."""
        if address not in self._calls:
            options = list(OPTIONS)
            if address.startswith("dns:"):
                options.append(("grpc.service_config", json.dumps(BALANCED)))
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(address, options)
            else:
                channel = grpc.aio.secure_channel(address, self._credentials, options)
            self._channels[address] = channel
            self._calls[address] = wire.calls(wire.IMAGINATION, channel)
        return self._calls[address]


@dataclass
class _Try:
    """One try of a call, and the error that it ended with."""

    made: Any
    error: grpc.aio.AioRpcError | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            self.error = error


P = ParamSpec("P")
T = TypeVar("T")


def _plain(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """A method of AsyncClient for plain code."""

    @functools.wraps(method)
    def call(self: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._inner, *args, **kwargs))

    return call


class Client:
    """As AsyncClient, for plain code, from any number of threads. Owns a thread that makes the
    calls; close it, or use it in a `with`."""

    def __init__(self, addresses: str | Sequence[str], **access: Unpack[Access]) -> None:
        self._inner, self._loop = AsyncClient(addresses, **access), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self._run(self._inner.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    model = _plain(AsyncClient.model)
    encode = _plain(AsyncClient.encode)
    rollout = _plain(AsyncClient.rollout)
    act = _plain(AsyncClient.act)

    def steps(
        self,
        state: Arrays | None = None,
        actions: np.ndarray | None = None,
        horizon: int | None = None,
        **how: Unpack[How],
    ) -> Iterator[tuple[Version, Arrays]]:
        """As AsyncClient.steps."""
        coming = self._inner.steps(state, actions, horizon, **how)
        try:
            while True:
                yield self._run(anext(coming))
        except StopAsyncIteration:
            return
        finally:
            self._run(coming.aclose())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


# --------------------------------------------------------------------------- requests and answers


def _imagine(
    by_step: bool,
    state: Arrays | None,
    actions: np.ndarray | None,
    horizon: int | None,
    obs: Any = None,
    from_replay: int | None = None,
    samples: int = 1,
    seed: int = 0,
    heads: Sequence[str] = ("reward", "continue"),
    greedy: bool = False,
) -> Any:
    how = {"samples": samples, "seed": seed, "greedy": greedy, "by_step": by_step}
    request = wire.messages.ImagineRequest(heads=heads, horizon=horizon or 0, **how)
    if [state is None, obs is None, from_replay is None].count(False) != 1:
        raise ValueError("a rollout starts from one of state, obs and from_replay")
    if state is not None:
        request.state.tensors.extend(wire.tensors(state))
    elif obs is not None:
        request.observations.CopyFrom(_named(obs))
    else:
        request.from_replay = from_replay
    _put(request, action=_float(actions))
    return request


def _named(obs: Any) -> Any:
    named = obs if isinstance(obs, dict) else {"obs": obs}
    typed = {
        name: np.asarray(x) if np.asarray(x).dtype == np.uint8 else np.asarray(x, np.float32)
        for name, x in named.items()
    }
    return wire.messages.Observations(tensors=wire.tensors(typed))


def _put(request: Any, **fields: np.ndarray | None) -> None:
    for name, value in fields.items():
        if value is not None:
            getattr(request, name).CopyFrom(wire.tensor(value, name))


def _float(value: Any) -> np.ndarray | None:
    return None if value is None else np.asarray(value, np.float32)


def _bool(value: Any) -> np.ndarray | None:
    return None if value is None else np.asarray(value, bool)


def _near(address: str) -> bool:
    return wire.is_loopback(address.rpartition(":")[0])
