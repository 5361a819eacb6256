"""RLlib's own DreamerV3 learner, alone and at our widths, to measure ours against.

It is built without environments and without a Ray cluster, and is called as its algorithm calls
it: a numpy batch in, three losses, three backward passes, three Adam steps, its metrics out.
Depth stays RLlib's smallest (one layer in every head, where ours has up to three) and its
recurrence stays dense (ours is block-diagonal), so it has fewer layers and more parameters.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import cast

import numpy as np
import ray
import torch
from gymnasium import spaces

from peers.work import CATEGORICALS, HORIZON, WIDTHS, Made, Work, noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # RLlib makes environments while it is imported
    from ray.rllib.algorithms.dreamerv3 import DreamerV3Config
    from ray.rllib.algorithms.dreamerv3.torch import (  # noqa: F401  imported before `set_widths`
        dreamerv3_torch_learner,
        dreamerv3_torch_rl_module,
    )
    from ray.rllib.algorithms.dreamerv3.torch.models.components import (  # noqa: F401  likewise
        cnn_atari,
        conv_transpose_atari,
        vector_decoder,
    )
    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.policy.sample_batch import SampleBatch


def make(work: Work) -> Made:
    """One float32 update of RLlib's learner on the batch; images go in as floats in [-1, 1], as
    RLlib's own image wrapper makes them."""
    task, batch = work.what, noise(work.what)
    torch.set_num_threads(work.threads)
    set_widths(work.size)
    obs = batch["obs"].astype(np.float32)
    observation = spaces.Box(-np.inf, np.inf, task.obs_shape, np.float32)
    if task.is_image:
        obs = obs / 127.5 - 1
        observation = spaces.Box(-1, 1, task.obs_shape, np.float32)
    rows, length = task.batch
    config = (
        DreamerV3Config()
        .learners(num_learners=0)
        .training(batch_size_B=rows, batch_length_T=length, horizon_H=HORIZON)
    )
    action: spaces.Space = spaces.Discrete(task.num_actions)
    learner = config.build_learner(spaces={DEFAULT_MODULE_ID: (observation, action)})
    sample = SampleBatch(
        obs=obs,
        actions=batch["action"],
        rewards=batch["reward"],
        is_first=batch["is_first"],
        is_last=batch["is_last"],
        is_terminated=batch["is_terminal"],
        is_truncated=batch["is_last"] & ~batch["is_terminal"],
    ).as_multi_agent()
    module = cast(torch.nn.Module, learner.module[DEFAULT_MODULE_ID])
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)  # not the slow critic
    return Made({"update": lambda: learner.update(batch=sample)}, trained, ray.__version__)


def set_widths(size: str) -> None:
    """Give RLlib's models our widths of `size`: RLlib knows its own by letter only, from functions
    that each of its modules imported. Raises KeyError for a size that is not told in peers.work."""
    widths = WIDTHS[size]
    found = {
        "get_gru_units": widths.deter,
        "get_dense_hidden_units": widths.units,
        "get_num_z_categoricals": CATEGORICALS,
        "get_num_z_classes": widths.classes,
        "get_num_dense_layers": 1,
        "get_cnn_multiplier": widths.depth,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("ray.rllib.algorithms.dreamerv3"):
            for function, width in found.items():
                if hasattr(module, function):
                    setattr(module, function, _constant(width))


def _constant(width: int) -> Callable[..., int]:
    return lambda model_size, override=None: width if override is None else override
