"""The agent: a world model and a behavior, with one loss, one way to act and one file format.

`forward(batch)` is the loss: one forward, one backward, so that DDP can wrap it unchanged.
Checkpoints are safetensors and JSON, never pickle.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldflux_dist import checkpoint
from worldflux_dist.behaviors.actor_critic import ActorCritic, ActorCriticConfig
from worldflux_dist.data import Batch, Spaces
from worldflux_dist.models.base import Rollout, State, create_from_spaces

Carry = dict[str, Tensor]


class Agent(nn.Module):
    """Owns the world model and the behavior. What it was made from travels with it (`recipe`)."""

    def __init__(
        self,
        model: str,
        spaces: Spaces,
        model_options: dict[str, Any] | None = None,
        behavior: ActorCriticConfig | None = None,
    ) -> None:
        super().__init__()
        self.spaces = spaces
        config = behavior or ActorCriticConfig()
        self.recipe = {
            "model": model,
            "model_options": dict(model_options or {}),
            "behavior": asdict(config),
            "spaces": spaces.to_json(),
        }
        self.world_model = create_from_spaces(model, spaces, **(model_options or {}))
        self.behavior = ActorCritic(
            self.world_model.feature_dim, self.world_model.width, spaces.action_parts, config
        )
        self._carry: Carry | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ------------------------------------------------------------------------------- learning

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a (B, T) batch of tensors: weighted sum of the means of all losses.

        Also gives each loss (`loss/<name>`, detached) and metrics, as scalar tensors.
        """
        output = self.world_model.loss(batch)
        losses, metrics = self.behavior.loss(self.world_model, output.states, batch)
        scales = self.world_model.loss_scales | self.behavior.loss_scales
        means = {name: loss.mean() for name, loss in (output.losses | losses).items()}
        total = torch.stack([scales.get(name, 1.0) * mean for name, mean in means.items()]).sum()
        logged = {f"loss/{name}": mean.detach() for name, mean in means.items()}
        return total, logged | {"loss": total.detach()} | output.metrics | metrics

    def policy_loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The behavior's loss alone, on an imagined trajectory; the model gets no gradient."""
        features = self.world_model.features(rollout.states).detach()
        losses, metrics, _ = self.behavior.imagination_loss(rollout, features)
        means = {name: loss.mean() for name, loss in losses.items()}
        logged = {f"loss/{name}": mean.detach() for name, mean in means.items()}
        return torch.stack(list(means.values())).sum(), logged | metrics

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One optimizer for all losses, by the family's recipe."""
        params = [p for p in self.parameters() if p.requires_grad]
        return {"all": self.world_model.optimizer(params)}

    def update_targets(self) -> None:
        """After every gradient step."""
        self.behavior.update_targets()

    # --------------------------------------------------------------------------------- acting

    @torch.no_grad()
    def act_batch(
        self,
        obs: dict[str, np.ndarray],
        is_first: np.ndarray,
        carry: Carry | None = None,
        greedy: bool = False,
    ) -> tuple[np.ndarray, Carry]:
        """Flat actions (N, A) for converted observations (N, ...), and what to remember.

        `carry` is what the last call gave (None before the first); is_first (N,) rows forget it.
        """
        first = torch.as_tensor(is_first, device=self.device)
        if carry is None:
            state = self.world_model.initial(len(first))
            carry = {**state.tensors, "action": torch.zeros(len(first), self.spaces.action_dim)}
        state = State({name: value for name, value in carry.items() if name != "action"})
        state = self.world_model.update(state, carry["action"].to(self.device), obs, first)
        action = self.behavior.act(self.world_model.features(state), greedy)
        return action.cpu().numpy(), {**state.tensors, "action": action}

    def act(self, obs: Any, greedy: bool = True) -> Any:
        """The action for one observation, both in the environment's own spaces.

        The agent remembers what it saw: call `reset()` when an episode begins.
        """
        converted = self.spaces.encode_obs(_add_axis(obs))
        first = np.array([self._carry is None])
        action, self._carry = self.act_batch(converted, first, self._carry, greedy)
        return _drop_axis(self.spaces.decode_action(action))

    def reset(self) -> None:
        """Forget: the next observation is the first of an episode."""
        self._carry = None

    def imagine(self, obs: Any, horizon: int | None = None) -> Rollout:
        """Roll the policy in the model from a first look at a batch of observations."""
        return self.behavior.imagine(self.world_model, self.world_model.encode(obs), horizon)

    # --------------------------------------------------------------------------------- saving

    def inference_state(self) -> dict[str, np.ndarray]:
        """Copies of the parameters that acting needs: what runners are sent."""
        wanted = [f"world_model.{name}." for name in self.world_model.inference_modules()]
        wanted += [f"behavior.{name}." for name in self.behavior.inference_modules()]
        return {
            name: value.detach().cpu().numpy().copy()
            for name, value in self.state_dict().items()
            if name.startswith(tuple(wanted))
        }

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Copy arrays into the parameters and buffers of the same names."""
        state = self.state_dict()
        for name, value in arrays.items():
            state[name].copy_(torch.as_tensor(value))

    def load_file(self, path: Path) -> None:
        """Take over all weights from agent.safetensors. Raises CheckpointError if they differ."""
        arrays, _ = checkpoint.load_arrays(path)
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: value.shape for name, value in arrays.items()}
        wrong = sorted(n for n in ours.keys() | found.keys() if ours.get(n) != found.get(n))
        if wrong:
            raise checkpoint.CheckpointError(
                f"{path} holds another agent's weights ({len(wrong)} tensors differ, first "
                f"{wrong[0]}: {found.get(wrong[0])} there, {ours.get(wrong[0])} here)"
            )
        self.load_arrays(arrays)

    def save(self, folder: Path | str) -> None:
        """Write agent.safetensors and agent.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        checkpoint.save_arrays(folder / "agent.safetensors", arrays)
        checkpoint.write_json(folder / "agent.json", self.recipe)

    @classmethod
    def load(cls, path: Path | str) -> Agent:
        """The agent in a folder written by `save`, or of a run's newest good checkpoint.

        Raises CheckpointError or FileNotFoundError naming the path when there is none.
        """
        folder = Path(path)
        if not (folder / "agent.json").exists():
            found = checkpoint.newest(folder / "checkpoints")
            if found is None:
                raise FileNotFoundError(
                    f"no agent in {folder}: expected agent.json or a run directory with checkpoints"
                )
            folder = found[0]
        agent = cls.from_recipe(checkpoint.read_json(folder / "agent.json"))
        agent.load_file(folder / "agent.safetensors")
        return agent

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Agent:
        return cls(
            recipe["model"],
            Spaces.from_json(recipe["spaces"]),
            recipe["model_options"],
            ActorCriticConfig(**recipe["behavior"]),
        )


def _add_axis(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _add_axis(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_add_axis(part) for part in value)
    return np.asarray(value)[None]


def _drop_axis(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_axis(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_drop_axis(part) for part in value)
    return value[0]
