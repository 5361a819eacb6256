"""RLlib's own DreamerV3 learner, alone and at our widths, to measure ours against.

It is built without environments and without a Ray cluster, and is called as its algorithm calls
it: a numpy batch in, three losses, three backward passes, three Adam steps, its metrics out.
Depth stays RLlib's smallest (one layer in every head, where ours has up to three) and its
recurrence stays dense (ours is block-diagonal), so it has fewer layers and more parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.dreamerv3 import DreamerV3Config
from ray.rllib.algorithms.dreamerv3.torch import (  # noqa: F401  imported before `_set_widths`
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

from worldflux_dist.data import Batch

WIDTHS = {
    "size1m": {
        "get_gru_units": 512,
        "get_dense_hidden_units": 64,
        "get_num_z_categoricals": 32,
        "get_num_z_classes": 4,
        "get_num_dense_layers": 1,
        "get_cnn_multiplier": 4,
    },
    "size12m": {
        "get_gru_units": 2048,
        "get_dense_hidden_units": 256,
        "get_num_z_categoricals": 32,
        "get_num_z_classes": 16,
        "get_num_dense_layers": 1,
        "get_cnn_multiplier": 16,
    },
}


def rllib_step(
    size: str, observation: spaces.Box, action: spaces.Discrete, batch: Batch, horizon: int
) -> tuple[Callable[[], object], int]:
    """One float32 learner update on `batch` as a function, and the number of trained parameters.

    `batch` holds one observation named "obs"; images go in as floats in [-1, 1], as RLlib's own
    image wrapper makes them. Raises KeyError for a size that `WIDTHS` lacks.
    """
    _set_widths(WIDTHS[size])
    obs = batch.obs["obs"].astype(np.float32)
    if observation.dtype == np.uint8:
        obs = obs / 127.5 - 1
        observation = spaces.Box(-1, 1, observation.shape, np.float32)
    rows, length = batch.reward.shape
    config = (
        DreamerV3Config()
        .learners(num_learners=0)
        .training(batch_size_B=rows, batch_length_T=length, horizon_H=horizon)
    )
    learner = config.build_learner(spaces={DEFAULT_MODULE_ID: (observation, action)})
    sample = SampleBatch(
        obs=obs,
        actions=batch.action,
        rewards=batch.reward,
        is_first=batch.is_first,
        is_last=batch.is_last,
        is_terminated=batch.is_terminal,
        is_truncated=batch.is_last & ~batch.is_terminal,
    ).as_multi_agent()
    module = cast(torch.nn.Module, learner.module[DEFAULT_MODULE_ID])
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)  # not the slow critic
    return lambda: learner.update(batch=sample), trained


def _set_widths(widths: dict[str, int]) -> None:
    """RLlib knows its sizes by letter only, from functions that each of its modules imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ray.rllib.algorithms.dreamerv3"):
            for function, width in widths.items():
                if hasattr(module, function):
                    setattr(module, function, _constant(width))


def _constant(width: int) -> Callable[..., int]:
    return lambda model_size, override=None: width if override is None else override
