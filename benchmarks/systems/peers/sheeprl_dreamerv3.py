"""SheepRL's DreamerV3 learner, the recipe of 2025 at its own presets of our sizes."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import torch
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from sheeprl.algos.dreamer_v3_5.agent import build_agent
from sheeprl.algos.dreamer_v3_5.dreamer_v3_5 import train, update_target_critic
from sheeprl.algos.dreamer_v3_5.utils import Moments
from sheeprl.utils.utils import dotdict

from peers.work import HORIZON, Made, Work, noise

PRESETS = {"size1m": "dreamer_v3_5_1M", "size12m": "dreamer_v3_5_12M"}


def make(work: Work, compiled: bool = False) -> Made:
    """One float32 update from states of zero; `compiled` is its `algo.compile.enabled`."""
    torch.set_num_threads(work.threads)
    task, cfg = work.what, settings(work, compiled)
    key, data = batch(work)
    space = SimpleNamespace(shape=data[key].shape[2:])
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    actions = (task.num_actions,)
    world_model, actor, critic, slow_critic, _ = build_agent(
        fabric, actions, False, cfg, {key: space}
    )
    parameters = [*world_model.parameters(), *actor.parameters(), *critic.parameters()]
    optimizer = hydra.utils.instantiate(cfg.algo.optimizer, params=parameters, _convert_="all")
    optimizer = fabric.setup_optimizers(optimizer)
    scale = cfg.algo.actor.moments
    moments = Moments(scale.decay, scale.max, scale.percentile.low, scale.percentile.high)

    def update() -> None:
        learned = (world_model, actor, critic, slow_critic, optimizer, moments)
        train(fabric, cfg, *learned, dict(data), None, actions)
        update_target_critic(critic, slow_critic, cfg.algo.critic.tau)

    return Made({"update": update}, sum(p.numel() for p in parameters), version("sheeprl"))


def settings(work: Work, compiled: bool) -> Any:
    """Its configuration for our task: no replay context, which we do not have either."""
    kind = "cnn" if work.what.is_image else "mlp"
    rows, length = work.what.batch
    overrides = [
        "exp=dreamer_v3_5",
        f"algo={PRESETS[work.size]}",
        "env=gym",
        "algo.cnn_keys.encoder=[]",
        f"algo.{kind}_keys.encoder=[seen]",
        f"algo.per_rank_batch_size={rows}",
        f"algo.per_rank_sequence_length={length}",
        f"algo.horizon={HORIZON}",
        "algo.replay_context=0",
        f"algo.compile.enabled={compiled}",
    ]
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        cfg = hydra.compose("config", overrides)
    return dotdict(OmegaConf.to_container(cfg, resolve=True))


def batch(work: Work) -> tuple[str, dict[str, torch.Tensor]]:
    """The key of the observations and the batch, time first, as its replay gives it."""
    arrays = noise(work.what)
    obs = np.moveaxis(arrays["obs"], -1, -3) if work.what.is_image else arrays["obs"]
    columns = {
        "seen": obs,
        "actions": arrays["action"],
        "rewards": arrays["reward"][..., None],
        "is_first": arrays["is_first"][..., None].astype(np.float32),
        "terminated": arrays["is_terminal"][..., None].astype(np.float32),
        "truncated": arrays["is_last"][..., None].astype(np.float32),
    }
    return "seen", {
        key: torch.from_numpy(np.ascontiguousarray(value.swapaxes(0, 1)))
        for key, value in columns.items()
    }
