"""NM512/r2dreamer from a folder that the user has: its Dreamer with the decoder's loss.

It casts to float16, which CPUs have no products for: here it computes in float32, as the others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from peers.work import HORIZON, Made, Work, noise


def make(work: Work, source: str, compiled: bool = False) -> Made:
    """One update from states of zero."""
    torch.set_num_threads(work.threads)
    sys.path.insert(0, source)
    import dreamer

    dreamer.autocast = lambda **_: torch.autocast("cpu", enabled=False)
    task = work.what
    shapes = {"image" if task.is_image else "state": SimpleNamespace(shape=task.obs_shape)}
    agent = dreamer.Dreamer(
        settings(work, source, compiled),
        SimpleNamespace(spaces=shapes),
        SimpleNamespace(n=task.num_actions, discrete=True),
    )
    replay = Replay(work, agent)
    trained = sum(p.numel() for group in agent._optimizer.param_groups for p in group["params"])
    return Made({"update": lambda: agent.update(replay)}, trained)


def settings(work: Work, source: str, compiled: bool) -> Any:
    """Its own configuration at our size."""
    from omegaconf import OmegaConf

    widths, everything, nothing = work.widths, ".*", "$^"
    keys = {
        "mlp_keys": nothing if work.what.is_image else everything,
        "cnn_keys": everything if work.what.is_image else nothing,
    }
    sizes = {
        "deter": widths.deter,
        "hidden": widths.hidden,
        "discrete": widths.classes,
        "depth": widths.depth,
        "units": widths.units,
        "act": "SiLU",
        "norm": True,
    }
    how = {"rep_loss": "dreamer", "compile": compiled, "imag_horizon": HORIZON}
    base = OmegaConf.load(Path(source) / "configs" / "model" / "_base_.yaml")
    model = OmegaConf.merge(base, sizes, how)
    env = {"encoder": keys, "decoder": keys}
    return OmegaConf.create({"model": model, "env": env, "device": "cpu"}).model


class Replay:
    """Stands in for its replay: the same batch each time; what it would note is dropped."""

    def __init__(self, work: Work, agent: Any) -> None:
        from tensordict import TensorDict

        arrays = {key: torch.from_numpy(value) for key, value in noise(work.what).items()}
        arrays["image" if work.what.is_image else "state"] = arrays.pop("obs")
        for key in ("reward", "is_first", "is_last", "is_terminal"):
            arrays[key] = arrays[key][..., None]
        self.batch = TensorDict(arrays, work.what.batch)
        self.initial = agent.rssm.initial(work.what.batch[0])

    def sample(self) -> tuple[Any, None, Any]:
        return self.batch.clone(recurse=False), None, self.initial

    def update(self, *_: Any) -> None:
        pass
