"""What came before the tensors of a state: the last few of each, and the actions between them."""

from __future__ import annotations

import torch
from torch import Tensor

Named = dict[str, Tensor]
Names = tuple[str, ...]  # of tensors of a state


def past(name: str) -> str:
    """Of what a state holds, the name of what came before it."""
    return f"past/{name.removeprefix('obs/')}"


class History:
    """For each tensor of `lengths`, itself included, so many: `past/<key>` (B, length - 1, ...),
    oldest first, is its first value again where nothing came before. `past_action` has the actions
    between, for the longest, zero where there were none. Lengths of 1 need nothing."""

    def __init__(self, lengths: dict[str, int], action_dim: int) -> None:
        self.lengths, self.action_dim = lengths, action_dim
        self.num_actions = max(lengths.values())

    def blank(self, state: Named, batch_size: int) -> Named:
        """Zeros, for a state (B, ...) of zeros."""
        found = {
            past(name): torch.stack([state[name]] * (length - 1), 1)
            for name, length in self.lengths.items()
            if length > 1
        }
        if self.num_actions > 1:
            zeros = state["memory"].new_zeros
            found["past_action"] = zeros(batch_size, self.num_actions - 1, self.action_dim)
        return found

    def followed(
        self, old: Named, action: Tensor, new: Named | None = None, keep: Tensor | None = None
    ) -> Named:
        """After an action (B, A); all of what came before is `new` where keep (B,) is 0."""
        latest = {past(name): old[name] for name in self.lengths} | {"past_action": action}
        found = {
            name: torch.cat([old[name][:, 1:], value.unsqueeze(1)], 1)
            for name, value in latest.items()
            if name in old
        }
        if keep is None or new is None:
            return found
        for name in self.lengths:
            if (before := found.get(past(name))) is not None:
                fresh = keep.view(-1, *[1] * (before.ndim - 1)) == 0
                found[past(name)] = torch.where(fresh, new[name].unsqueeze(1), before)
        if "past_action" in found:
            found["past_action"] = found["past_action"] * keep[:, None, None]
        return found

    def of_steps(self, state: Named, action: Tensor, is_first: Tensor) -> Named:
        """Of all steps of (B, T, ...) at once: nothing from before a reset."""
        rows = torch.arange(len(action), device=action.device)[:, None, None]
        now = torch.arange(action.shape[1], device=action.device)
        begun = torch.where(is_first, now, 0).cummax(1).values[..., None]  # (B, T, 1)
        found = {}
        for name, length in self.lengths.items():
            if length > 1:
                back = now[:, None] - torch.arange(length - 1, 0, -1, device=now.device)
                found[past(name)] = state[name][rows, torch.maximum(back, begun)]
        if self.num_actions > 1:
            back = now[:, None] - torch.arange(self.num_actions - 2, -1, -1, device=now.device)
            acted = action[rows, back.clamp(min=0)]  # (B, T, k - 1, A)
            found["past_action"] = acted * (back > begun).unsqueeze(-1)
        return found
