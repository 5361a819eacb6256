"""The imagination server: the service of imagination.proto over grpc.aio, safe as it comes.

Loopback, unless there are TLS and a token. What callers send is held to the model's names, shapes
and limits (requests.py) before it waits for a batch (batches.py); what is too much is refused, and
nothing grows. No call leaves anything behind.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from worldflux_dist.serve import wire
from worldflux_dist.serve.batches import Batches, FullError
from worldflux_dist.serve.dreams import Arrays, Dreams, joined
from worldflux_dist.serve.inference import Inference
from worldflux_dist.serve.requests import Limits, Requests, describe

HEALTH = "/grpc.health.v1.Health/"  # answered without a token: it says only whether it serves
WATCHERS = 1024  # of the health service: each balancing client keeps a call open
logger = logging.getLogger(__name__)
Newer = Callable[[tuple[int, int]], Dreams | None]  # than a version; None: there are none


@dataclass(frozen=True)
class Security:
    """Who may call. Files are PEM; with `ca` clients must have a certificate of theirs (mTLS)."""

    token: str = ""
    key: Path | None = None
    certificate: Path | None = None
    ca: Path | None = None

    def check(self, host: str) -> None:
        """Raise ValueError for what is half set, or would serve strangers."""
        if (self.key is None) != (self.certificate is None):
            raise ValueError("TLS wants both --tls-key and --tls-cert")
        if self.ca is not None and self.key is None:
            raise ValueError("--tls-ca asks clients for certificates: set --tls-key and --tls-cert")
        if not wire.is_loopback(host) and not (self.key and self.token):
            raise ValueError(
                f"{host} is seen by other machines: set --tls-key, --tls-cert and a token "
                f"(${wire.TOKEN} or --token-file), or serve on 127.0.0.1"
            )

    def credentials(self) -> grpc.ServerCredentials | None:
        if self.key is None or self.certificate is None:
            return None
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        ca = self.ca.read_bytes() if self.ca else None
        return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        found = await continuation(details)
        if found is None or details.method.startswith(HEALTH):
            return found
        given = dict(details.invocation_metadata).get("authorization", "")
        given = given if isinstance(given, bytes) else given.encode()
        if hmac.compare_digest(given, self._expected):
            return found

        async def refuse(request: Any, context: Any) -> Any:
            said = "the token is missing or wrong: send it as `authorization: Bearer ...`"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, said)

        async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await refuse(request, context)
            yield

        if found.request_streaming:  # reflection's
            return grpc.stream_stream_rpc_method_handler(refuse_stream)
        if found.response_streaming:
            return grpc.unary_stream_rpc_method_handler(refuse_stream)
        return grpc.unary_unary_rpc_method_handler(refuse)


@dataclass
class ImaginationServer:
    """One process's server. `start`, then `wait` or `stop`; `port` is the one it got.

    With `newer`, asked every `follow_s` seconds in a thread, it goes on with newer weights.
    """

    dreams: Dreams
    limits: Limits = field(default_factory=Limits)
    security: Security = field(default_factory=Security)
    host: str = "127.0.0.1"
    port: int = 0
    newer: Newer | None = None
    reflect: bool | None = None  # default: on loopback
    follow_s: float = 2.0

    def __post_init__(self) -> None:
        self.security.check(self.host)
        self.answers = Answers(self.dreams, self.limits)
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises RuntimeError where the address is taken."""
        limits = self.limits
        token = self.security.token
        self.server = grpc.aio.server(
            interceptors=[_TokenCheck(token)] if token else [],
            maximum_concurrent_rpcs=limits.calls + WATCHERS,
            options=[
                ("grpc.max_receive_message_length", limits.request_bytes),
                ("grpc.max_send_message_length", -1),  # held by limits.answer_bytes
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        self.health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        services = {wire.IMAGINATION: self.answers, wire.INFERENCE: Inference(self.answers)}
        self.server.add_generic_rpc_handlers([wire.served(*each) for each in services.items()])
        if self.reflect if self.reflect is not None else wire.is_loopback(self.host):
            names = [*services, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self.server, pool=wire.POOL)
        host = f"[{self.host}]" if ":" in self.host else self.host
        credentials = self.security.credentials()
        address = f"{host}:{self.port}"
        try:
            if credentials is not None:
                self.port = self.server.add_secure_port(address, credentials)
            else:
                self.port = self.server.add_insecure_port(address)
        except RuntimeError:
            raise RuntimeError(
                f"{address} cannot be served on: is it taken (set --port), or are key and "
                "certificate no PEM files?"
            ) from None
        await self.server.start()
        for name in ("", *services):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self.newer is not None:
            self._following = asyncio.create_task(self._follow(self.newer))

    async def wait(self) -> None:
        await self.server.wait_for_termination()

    async def stop(self, grace: float = 5.0) -> None:
        """Answer what is under way for so many seconds, take nothing new, and end."""
        await self.health.enter_graceful_shutdown()
        if self._following is not None:
            self._following.cancel()
        await self.server.stop(grace)
        await self.answers.batches.close()

    async def _follow(self, newer: Newer) -> None:
        failing = ""
        while True:
            await asyncio.sleep(self.follow_s)
            try:
                found = await asyncio.to_thread(newer, self.answers.dreams.version)
            except Exception as error:  # the run's storage: it may be back at the next look
                if str(error) != failing:
                    logger.warning("newer weights could not be read: %s", error)
                failing = str(error)
                continue
            failing = ""
            if found is not None:
                self.answers.replace(found)
                logger.warning("serving version %s", found.version)


class Answers:
    """The methods of the service."""

    def __init__(self, dreams: Dreams, limits: Limits) -> None:
        self.limits, room = limits, 8 * limits.answer_bytes
        self.batches = Batches(dreams, limits.batch_lanes, 4 * limits.answer_bytes, room)
        self.requests = Requests(dreams, limits)

    @property
    def dreams(self) -> Dreams:
        return self.batches.dreams

    def replace(self, dreams: Dreams) -> None:
        """Go on with newer weights; batches under way end with theirs."""
        self.batches.dreams, self.requests = dreams, Requests(dreams, self.limits)

    async def GetModel(self, request: Any, context: Any) -> Any:
        return describe(self.dreams, self.requests)

    async def Encode(self, request: Any, context: Any) -> Any:
        async for version, _, state in self._answer(self.requests.encode, request, context):
            return wire.messages.EncodeResponse(
                version=wire.as_version(version), state={"tensors": wire.tensors(state)}
            )
        raise AssertionError

    async def Imagine(self, request: Any, context: Any) -> AsyncIterator[Any]:
        whole: list[tuple[int, Arrays]] = []
        version = (0, 0)
        async for version, first, outputs in self._answer(self.requests.imagine, request, context):
            if not request.by_step:
                whole.append((first, outputs))
                continue
            yield _imagined(version, first, outputs)
        if whole:
            yield _imagined(version, 0, joined([outputs for _, outputs in whole]))

    async def Act(self, request: Any, context: Any) -> Any:
        async for version, _, after in self._answer(self.requests.act, request, context):
            action = wire.tensor(after["action"], "action")
            return wire.messages.ActResponse(
                version=wire.as_version(version),
                action=action,
                carry={"tensors": wire.tensors(after)},
            )
        raise AssertionError

    async def _answer(
        self, parse: Callable[[Any], Any], request: Any, context: Any
    ) -> AsyncIterator[Any]:
        """Answers of batches, or the status that says why there are none."""
        status, said = grpc.StatusCode.INTERNAL, ""
        if self.batches.num_calls >= self.limits.calls:
            said = f"{self.limits.calls} calls are under way (limits.calls): ask again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        try:
            call = parse(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            async with asyncio.timeout(self.limits.seconds):
                size = request.ByteSize() + self.requests.size(call)
                async for answer in self.batches.answers(call, size):
                    yield answer
                return
        except TimeoutError:
            status = grpc.StatusCode.DEADLINE_EXCEEDED
            said = f"the call took longer than the {self.limits.seconds:g} s of limits.seconds"
        except FullError as error:
            status, said = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        except Exception as error:
            logger.exception("a call failed")
            said = f"{type(error).__name__}: {error:.200}" if str(error) else type(error).__name__
        await context.abort(status, said)


def _imagined(version: tuple[int, int], first: int, outputs: Arrays) -> Any:
    return wire.messages.ImagineResponse(
        version=wire.as_version(version), first_step=first, outputs=wire.tensors(outputs)
    )
