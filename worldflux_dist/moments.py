"""What a learner's optimizers remember, in files: moments as safetensors, counts as JSON."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
import torch
from pydantic import TypeAdapter, with_config
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from worldflux_dist import storage
from worldflux_dist.nn.memory import copies
from worldflux_dist.settings import STRICT, Whole

if TYPE_CHECKING:
    from upath import UPath


def files(optimizers: Mapping[str, Optimizer], part: str, gradient_steps: int) -> dict[str, Any]:
    """What `storage.save_files` writes: as of now, whatever steps follow."""
    tensors: dict[str, Tensor] = {}
    groups: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        saved = optimizer.state_dict()
        for index, entry in saved["state"].items():
            tensors |= {f"{name}/{index}/{key}": value for key, value in entry.items()}
        groups[name] = copy.deepcopy(saved["param_groups"])
    counts = {"gradient_steps": gradient_steps, "param_groups": groups}
    return {f"learner-{part}.safetensors": copies(tensors), f"learner-{part}.json": counts}


def load(optimizers: Mapping[str, Optimizer], part: str, folder: UPath) -> int:
    """Moments and counts as they were saved; rates and the like are those of the config. Gives the
    gradient steps. Raises CheckpointError where they are of other optimizers."""
    where = folder / f"learner-{part}.json"
    arrays = storage.load_arrays(folder / f"learner-{part}.safetensors")
    saved: Any = storage.read_form(where, _SAVED)
    for name, optimizer in optimizers.items():
        groups, before = optimizer.state_dict()["param_groups"], saved["param_groups"].get(name)
        if [g["params"] for g in groups] != [g["params"] for g in before or []]:
            raise storage.CheckpointError(
                f"{where}: param_groups.{name} is not of this learner's parameters"
            )
        for group, old in zip(groups, before, strict=True):
            group |= {"steps": old.get("steps", 0)} if "steps" in group else {}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = _moments(name, params, arrays, folder)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return int(saved["gradient_steps"])


class _Group(TypedDict):
    params: list[Whole]
    steps: NotRequired[Whole]


@with_config(STRICT)
class _Saved(TypedDict):
    gradient_steps: Whole
    param_groups: dict[str, list[_Group]]


_SAVED: TypeAdapter[Any] = TypeAdapter(_Saved)


def _moments(
    name: str, params: list[Tensor], arrays: dict[str, np.ndarray], folder: UPath
) -> dict[int, dict[str, Tensor]]:
    """What optimizer `name` remembers of each parameter, from `arrays` that were read."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in arrays.items():
        match = re.fullmatch(rf"{name}/(\d{{1,9}})/(\w+)", path, re.ASCII)
        if match is None:
            continue
        index = int(match[1])
        if index >= len(params) or value.shape not in ((), params[index].shape):
            raise storage.CheckpointError(
                f"{folder} is malformed: {path} of shape {value.shape} is of no parameter"
            )
        state.setdefault(index, {})[match[2]] = torch.from_numpy(value.copy())
    return state
