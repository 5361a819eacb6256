"""One HTML file that plays a run's dream with no server and no network.

It holds the graphs of an agent (graphs.py), moments of real episodes to begin from, and
onnxruntime-web, which runs them in the browser. What must stay true: the page asks for nothing
that is not in it.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import tempfile
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.config import Config
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.models.base import State
from worldflux_dist.serve import graphs
from worldflux_dist.serve.controls import Controls, action_names
from worldflux_dist.serve.export import describe, written

PARTS = ("transition", "decode", "act")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
MOMENTS = (1, 15, 30, 60, 90, 120)  # steps of greedy play that dreams begin from
NO_RUNTIME = (
    "the page needs onnxruntime-web, which is not in {}: run `npm install onnxruntime-web` here, "
    "or name the folder that holds it with --ort DIR"
)


def write_page(agent: Agent, config: Config, path: Path, ort: Path | None = None) -> None:
    """Write the page of a run's dream; `ort` is where onnxruntime-web is, ./node_modules if None.

    Raises ValueError, in one sentence, for what cannot be exported, RuntimeError where packages
    are missing.
    """
    graphs.ready()
    code, wasm = (file.read_bytes() for file in runtime(ort))
    with tempfile.TemporaryDirectory() as name:
        told = written(agent, Path(name), PARTS)
        files = {part: (Path(name) / f"{part}.onnx").read_bytes() for part in PARTS}
    states = moments(agent, config.env)
    page = resources.files("worldflux_dist.serve") / "page"
    packed = {"wasm": wasm, **files, "starts": _bytes(states)}
    shared = {name: (page / f"{name}.js").read_bytes() for name in ("draw", "steer")}
    scripts = {"ort": code} | shared
    title = f"{config.model} in {config.env.id}"
    parts = {
        "title": html.escape(title),
        "about": json.dumps(_about(agent, config.env, states, told)).replace("<", "\\u003c"),
        "dream": (page / "dream.js").read_text(),
        **{key: base64.b64encode(value).decode() for key, value in scripts.items()},
        **{key: base64.b64encode(gzip.compress(x, mtime=0)).decode() for key, x in packed.items()},
    }
    text = (page / "dream.html").read_text()
    for key, value in parts.items():
        text = text.replace(f"{{{{{key}}}}}", value)
    path.write_text(text)


def runtime(ort: Path | None) -> list[Path]:
    """The files of onnxruntime-web in a folder: npm's, or the one that it was installed into."""
    folder = Path() if ort is None else ort
    for place in (folder, folder / "dist", folder / "node_modules/onnxruntime-web/dist"):
        if all((place / name).is_file() for name in RUNTIME):
            return [place / name for name in RUNTIME]
    raise RuntimeError(NO_RUNTIME.format("./node_modules" if ort is None else ort))


@torch.no_grad()
def moments(agent: Agent, config: EnvConfig) -> State:
    """States (n, ...) that the agent has after some steps of greedy play in a fresh environment:
    what dreams begin from. None is of an episode's first or last step."""
    found: list[State] = []
    with closing(make_envs(config, seed=0, num_envs=1)) as envs:
        action, carry, step = np.zeros((1, envs.spaces.action_dim), np.float32), None, 0
        while len(found) < len(MOMENTS):
            seen = envs.step(action)
            action, carry = agent.act_batch(seen.obs, seen.is_first, carry, greedy=True)
            within = not seen.is_first[0] and not seen.is_last[0]
            if step >= MOMENTS[len(found)] and within:
                found.append(State({n[6:]: x for n, x in carry.items() if n.startswith("state/")}))
            step += 1
    return agent.world_model.essential(State.stack(found)[:, 0])


def _bytes(states: State) -> bytes:
    """All numbers, tensor after tensor."""
    return b"".join(value.numpy().tobytes() for value in states.tensors.values())


def _about(agent: Agent, config: EnvConfig, states: State, told: dict[str, Any]) -> dict[str, Any]:
    """What the page reads of its agent."""
    spaces, missing = agent.spaces, describe(agent, told)["missing"]
    key = (spaces.images or spaces.vectors)[0]
    spec = spaces.obs[key]
    ports = {port["name"]: port for port in told["transition"]["inputs"]}
    return {
        "graphs": told,
        "state": [ports[name] for name in graphs.before(states)],
        "starts": len(MOMENTS),
        "discount": agent.world_model.discount,
        "controls": Controls(spaces, action_names(config)).describe(),
        "key": key,
        "dims": spec.shape[0] if spec.kind == "vector" else None,
        "sentence": missing.get("obs", ""),
    }
