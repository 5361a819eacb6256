"""The learner: gradient steps of an agent, and everything needed to continue them later.

Plain Python, no Ray. Tensors begin here: batches come in as numpy.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldflux_dist import checkpoint
from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the term."""


@dataclass(frozen=True)
class LearnerConfig:
    """device "auto" is the GPU where there is one; threads 0 leaves torch's own number."""

    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"learner.device is {self.device!r}: use auto, cpu, cuda or cuda:N")
        if self.threads < 0:
            raise ValueError(f"learner.threads is {self.threads}: it must be at least 0")


def keep_freed_memory() -> None:
    """Ask glibc, where it is the allocator, not to give freed memory back to the system.

    A step frees and takes gigabytes of large tensors; mapping their pages anew each time is a
    fifth of a CPU learner's time, and a tenth of a plan's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap is never trimmed


class Learner:
    """Owns the agent's weights, the optimizers and the count of gradient steps."""

    def __init__(self, agent: Agent, config: LearnerConfig | None = None) -> None:
        self.config = config or LearnerConfig()
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        device = self.config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.agent = agent.to(self.device)
        self.optimizers = agent.optimizers()
        self.gradient_steps = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """One gradient step on a (B, T) batch of arrays; gives the losses and metrics.

        A policy that learns apart has a stage of its own, after all else has stepped. Raises
        NonFiniteLossError before the weights of its stage are changed.
        """
        tensors = batch.map(self._tensor)
        values: dict[str, float] = {}
        path = None
        for stage, optimizer in self.optimizers.items():
            with self._autocast():
                loss, metrics, path = self.agent(tensors, stage, path)
            found = torch.stack(list(metrics.values())).tolist()
            values |= dict(zip(metrics, found, strict=True))
            self._check(values)
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=[p for g in optimizer.param_groups for p in g["params"]])
            optimizer.step()
        self.agent.update_targets()
        self.gradient_steps += 1
        return values

    def _tensor(self, value: np.ndarray) -> Tensor:
        if not value.flags.writeable:  # shared memory of another process: torch wants its own
            value = value.copy()
        return torch.from_numpy(value).to(self.device, non_blocking=True)

    def _autocast(self) -> Any:
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _check(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            terms = [name for name in bad if name.startswith("loss/")] or bad
            raise NonFiniteLossError(
                f"{', '.join(terms)} became {values[terms[0]]} at gradient step "
                f"{self.gradient_steps + 1}: lower the learning rate or look for broken "
                "observations or rewards; the last checkpoint is kept"
            )

    # --------------------------------------------------------------------------------- saving

    def save(self, folder: Path) -> None:
        """Write agent, optimizers, counters and random state.

        Raises NonFiniteLossError instead where a weight is broken: what is saved is good.
        """
        for name, value in self.agent.named_parameters():
            if not value.isfinite().all():
                raise NonFiniteLossError(
                    f"the weights {name} are not finite after gradient step {self.gradient_steps}: "
                    "lower the learning rate; the last checkpoint is kept"
                )
        self.agent.save(folder)
        tensors, scalars = {}, {}
        for name, optimizer in self.optimizers.items():
            saved = optimizer.state_dict()
            for index, entry in saved["state"].items():
                for key, value in entry.items():
                    tensors[f"{name}/{index}/{key}"] = value.cpu().numpy()
            scalars[name] = saved["param_groups"]
        tensors["rng/cpu"] = torch.get_rng_state().numpy()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        checkpoint.save_arrays(folder / "learner.safetensors", tensors)
        checkpoint.write_json(
            folder / "learner.json",
            {"gradient_steps": self.gradient_steps, "param_groups": scalars},
        )

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        self.agent.load_file(folder / "agent.safetensors")
        arrays, _ = checkpoint.load_arrays(folder / "learner.safetensors")
        saved = checkpoint.read_json(folder / "learner.json")
        self.gradient_steps = saved["gradient_steps"]
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for path, value in arrays.items():
                owner, _, rest = path.partition("/")
                if owner == name:
                    index, key = rest.split("/")
                    state.setdefault(int(index), {})[key] = torch.from_numpy(value.copy())
            groups = saved["param_groups"][name]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(torch.from_numpy(arrays["rng/cpu"].copy()))
        if self.device.type == "cuda" and "rng/cuda" in arrays:
            torch.cuda.set_rng_state(torch.from_numpy(arrays["rng/cuda"].copy()), self.device)
