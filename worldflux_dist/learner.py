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
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from worldflux_dist import moments, storage
from worldflux_dist.agent import PARTS, Agent, LossOf, StageOutput
from worldflux_dist.behaviors.actor_critic import ActorCritic
from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.coarse import Coarse
from worldflux_dist.compiled import Pieces, explained
from worldflux_dist.data import Batch
from worldflux_dist.nn.memory import keep_freed_memory, read_only
from worldflux_dist.nn.optim import grad_norm, learning_rate
from worldflux_dist.settings import Count, Settings, Text, free

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
    does so on a CPU beside the steps of a long run (distributed/compiling.py).
    `pin_memory` copies batches to a GPU by way of memory from which it can fetch them itself. What
    a machine does not have is left out with a warning.
    """

    section: ClassVar[str] = "learner"

    precision: Literal["float32", "bfloat16"] = "float32"
    device: Text = free("auto")
    threads: Annotated[int, Ge(0), Le(4096)] | Literal["auto"] = free("auto")
    accumulate: Count = 1
    compile: bool | Literal["auto", "default", "reduce-overhead", "max-autotune"] = free("auto")
    pin_memory: bool = free(True)

    @property
    def compiles_first(self) -> bool:
        """Whether torch.compile is at work before the first step, not beside later ones."""
        return self.compile not in (False, "auto")

    @property
    def beside(self) -> str:
        """Where processes beside the learners compute: on the GPU that Ray gave them, if any."""
        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"

    def check(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise ValueError(f"learner.device is {self.device!r}: use auto, cpu, cuda or cuda:N")


class Ready(NamedTuple):
    """A batch of `arrays` as `tensors` on the device, or on their way there until `event`."""

    arrays: Batch | Imagined
    tensors: Any
    event: torch.cuda.Event | None = None

    def arrived(self, device: torch.device) -> Any:
        """The tensors, for the current stream of the device."""
        if self.event is None:
            return self.tensors
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.event)

        def belongs(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        return self.tensors.map(belongs)


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
        compiles, gpu = config.compiles_first, self.device.type == "cuda"
        mode = config.compile if isinstance(config.compile, str) else "default"
        for name, (optimizer, loss) in agent.stages(part, rows).items():
            self.optimizers[name] = optimizer
            if compiles and gpu:
                loss = torch.compile(loss, fullgraph=True, mode=mode)
            self.stages[name] = Stage(optimizer, loss)
        self.pieces = Pieces(*self.agents) if compiles and not gpu else None
        self._copying = torch.cuda.Stream(self.device) if gpu else None
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

    def ahead(self, batch: Batch | Imagined) -> Ready:
        """A batch of arrays on the device, for `step`. A GPU copies it on a stream of its own: it
        may be done by another thread, beside the step before."""
        if self._copying is None:
            return Ready(batch, batch.map(read_only))  # no copy: losses read and do not change it
        with torch.cuda.stream(self._copying):
            return Ready(batch, batch.map(self._copied), self._copying.record_event())

    def _copied(self, value: np.ndarray) -> Tensor:
        tensor = read_only(value)
        tensor = tensor.pin_memory() if self.config.pin_memory else tensor
        return tensor.to(self.device, non_blocking=True)

    def step(self, batch: Batch | Imagined | Ready) -> dict[str, float]:
        """One gradient step on a (B, T) batch of arrays, or on what `ahead` made of it; gives the
        losses and metrics, in a group their means over the ranks.

        A policy that learns apart has a stage of its own, after all else has stepped. Raises
        NonFiniteLossError, on every rank, before the weights of its stage are changed.
        """
        ready = batch if isinstance(batch, Ready) else self.ahead(batch)
        with self.pieces.applied() if self.pieces else contextlib.nullcontext(), explained():
            return self._step(self._parts(ready.arrived(self.device)))

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
        self.write(self.files(), folder)

    def files(self) -> dict[str, Any]:
        """What `save` writes, by file: copies of tensors, and JSON. `write` may take its time."""
        random = {n: torch.from_numpy(x) for n, x in self.random_state().items()}
        files: dict[str, Any] = {self._random_file: random}
        if self.rank == 0:
            files |= self.agent.files(self.part)
            files |= moments.files(self.optimizers, self.part, self.gradient_steps)
        return files

    def write(self, files: dict[str, Any], folder: UPath) -> None:
        """Write what `files` gave, maybe beside later steps. Raises as `save`."""
        copied = {n: x for file in PARTS for n, x in files.get(f"{file}.safetensors", {}).items()}
        for name, _ in self.agent.named_parameters():
            if name in copied and not copied[name].isfinite().all():
                raise NonFiniteLossError(
                    f"the weights {name} are not finite after gradient step {self.gradient_steps}: "
                    "lower the learning rate; the last checkpoint is kept"
                )
        storage.save_files(folder, files)

    def load(self, folder: UPath, gradient_steps: int | None = None) -> None:
        """Continue from what `save` wrote, counting on from `gradient_steps` where it is given.

        In a group, before `join`; a rank the group did not have then keeps its random state.
        """
        self.agent.load_files(folder, self.part)
        steps = moments.load(self.optimizers, self.part, folder)
        self.gradient_steps = steps if gradient_steps is None else gradient_steps
        if (folder / self._random_file).exists():
            self.set_random_state(storage.load_arrays(folder / self._random_file))

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

    @property
    def _random_file(self) -> str:
        return f"rng-{self.part}-{self.rank}.safetensors"


def _possible(config: LearnerConfig, device: torch.device) -> LearnerConfig:
    """The config without what the device does not have; says so in a line for each."""
    cuda = device.type == "cuda"
    if config.precision == "bfloat16" and cuda and not torch.cuda.is_bf16_supported(False):
        logger.warning("learner.precision is float32: this GPU does not compute in bfloat16")
        config = replace(config, precision="float32")
    compiler = os.environ.get("CXX", "g++")
    if config.compiles_first and not shutil.which(compiler):
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
