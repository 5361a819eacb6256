"""The learner: gradient steps of an agent, and everything needed to continue them later.

Plain Python, no Ray. Tensors begin here: batches come in as numpy. Several learners can be the
ranks of a group: each takes a part of every batch, and what must stay true is that they hold the
same weights after every step and that one's trouble is seen by all.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NotRequired

import numpy as np
import torch
import torch.distributed as dist
from annotated_types import Ge, Le
from pydantic import TypeAdapter, with_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import TypedDict

from worldflux_dist import storage
from worldflux_dist.agent import Agent, LossOf, StageOutput
from worldflux_dist.behaviors.actor_critic import ActorCritic
from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.coarse import Coarse
from worldflux_dist.compiled import Pieces
from worldflux_dist.data import Batch
from worldflux_dist.nn.memory import keep_freed_memory, read_only
from worldflux_dist.nn.optim import grad_norm, learning_rate
from worldflux_dist.settings import STRICT, Count, Settings, Text, Whole, free

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the term."""


@dataclass(frozen=True)
class LearnerConfig(Settings):
    """device "auto" is the GPU where there is one; threads "auto" what the plan of a run leaves, or
    torch's own number, as 0 does.

    `accumulate` takes each batch in so many parts, one after the other, to save memory: the same
    gradients, but the running scales of returns move once per part. `compile` true (or "default")
    has torch.compile make the pieces of the family and the behavior before the first step, on a GPU
    each stage as a whole, there also by torch's modes "reduce-overhead" and "max-autotune"; "auto"
    does so on a CPU while training goes on, where a run is long enough (compiled.py).
    `pin_memory` makes copies to a GPU faster. What a machine does not have is left out with a
    warning.
    """

    section: ClassVar[str] = "learner"

    precision: Literal["float32", "bfloat16"] = "float32"
    device: Text = free("auto")
    threads: Annotated[int, Ge(0), Le(4096)] | Literal["auto"] = free("auto")
    accumulate: Count = 1
    compile: bool | Literal["auto", "default", "reduce-overhead", "max-autotune"] = free("auto")
    pin_memory: bool = free(False)

    def check(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise ValueError(f"learner.device is {self.device!r}: use auto, cpu, cuda or cuda:N")


class Stage(nn.Module):
    """The loss of one of an agent's optimizers, as a module that owns that optimizer's parameters
    and no others: by this a group knows which gradients its ranks share."""

    def __init__(self, optimizer: torch.optim.Optimizer, loss: LossOf) -> None:
        super().__init__()
        self.loss = loss
        self.params = nn.ParameterList(p for g in optimizer.param_groups for p in g["params"])

    def forward(self, given: Any) -> StageOutput:
        return self.loss(given)


class Learner:
    """Owns the weights of an agent or of one part of it, the optimizers and the count of gradient
    steps. With `rows`, each step leaves the world model's loss of every row in `row_losses` (B,).

    Raises ValueError for the part "behavior" of an agent that does not learn in imagination.
    """

    def __init__(
        self,
        agent: Agent,
        config: LearnerConfig | None = None,
        part: str = "agent",
        rows: bool = False,
    ) -> None:
        config = config or LearnerConfig()
        if config.threads not in (0, "auto"):
            torch.set_num_threads(int(config.threads))
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.config = config = _possible(config, self.device)
        self.agent, self.part, self.rows = agent.to(self.device), part, rows
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.stages: dict[str, Stage] = {}
        self._coarse = None
        imagines = part == "agent" and isinstance(agent.behavior, ActorCritic)
        if config.precision == "bfloat16" and imagines:
            self._coarse = Coarse(agent)
        compiles, gpu = config.compile not in (False, "auto"), self.device.type == "cuda"
        mode = config.compile if isinstance(config.compile, str) else "default"
        for name, (optimizer, loss) in agent.stages(part, rows).items():
            self.optimizers[name] = optimizer
            if compiles and gpu:
                loss = torch.compile(loss, fullgraph=True, mode=mode)
            self.stages[name] = Stage(optimizer, loss)
        self.pieces = Pieces(*self.agents) if compiles and not gpu else None
        self._shared: dict[str, DistributedDataParallel] = {}
        self.gradient_steps = self.rank = 0
        self.row_losses = np.zeros(0, np.float32)

    @property
    def agents(self) -> list[Agent]:
        """The agent, and its twin in bfloat16 where one imagines."""
        return [self.agent, *([self._coarse.agent] if self._coarse else [])]

    def join(self, store: dist.Store, rank: int, world_size: int, timeout_s: float = 30.0) -> None:
        """Become one rank of a group, once in a process's life. All ranks then have the weights of
        rank 0 and step together, each on as many rows as the others.

        Raises RuntimeError, here and in later steps, where another rank is gone or is waited for
        longer than `timeout_s`.
        """
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        self.share(rank)

    def share(self, rank: int) -> None:
        """As `join`, in a process that belongs to a process group already."""
        self.rank = rank
        for value in self.agent.state_dict().values():
            dist.broadcast(value, 0)
        for name, stage in self.stages.items():
            self._shared[name] = DistributedDataParallel(
                stage, init_sync=False, gradient_as_bucket_view=True
            )

    def step(self, batch: Batch | Imagined) -> dict[str, float]:
        """One gradient step on a (B, T) batch of arrays; gives the losses and metrics, in a group
        their means over the ranks.

        A policy that learns apart has a stage of its own, after all else has stepped. Raises
        NonFiniteLossError, on every rank, before the weights of its stage are changed.
        """
        with self.pieces.applied() if self.pieces else contextlib.nullcontext(), _compiled():
            return self._step(self._parts(batch.map(self._tensor)))

    def _step(self, given: list[Any]) -> dict[str, float]:
        if self._coarse:
            self._coarse.follow()
        values: dict[str, float] = {}
        for name, optimizer in self.optimizers.items():
            metrics, given = self._gradients(name, given)
            metrics[f"grad_norm/{name}"] = grad_norm(optimizer)
            means = _average(torch.stack(list(metrics.values()))).tolist()
            values |= dict(zip(metrics, means, strict=True))
            self._check(values)
            values[f"learning_rate/{name}"] = learning_rate(optimizer.param_groups[0])
            optimizer.step()
        if self.part != "behavior":
            self.agent.world_model.update_targets()
        if self.part != "world_model":
            self.agent.behavior.update_targets()
        self.gradient_steps += 1
        return values

    def _gradients(self, name: str, given: list[Any]) -> tuple[dict[str, Tensor], list[Any]]:
        """Compute a stage's gradients; gives the metrics and what the next stage starts from."""
        stage, shared = self.stages[name], self._shared.get(name)
        self.optimizers[name].zero_grad(set_to_none=True)
        logged: list[dict[str, Tensor]] = []
        paths: list[Any] = []
        for part in given:
            more = len(logged) + 1 < len(given)
            with shared.no_sync() if shared and more else contextlib.nullcontext():
                with self._autocast():
                    loss, metrics, path = (shared or stage)(part)
                (loss / len(given)).backward(inputs=list(stage.params))
            logged.append(metrics)
            paths.append(path)
        if "row_losses" in logged[0]:
            rows = [metrics.pop("row_losses") for metrics in logged]
            self.row_losses = torch.cat(rows).cpu().numpy()
        if len(logged) == 1:
            return logged[0], paths
        return {key: torch.stack([m[key] for m in logged]).mean() for key in logged[0]}, paths

    def _parts(self, batch: Batch | Imagined) -> list[Any]:
        """A batch of tensors in `accumulate` parts of equally many rows."""
        num, rows = self.config.accumulate, len(batch.reward)
        if rows % num:
            raise ValueError(
                f"a learner gets {rows} rows at a time, which cannot be taken in "
                f"learner.accumulate {num} parts: make replay.batch_size a multiple of it"
            )
        parts = [slice(i, i + rows // num) for i in range(0, rows, rows // num)]
        return [batch.rows(part) for part in parts]

    def _tensor(self, value: np.ndarray) -> Tensor:
        tensor = read_only(value)  # no copy: losses read a batch and do not change it
        if self.config.pin_memory:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

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

    def save(self, folder: UPath) -> None:
        """Write this rank's random state, and rank 0 also weights, optimizers and counters.

        Raises NonFiniteLossError instead where a weight is broken: what is saved is good.
        """
        for name, value in self.agent.named_parameters():
            if not value.isfinite().all():
                raise NonFiniteLossError(
                    f"the weights {name} are not finite after gradient step {self.gradient_steps}: "
                    "lower the learning rate; the last checkpoint is kept"
                )
        folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.agent.save(folder, self.part)
            self._save_optimizers(folder)
        storage.save_arrays(self._random_path(folder), self.random_state())

    def load(self, folder: UPath, gradient_steps: int | None = None) -> None:
        """Continue from what `save` wrote, counting on from `gradient_steps` where it is given.

        In a group, before `join`; a rank the group did not have then keeps its random state.
        """
        self.agent.load_files(folder, self.part)
        steps = self._load_optimizers(folder)
        self.gradient_steps = steps if gradient_steps is None else gradient_steps
        if self._random_path(folder).exists():
            self.set_random_state(storage.load_arrays(self._random_path(folder)))

    def random_state(self) -> dict[str, np.ndarray]:
        """Of torch's generators, as bytes."""
        state = {"cpu": torch.get_rng_state().numpy()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        return state

    def set_random_state(self, state: dict[str, np.ndarray]) -> None:
        """Draw on as after `random_state`; a GPU that it does not know keeps its own."""
        torch.set_rng_state(torch.from_numpy(state["cpu"].copy()))
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(torch.from_numpy(state["cuda"].copy()), self.device)

    def _random_path(self, folder: UPath) -> UPath:
        return folder / f"rng-{self.part}-{self.rank}.safetensors"

    def _save_optimizers(self, folder: UPath) -> None:
        tensors, groups = {}, {}
        for name, optimizer in self.optimizers.items():
            saved = optimizer.state_dict()
            for index, entry in saved["state"].items():
                for key, value in entry.items():
                    tensors[f"{name}/{index}/{key}"] = value.cpu().numpy()
            groups[name] = saved["param_groups"]
        storage.save_arrays(folder / f"learner-{self.part}.safetensors", tensors)
        counts = {"gradient_steps": self.gradient_steps, "param_groups": groups}
        storage.write_json(folder / f"learner-{self.part}.json", counts)

    def _load_optimizers(self, folder: UPath) -> int:
        """Moments and counts as they were saved; rates and the like are those of the config."""
        where = folder / f"learner-{self.part}.json"
        arrays = storage.load_arrays(folder / f"learner-{self.part}.safetensors")
        saved: Any = storage.read_form(where, _SAVED)
        for name, optimizer in self.optimizers.items():
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


@contextlib.contextmanager
def _compiled() -> Iterator[None]:
    """Says in one sentence that a stage could not be compiled."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            what = next(iter(str(error).splitlines()), type(error).__name__)
            raise RuntimeError(
                f"learner.compile: torch.compile failed ({what}): set learner.compile=false"
            ) from error
        raise


def _possible(config: LearnerConfig, device: torch.device) -> LearnerConfig:
    """The config without what the device does not have; says so in a line for each."""
    cuda = device.type == "cuda"
    if config.pin_memory and not cuda:
        logger.warning("learner.pin_memory is left out: there is no GPU to copy to")
        config = replace(config, pin_memory=False)
    if config.precision == "bfloat16" and cuda and not torch.cuda.is_bf16_supported(False):
        logger.warning("learner.precision is float32: this GPU does not compute in bfloat16")
        config = replace(config, precision="float32")
    compiler = os.environ.get("CXX", "g++")
    if config.compile not in (False, "auto") and not shutil.which(compiler):
        logger.warning(
            "learner.compile is left out: torch.compile needs a C++ compiler and there is no "
            f"{compiler}: install one, or name one in the environment variable CXX"
        )
        config = replace(config, compile=False)
    return config


def _average(x: Tensor) -> Tensor:
    """The mean over the ranks of a group; a NaN or infinity of one rank is seen by all. Changes x
    in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
