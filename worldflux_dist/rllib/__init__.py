"""RLlib's side: world models as an RLlib algorithm, configured, run and tuned as any other.

    from worldflux_dist.rllib import WorldFluxConfig
    algo = WorldFluxConfig(model="dreamerv3:size12m").environment("CartPole-v1").build_algo()

RLlib makes environments' processes, learners, evaluation, callbacks and checkpoints; replay,
imagination, the agents and the flow between them are those of the rest of this package. Importing
this registers "WorldFlux" with Tune. Nothing else in the package imports RLlib.
"""

from __future__ import annotations

from ray import tune

from worldflux_dist.rllib.algorithm import WorldFlux
from worldflux_dist.rllib.config import WorldFluxConfig
from worldflux_dist.rllib.env_runner import WorldFluxEnvRunner
from worldflux_dist.rllib.learner import WorldFluxLearner
from worldflux_dist.rllib.module import WorldFluxModule

__all__ = [
    "WorldFlux",
    "WorldFluxConfig",
    "WorldFluxEnvRunner",
    "WorldFluxLearner",
    "WorldFluxModule",
]

tune.register_trainable("WorldFlux", WorldFlux)
