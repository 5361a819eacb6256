"""The official TD-MPC2, nicklashansen/tdmpc2, from a folder that the user has.

It names the GPU itself; here its modules see a torch of which every device is the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from peers.work import Made, Work, noise


class Settings(SimpleNamespace):
    """Its configuration as its code reads it."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def make(work: Work, source: str, compiled: bool = False) -> Made:
    """An update, and a plan for one environment."""
    torch.set_num_threads(work.threads)
    sys.path.insert(0, str(Path(source) / "tdmpc2"))
    import tdmpc2
    from common import scale

    for module in (tdmpc2, scale):
        module.torch = torch_on_cpu()
    tdmpc2.WorldModel.to = lambda model, _: (
        model
    )  # it is there; newer torch refuses its meta tensors
    agent = tdmpc2.TDMPC2(settings(work, source, compiled))
    for optimizer in (agent.optim, agent.pi_optim):
        for group in optimizer.param_groups:
            group["capturable"] = False  # of CUDA graphs
    replay, obs = Replay(work), torch.randn(work.what.obs_shape)
    calls = {"update": lambda: agent.update(replay), "plan": lambda: agent.act(obs)}
    groups = (*agent.optim.param_groups, *agent.pi_optim.param_groups)
    trained = [p for group in groups for p in group["params"] if p.device.type == "cpu"]  # no metas
    return Made(calls, sum(p.numel() for p in trained))


def torch_on_cpu() -> ModuleType:
    module = ModuleType("torch")
    module.__dict__.update(torch.__dict__)
    module.__dict__["device"] = lambda *_: torch.device("cpu")
    return module


def settings(work: Work, source: str, compiled: bool) -> Settings:
    """Its own configuration with what its parser adds for one task without an end."""
    from common import MODEL_SIZE
    from omegaconf import OmegaConf

    text = OmegaConf.load(Path(source) / "tdmpc2" / "config.yaml")
    found: Any = OmegaConf.to_container(text)
    found |= MODEL_SIZE[int(work.size.removesuffix("m"))]
    found |= {
        "compile": compiled,
        "bin_size": (found["vmax"] - found["vmin"]) / (found["num_bins"] - 1),
        "multitask": False,
        "tasks": [found["task"]],
        "task_dim": 0,
        "obs_shape": {"state": work.what.obs_shape},
        "action_dim": work.what.num_actions,
        "episode_length": 500,
        "batch_size": work.what.batch[0],
        "horizon": work.what.batch[1] - 1,
    }
    return Settings(**found)


class Replay:
    """Stands in for its replay: the same windows each time, time first."""

    def __init__(self, work: Work) -> None:
        arrays = {
            key: torch.from_numpy(value.swapaxes(0, 1).copy())
            for key, value in noise(work.what).items()
        }
        reward = arrays["reward"][1:, :, None]
        self.batch = (arrays["obs"], arrays["action"][1:], reward, torch.zeros_like(reward), None)

    def sample(self) -> Any:
        return self.batch
