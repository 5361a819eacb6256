"""What goes over the wire: messages of the two .proto files beside this one, and tensors in them.

The messages are made from `protocol.binpb`, which `make protocol` compiles from those files, in a
pool of their own: they meet no other package's messages of the same names, and fit every release of
protobuf. What is read may come from anyone: sizes are compared with the bytes at hand before
anything is made of them, and nothing is ever unpickled.
"""

from __future__ import annotations

import importlib.resources
import ipaddress
import math
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

IMAGINATION = "worldflux.imagination.v1.Imagination"
INFERENCE = "inference.GRPCInferenceService"
TOKEN = "WORLDFLUX_SERVE_TOKEN"  # the environment variable that may hold it
DTYPES = {
    "BOOL": np.dtype("?"),
    **{
        f"{sign}INT{8 * n}": np.dtype(f"<{sign.lower()[:1] or 'i'}{n}")
        for sign in ("", "U")
        for n in (1, 2, 4, 8)
    },
    **{f"FP{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_AXES = 16


def _pool() -> descriptor_pool.DescriptorPool:
    data = importlib.resources.files(__package__).joinpath("protocol.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)
    return pool


POOL = _pool()


class _Messages:
    """Message classes of a package, by their names."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> Any:
        found = POOL.FindMessageTypeByName(f"{self._package}.{name}")
        made = message_factory.GetMessageClass(found)
        setattr(self, name, made)
        return made


messages: Any = _Messages("worldflux.imagination.v1")
inference: Any = _Messages("inference")


def methods(service: str) -> dict[str, tuple[Any, Any, bool]]:
    """The classes of request and answer of each method, and whether there are many answers."""
    found = POOL.FindServiceByName(service)
    kind = message_factory.GetMessageClass
    return {
        m.name: (kind(m.input_type), kind(m.output_type), m.server_streaming) for m in found.methods
    }


def served(service: str, answers: Any) -> grpc.GenericRpcHandler:
    """A service whose methods are those of `answers`."""
    made = {}
    for name, (asked, answered, many) in methods(service).items():
        make = grpc.unary_stream_rpc_method_handler if many else grpc.unary_unary_rpc_method_handler
        made[name] = make(getattr(answers, name), asked.FromString, answered.SerializeToString)
    return grpc.method_handlers_generic_handler(service, made)


def calls(service: str, channel: Any) -> dict[str, Any]:
    """What calls each method on a channel."""
    made = {}
    for name, (asked, answered, many) in methods(service).items():
        call = channel.unary_stream if many else channel.unary_unary
        made[name] = call(f"/{service}/{name}", asked.SerializeToString, answered.FromString)
    return made


def is_loopback(host: str) -> bool:
    """Whether a host is seen by this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def as_version(version: tuple[int, int]) -> Any:
    """Generation of the learners and gradient steps, as a message."""
    return messages.Version(generation=version[0], gradient_steps=version[1])


# ---------------------------------------------------------------------------------- tensors


def tensor(value: np.ndarray, name: str = "") -> Any:
    """An array as a message."""
    dtype = value.dtype.newbyteorder("<")
    return messages.Tensor(
        name=name, datatype=NAMES[dtype], shape=value.shape, data=value.astype(dtype).tobytes()
    )


def tensors(named: Mapping[str, np.ndarray]) -> list[Any]:
    return [tensor(value, name) for name, value in named.items()]


def array(message: Any, where: str) -> np.ndarray:
    """The array of a message, read-only. Raises ValueError naming the field `where`."""
    datatype, shape, data = message.datatype, tuple(message.shape), message.data
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise ValueError(
            f"{where} has the datatype {datatype!r:.40}: known are {', '.join(DTYPES)}"
        )
    if len(shape) > MAX_AXES or min(shape, default=0) < 0:
        raise ValueError(f"{where} has a shape of {len(shape)} axes that is none")
    expected = dtype.itemsize * math.prod(shape)
    if expected != len(data):
        raise ValueError(
            f"{where} has {len(data)} bytes, and {expected} are what {datatype} {list(shape)} takes"
        )
    if dtype == np.bool_:
        return np.frombuffer(data, np.uint8).reshape(shape) != 0
    return np.frombuffer(data, dtype).reshape(shape)


def arrays(found: Iterable[Any], where: str) -> dict[str, np.ndarray]:
    """Arrays by their names. Raises ValueError for a name that comes twice."""
    named: dict[str, np.ndarray] = {}
    for message in found:
        if message.name in named:
            raise ValueError(f"{where} has {message.name!r:.80} twice")
        named[message.name] = array(message, f"{where}.{message.name:.80}")
    return named
