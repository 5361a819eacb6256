"""What `worldflux-dist export` writes: a folder of ONNX graphs and what is to be known of them.

What must stay true: names, types and shapes in dream.json are those of the files beside it, and
what an agent cannot give is named there, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldflux_dist.agent import Agent
from worldflux_dist.behaviors.latent_td import LatentTD
from worldflux_dist.serve import graphs
from worldflux_dist.serve.graphs import Named, Part

FORMAT = 1  # of dream.json; counts changes that readers must know of
DESCRIPTION = "dream.json"
KINDS = {
    "image": "levels 0..255, (height, width, channels)",
    "vector": "in the environment's own units, discrete ones as one-hots",
}
MEANINGS = {
    "state": "what the model remembers",
    "new": "what it remembers afterwards",
    "action": "flat, its parts in the order of action_parts; see them for units",
    "greedy": "the likeliest action, of the same form",
    "is_first": "true where an episode begins, whose state and action are forgotten",
    "noise": "random numbers, uniform in [0, 1)",
    "reward": "on arriving in the state",
    "continue": "the probability of going on from the state, times the discount",
    "value": "the expected discounted return from the state on, under the policy",
}
UNITS = {
    "discrete": "a one-hot",
    "continuous": "numbers in [-1, 1], from the space's low to its high; clip what is beyond",
}


def write_graphs(agent: Agent, folder: Path) -> list[Path]:
    """Write an agent's graphs and dream.json into a folder, which is made; gives their paths.

    Raises ValueError, in one sentence, for what cannot be exported, RuntimeError where packages
    are missing.
    """
    graphs.ready()
    told = written(agent, folder)
    about = folder / DESCRIPTION
    about.write_text(json.dumps(describe(agent, told), indent=2) + "\n")
    return [*(folder / graph["file"] for graph in told.values()), about]


def written(agent: Agent, folder: Path, names: Collection[str] = graphs.NAMES) -> dict[str, Any]:
    """Write the graphs of these names; gives what is to be told of each."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for part in graphs.parts(agent):
        if part.name in names:
            path = folder / f"{part.name}.onnx"
            outputs = graphs.write(agent, part, path)
            told[part.name] = {"file": path.name} | _ports(agent, part, outputs)
    return told


def describe(agent: Agent, told: dict[str, Any]) -> dict[str, Any]:
    """What dream.json says: of the agent, and `told` of each graph."""
    model, name = agent.world_model, agent.recipe["model"]
    family, _, preset = name.partition(":")
    seen = {key: (spec.kind, spec.shape) for key, spec in agent.spaces.obs.items()}
    return {
        "format": FORMAT,
        "family": family,
        "preset": preset,
        "discount": model.discount,
        "observations": {
            key: {"kind": kind, "shape": list(shape), "meaning": KINDS[kind]}
            for key, (kind, shape) in seen.items()
        },
        "action_parts": [
            asdict(part) | {"meaning": UNITS[part.kind]} for part in agent.spaces.action_parts
        ],
        "spaces": agent.spaces.to_json(),
        "graphs": told,
        "missing": _missing(agent),
    }


def _missing(agent: Agent) -> dict[str, str]:
    """What no graph gives, or gives otherwise than the agent, and why."""
    model, name, missing = agent.world_model, agent.recipe["model"], {}
    if not model.decodes_obs:
        missing["obs"] = f"{name} does not decode observations: draw rewards and values instead"
    if not model.decodes_reward:
        missing["reward"] = f"{name} does not decode rewards"
    if agent.planner is not None:
        method = "mppi" if agent.planner.weighted else "cem"
        missing["planner"] = (
            f"the agent acts by planning ({method}), which draws many rollouts: act.onnx is its "
            "policy alone; plan with transition.onnx and decode.onnx, or act with Agent.load"
        )
    if isinstance(agent.behavior, LatentTD):
        missing["value"] = "the mean of all Qs at the likeliest action, where learning draws two"
    return missing


def _ports(agent: Agent, part: Part, outputs: list[str]) -> dict[str, Any]:
    """Names, types, shapes and meanings of what goes into a graph and comes out."""
    given = part.compute(agent, part.inputs)
    return {
        "inputs": _described(agent, part.inputs),
        "outputs": _described(agent, {name: given[name] for name in outputs}),
    }


def _described(agent: Agent, named: Named) -> list[dict[str, Any]]:
    ports = []
    for name, value in named.items():
        first, _, key = name.partition("/")
        meaning = KINDS[agent.spaces.obs[key].kind] if first == "obs" else MEANINGS[first]
        dtype = str(value.dtype).removeprefix("torch.")
        shape = ["batch", *value.shape[1:]]
        ports.append({"name": name, "dtype": dtype, "shape": shape, "meaning": meaning})
    return ports
