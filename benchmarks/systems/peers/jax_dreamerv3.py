"""The reference in JAX, danijar/dreamerv3, from a folder that the user has: its agent alone.

Without replay context, which the others do not have, and in float32. XLA takes as many threads as
the process has cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peers.work import HORIZON, Made, Work, noise


def make(work: Work, source: str) -> Made:
    """One update, jitted; the first call compiles it."""
    sys.path.insert(0, source)
    import jax

    jax.jit = named_arguments(jax.jit)
    from dreamerv3.agent import Agent

    data = batch(work)
    agent = Agent(spaces(work, data), {"action": action_space(work)}, settings(work, source))
    carry = agent.init_train(work.what.batch[0])
    stream = iter(agent.stream(forever(data)))

    def update() -> None:
        nonlocal carry
        carry, _, _ = agent.train(carry, next(stream))
        jax.block_until_ready(agent.params)

    trained = sum(
        value.size
        for name, value in agent.params.items()
        if name.split("/")[0] in ("dyn", "enc", "dec", "rew", "con", "pol", "val")
    )
    return Made({"update": update}, trained, f"JAX {jax.__version__}")


def named_arguments(jit: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit for code that gives its arguments by position, which newer JAX refuses."""
    names = ("in_shardings", "out_shardings", "static_argnums", "static_argnames", "donate_argnums")

    def jitted(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        return jit(function, **dict(zip(names, given, strict=False)), **named)

    return jitted


def settings(work: Work, source: str) -> Any:
    """Its own configuration at our size, for a CPU."""
    import elements
    import ruamel.yaml as yaml

    text = (Path(source) / "dreamerv3" / "configs.yaml").read_text()
    configs = yaml.YAML(typ="safe").load(text)
    config = elements.Config(configs["defaults"]).update(configs[work.size])
    config = config.update({"agent.imag_length": HORIZON, "agent.report": False})
    rows, length = work.what.batch
    jax = {"platform": "cpu", "compute_dtype": "float32", "prealloc": False}
    return elements.Config(
        **config.agent,
        logdir="",
        seed=0,
        jax={**config.jax, **jax, "precompile": False, "profiler": False},
        batch_size=rows,
        batch_length=length,
        replay_context=0,
        report_length=length,
        replica=0,
        replicas=1,
    )


def spaces(work: Work, data: dict[str, np.ndarray]) -> dict[str, Any]:
    """What it calls observations: everything but the action."""
    import elements

    kinds = {key: (data[key].dtype, data[key].shape[2:]) for key in ("obs", "reward")}
    found = {key: elements.Space(*kind) for key, kind in kinds.items()}
    return found | {key: elements.Space(bool) for key in ("is_first", "is_last", "is_terminal")}


def action_space(work: Work) -> Any:
    import elements

    return elements.Space(np.int32, (), 0, work.what.num_actions)


def batch(work: Work) -> dict[str, np.ndarray]:
    """The batch of noise as its replay gives it."""
    arrays, shape = noise(work.what), work.what.batch
    return arrays | {
        "action": arrays["action"].argmax(-1).astype(np.int32),
        "consec": np.zeros(shape, np.int32),
        "stepid": np.zeros((*shape, 20), np.uint8),
    }


def forever(data: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    while True:
        yield dict(data)
