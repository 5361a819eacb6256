"""Ray's token authentication: every refusal as one sentence, and no run on an open cluster.

Whoever reaches a cluster without authentication runs code on all of it, so a run on one is refused.
`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` and ~/.ray/auth_token mean what they mean
to Ray; nothing here reads or writes a token.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import AuthenticationError

REMEDY = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file that holds the token of the "
    "cluster, or put it in ~/.ray/auth_token"
)
HEAD = "node:__internal_head__"  # Ray's own resource, of the head alone


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what Ray raises where `address` is not reached or refuses the token into a RuntimeError
    of one sentence with the remedy."""
    try:
        yield
    except AuthenticationError as error:
        raise RuntimeError(_refusal(error.message, address)) from None
    except ConnectionError:
        # Ray's own protocol does not tell a wrong token from a cluster that is not there.
        raise RuntimeError(
            f"no Ray cluster answers at {address}, or it refuses the token: check the address, and "
            f"{REMEDY}"
        ) from None


def _refusal(message: str, address: str) -> str:
    if message.startswith("Authentication required"):  # 401
        return f"the cluster at {address} asks for a token and none was sent: {REMEDY}"
    if message.startswith("Authentication failed"):  # 403
        return f"the cluster at {address} refuses this token: {REMEDY}"
    return f"no token was found: {REMEDY}"


def check_auth() -> None:
    """Refuse to go on in a cluster that was joined and lets everybody in.

    Asks a process on the head, because the mode of this process says nothing about the cluster.
    Raises RuntimeError.
    """
    address = ray.get_runtime_context().gcs_address
    if is_loopback(address):
        return
    asked = ray.remote(num_cpus=0, resources={HEAD: 0.001})(is_token_auth_enabled)
    refuse_open(address, ray.get(asked.remote()))


def refuse_open(address: str, token_auth: bool) -> None:
    """Raise RuntimeError where `address` is seen by other machines and no token is asked for."""
    if not token_auth and not is_loopback(address):
        raise RuntimeError(
            f"the Ray cluster at {address} asks for no token, so whoever reaches it can run code "
            "on it: start it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH set on every node"
        )


def is_loopback(address: str) -> bool:
    """Whether `address`, a host:port, is seen by this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
