"""The agent: a world model and a behavior, with one loss, one way to act and one file format.

`forward(batch)` is the loss, in one forward and one backward; only a policy that learns apart has a
second one, after all else has stepped. Model and behavior can learn in different processes: what
an agent learns with, sends and saves can be asked for by part, "agent", "world_model" or
"behavior". Checkpoints are safetensors and JSON, never pickle.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
import torch
from pydantic import TypeAdapter, with_config
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypedDict

from worldflux_dist import behaviors, checkpoint, plugins, storage
from worldflux_dist.behaviors.actor_critic import ActorCritic
from worldflux_dist.behaviors.base import Behavior, BehaviorLoss, Imagined
from worldflux_dist.behaviors.planner import Planner, PlannerConfig
from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Rollout, State, create_from_spaces
from worldflux_dist.nn.memory import Allowance, arrays, copies, read_only
from worldflux_dist.settings import STRICT, Text, parse
from worldflux_dist.spaces import Spaces

if TYPE_CHECKING:
    from upath import UPath


@with_config(STRICT)
class _Recipe(TypedDict):
    model: Text
    model_options: dict[str, Any]
    behavior: dict[str, Any]
    planner: NotRequired[dict[str, Any]]
    packages: NotRequired[list[Text]]
    spaces: Any


_RECIPE = TypeAdapter(_Recipe)
PARTS = ("world_model", "behavior")  # of an agent, each with a file of its own
Carry = dict[str, Tensor]
Path = tuple[Tensor, Tensor]  # features (B, T, F) and what step t counts, (T,)
# A stage's loss (), its metrics as scalar tensors, each loss (`loss/<name>`, detached) among them,
# and the path from which a policy that learns apart starts, where there is one.
StageOutput = tuple[Tensor, dict[str, Tensor], Path | None]
LossOf = Callable[[Any], StageOutput]


class Agent(nn.Module):
    """Owns the world model, the behavior and, where there is one, the planner. What it was made
    from travels with it (`recipe`).

    `behavior` and `planner` replace values of the ones that the family was published with; a
    behavior of another `kind` starts from its own defaults.
    """

    def __init__(
        self,
        model: str,
        spaces: Spaces,
        model_options: dict[str, Any] | None = None,
        behavior: dict[str, Any] | None = None,
        planner: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.spaces = spaces
        self.world_model = create_from_spaces(model, spaces, **(model_options or {}))
        native = self.world_model.native
        kind, config = behaviors.behavior_config(native["behavior"], behavior or {})
        options = native["planner"] | (planner or {})
        planning = parse(PlannerConfig(), options, "planner has no option {}")
        self.recipe: dict[str, Any] = {
            "model": model,
            "model_options": dict(model_options or {}),
            "behavior": {"kind": kind, **asdict(config)},
            "planner": asdict(planning),
            "spaces": spaces.to_json(),
        }
        packages = {plugins.FAMILIES: model.partition(":")[0], plugins.BEHAVIORS: kind}
        brought = [plugins.entries(group).get(name) for group, name in packages.items()]
        if any(brought):
            self.recipe["packages"] = sorted({plugins.package(entry) for entry in brought if entry})
        make: Any = behaviors.find(kind)
        sizes = (self.world_model.feature_dim, self.world_model.width)
        self.behavior: Behavior = make(*sizes, spaces.action_parts, config)
        self.planner: Planner | None = None
        if planning.method != "none":
            self.planner = Planner(planning, spaces.action_parts, self.world_model)
        self._goal = self._flat_goal(planning.goal) if planning.goal else None
        self._carry: Carry | None = None
        self._dropped: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ------------------------------------------------------------------------------- learning

    def forward(self, batch: Batch, rows: bool = False) -> StageOutput:
        """The loss of a (B, T) batch of tensors, of the world model and the behavior together.

        `rows` adds "row_losses" (B,), the world model's loss of every row, to the metrics.
        """
        output = self.world_model.loss(batch)
        behavior, num = self.behavior.loss(self.world_model, output), len(batch.reward)
        return self._weighted(output, behavior, num if rows else None)

    def world_model_loss(self, batch: Batch, rows: bool = False) -> StageOutput:
        """As `forward`, without the behavior's losses."""
        output, num = self.world_model.loss(batch), len(batch.reward)
        return self._weighted(output, BehaviorLoss({}, {}), num if rows else None)

    def imagined_loss(self, imagined: Imagined) -> StageOutput:
        """The behavior's loss on an imagined batch of tensors, which may be packed."""
        imagined = imagined.unpacked(self.world_model.feature_parts)
        behavior = self.imagining().imagined_loss(imagined, self.world_model.discount)
        return self._weighted(None, behavior)

    def policy_loss(self, path: Path) -> StageOutput:
        """The loss of a policy that learns apart, from the path that `forward` gives."""
        loss, metrics = self.behavior.policy_loss(*path)
        return loss, {"loss/policy": loss.detach()} | metrics, None

    def _weighted(
        self, model: LossOutput | None, behavior: BehaviorLoss, num_rows: int | None = None
    ) -> StageOutput:
        """The weighted sum of the means of all losses."""
        losses, metrics = (model.losses, model.metrics) if model else ({}, {})
        scales = self.world_model.loss_scales | self.behavior.loss_scales
        means = {name: loss.mean() for name, loss in (losses | behavior.losses).items()}
        total = torch.stack([scales.get(name, 1.0) * mean for name, mean in means.items()]).sum()
        logged = {f"loss/{name}": mean.detach() for name, mean in means.items()}
        logged |= {"loss": total.detach()} | metrics | behavior.metrics
        if num_rows is not None:
            rows = [
                scales.get(name, 1.0) * loss.detach().reshape(num_rows, -1).mean(1)
                for name, loss in losses.items()
            ]
            logged["row_losses"] = torch.stack(rows).sum(0)  # (num_rows,)
        return total, logged, behavior.path

    def stages(
        self, part: str = "agent", rows: bool = False
    ) -> dict[str, tuple[Optimizer, LossOf]]:
        """What a part learns from, by name and in order: optimizers and the losses they lower.

        The first loss is that of a batch, with `row_losses` where `rows` are asked for, the second,
        of a policy that learns apart and has a recipe of its own, that of the path which the first
        one gives. All else goes by the family's recipe. Raises ValueError for the part "behavior"
        of an agent that does not learn in imagination.
        """
        family = self.world_model.optimizer
        if part == "world_model":
            loss = partial(self.world_model_loss, rows=rows)
            return {"world_model": (family(_learned(self.world_model)), loss)}
        if part == "behavior":
            return {"imagined": (family(_learned(self.imagining())), self.imagined_loss)}
        policy = self.behavior.policy_optimizer()
        apart = {id(p) for g in policy.param_groups for p in g["params"]} if policy else set()
        optimizer = family([p for p in _learned(self) if id(p) not in apart])
        model = {"model": (optimizer, partial(self.forward, rows=rows))}
        return model | ({"policy": (policy, self.policy_loss)} if policy else {})

    def imagining(self) -> ActorCritic:
        """The behavior. Raises ValueError for one that does not learn in imagination."""
        if not isinstance(self.behavior, ActorCritic):
            raise ValueError(
                f"behavior.kind {self.recipe['behavior']['kind']} does not learn in imagination: "
                "set behavior.kind to actor_critic, or imagination.mode to fused"
            )
        return self.behavior

    # --------------------------------------------------------------------------------- acting

    @torch.no_grad()
    def act_batch(
        self,
        obs: dict[str, np.ndarray],
        is_first: np.ndarray,
        carry: Carry | None = None,
        greedy: bool = False,
        noise: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[np.ndarray, Carry]:
        """Flat actions (N, A) for converted observations (N, ...), and what to remember.

        `carry` is what the last call gave; is_first (N,) rows forget it, and all do where it is
        None. `noise` fixes the draws of `update` and of the policy; those of a plan are torch's.
        """
        device = self.device
        first = torch.as_tensor(is_first, device=device)
        if carry is None:
            carry, first = self.initial_carry(len(first)), torch.ones_like(first)
        remembered = {n[6:]: value for n, value in carry.items() if n.startswith("state/")}
        action = carry["action"].to(device)
        state = self.world_model.update(State(remembered), action, obs, first, noise[0])
        new_carry = {f"state/{name}": value for name, value in state.tensors.items()}
        if self.planner is None:
            action = self.behavior.act(self.world_model.features(state), greedy, noise[1])
        else:
            fresh = self.planner.initial(len(first), device)
            mean = torch.where(first[:, None, None], fresh, carry["plan"])
            action, new_carry["plan"] = self.planner.plan(
                self.world_model, self.behavior, state, mean, greedy, self.goal_features()
            )
        return action.cpu().numpy(), new_carry | {"action": action}

    def initial_carry(self, num: int) -> Carry:
        """What `act_batch` remembers of N = `num` environments it has not seen yet."""
        state = self.world_model.initial(num)
        carry = {f"state/{name}": value for name, value in state.tensors.items()}
        carry["action"] = torch.zeros(num, self.spaces.action_dim, device=self.device)
        if self.planner is not None:
            carry["plan"] = self.planner.initial(num, self.device)
        return carry

    @property
    def needs_goal(self) -> bool:
        """Whether plans need a goal that has not been given yet."""
        return self._plans_to_goal and self._goal is None

    @property
    def _plans_to_goal(self) -> bool:
        return self.planner is not None and self.planner.config.objective == "goal"

    def goal_features(self) -> Tensor | None:
        """What plans bring near, (1, G), of the goal, where they have one."""
        if self.needs_goal:
            raise ValueError(
                "planner.objective is goal and there is none: set planner.goal or call "
                "Agent.set_goal(obs)"
            )
        if not self._plans_to_goal:
            return None
        return self.world_model.goal(self.world_model.encode(self._goal))

    def set_goal(self, obs: Any) -> None:
        """Plan from now on to where `obs`, one observation of the environment's own, is seen.

        Raises ValueError where planner.objective is not goal.
        """
        if not self._plans_to_goal:
            raise ValueError("a goal needs planner.objective goal and a planner.method")
        self._goal = self._encode_one(obs)

    def _encode_one(self, obs: Any) -> dict[str, np.ndarray]:
        return self.spaces.encode_obs(_each(obs, lambda value: np.asarray(value)[None]))

    def _flat_goal(self, goal: tuple[float, ...]) -> dict[str, np.ndarray]:
        (key, spec), *more = self.spaces.obs.items()
        if more or spec.shape != (len(goal),):
            raise ValueError(
                f"planner.goal has {len(goal)} numbers, which is no observation of this "
                "environment: give one vector of its length, or call Agent.set_goal(obs)"
            )
        return {key: np.asarray(goal, np.float32)[None]}

    def act(self, obs: Any, greedy: bool = True) -> Any:
        """The action for one observation, both in the environment's own spaces.

        The agent remembers what it saw: call `reset()` when an episode begins.
        """
        first = np.array([self._carry is None])
        action, self._carry = self.act_batch(self._encode_one(obs), first, self._carry, greedy)
        return _each(self.spaces.decode_action(action), operator.itemgetter(0))

    def reset(self) -> None:
        """Forget: the next observation is the first of an episode."""
        self._carry = None

    @torch.no_grad()
    def imagine(self, obs: Any, horizon: int = 15) -> Rollout:
        """Roll the policy in the model from a first look at a batch of observations."""
        return self.world_model.rollout(self.world_model.encode(obs), self.behavior.act, horizon)

    # --------------------------------------------------------------------------------- saving

    def inference_state(self, part: str = "agent") -> dict[str, Tensor]:
        """Copies of the parameters of a part that acting needs: what runners are sent.

        A world model that is published alone goes to imaginers, too, who roll it forward.
        """
        wanted = self._needed(rolling=part == "world_model")
        return copies({n: x for n, x in self.part_state(part).items() if n.startswith(wanted)})

    def _needed(self, rolling: bool = False) -> tuple[str, ...]:
        """Prefixes of what acting, and with `rolling` also imagining, needs."""
        planning = self.planner is not None
        model = self.world_model.inference_modules(planning or rolling)
        behavior = self.behavior.inference_modules(planning)
        return (*(f"world_model.{n}." for n in model), *(f"behavior.{n}." for n in behavior))

    def unused(self) -> list[str]:
        """Paths of the submodules that acting does not need."""
        needed = self._needed()
        paths = [f"{p}.{name}" for p in PARTS for name, _ in getattr(self, p).named_children()]
        return [path for path in paths if f"{path}." not in needed]

    def drop_unused(self) -> None:
        """Keep what acting needs and no more. Weights of what is gone are ignored from now on."""
        self._dropped = tuple(f"{path}." for path in self.unused())
        for part, name, _ in (path.split(".") for path in self._dropped):
            delattr(getattr(self, part), name)

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Copy arrays into the parameters and buffers of the same names."""
        state = self.state_dict()
        for name, value in arrays.items():
            if not name.startswith(self._dropped):
                state[name].copy_(read_only(value))

    def part_state(self, part: str = "agent") -> dict[str, Tensor]:
        """The `state_dict` of a part."""
        prefix = "" if part == "agent" else f"{part}."
        return {name: x for name, x in self.state_dict().items() if name.startswith(prefix)}

    def part_arrays(self, part: str = "agent") -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers of a part, as `load_arrays` takes them."""
        return arrays(copies(self.part_state(part)))

    def load_files(self, folder: UPath, part: str = "agent") -> None:
        """Take over a part's weights from the files of `save`. CheckpointError if they differ."""
        for name in PARTS if part == "agent" else (part,):
            path = folder / f"{name}.safetensors"
            arrays = storage.load_arrays(path)
            ours = {key: tuple(value.shape) for key, value in self.part_state(name).items()}
            theirs = {key: value.shape for key, value in arrays.items()}
            wrong = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
            if wrong:
                raise storage.CheckpointError(
                    f"{path} holds another agent's weights ({len(wrong)} tensors differ, first "
                    f"{wrong[0]}: {theirs.get(wrong[0])} there, {ours.get(wrong[0])} here)"
                )
            self.load_arrays(arrays)

    def save(self, folder: UPath | str, part: str = "agent") -> None:
        """Write the `files` of all or of one part."""
        folder = storage.as_path(folder) if isinstance(folder, str) else folder
        storage.save_files(folder, self.files(part))

    def files(self, part: str = "agent") -> dict[str, Any]:
        """What `save` writes, by file: copies of weights and, but for the behavior alone, JSON."""
        files: dict[str, Any] = {} if part == "behavior" else {"agent.json": self.recipe}
        for name in PARTS if part == "agent" else (part,):
            files[f"{name}.safetensors"] = copies(self.part_state(name))
        return files

    @classmethod
    def load(cls, path: UPath | str) -> Agent:
        """The agent in a folder written by `save`, or of a run's newest good checkpoint.

        What is read may come from elsewhere: nothing is built that the weights beside it do not
        fill. Raises CheckpointError naming file and field, or FileNotFoundError where there is no
        agent.
        """
        folder = storage.as_path(path) if isinstance(path, str) else path
        if not (folder / "agent.json").exists():
            newest = checkpoint.newest(folder / "checkpoints")
            if newest is None:
                raise FileNotFoundError(
                    f"no agent in {folder}: expected agent.json or a run directory with checkpoints"
                )
            folder = newest[0]
        recipe: Any = storage.read_form(folder / "agent.json", _RECIPE)
        missing = plugins.missing(recipe.pop("packages", []))
        if missing:
            raise storage.CheckpointError(
                f"{folder / 'agent.json'}: this agent needs {', '.join(missing)}, which is not "
                f"installed here: pip install {' '.join(missing)}"
            )
        weights = [folder / f"{name}.safetensors" for name in PARTS]
        try:
            with Allowance(sum(map(storage.size, weights)) // 2):  # of numbers: a quarter, twice
                spaces = Spaces.from_json(recipe.pop("spaces"))
                agent = cls(spaces=spaces, **recipe)
        except ValueError as error:
            raise storage.CheckpointError(f"{folder / 'agent.json'}: {error}") from error
        agent.load_files(folder)
        return agent


def _learned(module: nn.Module) -> list[nn.Parameter]:
    return [param for param in module.parameters() if param.requires_grad]


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of every array in what may be a dict or tuple."""
    if isinstance(value, dict):
        return {key: _each(part, function) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_each(part, function) for part in value)
    return function(value)
