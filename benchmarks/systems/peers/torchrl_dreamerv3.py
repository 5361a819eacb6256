"""TorchRL's DreamerV3 learner, put together from its public modules and losses.

Its image networks have strides where the reference pools and repeats, so they do a fraction of the
work; recurrence, heads, losses and optimizer are the reference's of 2025.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Composite, OneHot, Unbounded
from torchrl.envs.model_based.dreamer import DreamerEnv
from torchrl.modules import (
    DreamerV3DiscreteActor,
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    SymExpTwoHot,
    WorldModelWrapper,
)
from torchrl.objectives import (
    DreamerV3ActorLoss,
    DreamerV3Loss,
    DreamerV3ModelLoss,
    DreamerV3ValueLoss,
    SoftUpdate,
    symexp,
    symlog,
)
from torchrl.objectives.utils import ValueEstimators
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

from peers.work import BINS, CATEGORICALS, HORIZON, Made, Work, noise

MULTIPLIERS, UNIMIX = (2, 3, 4, 4), 0.01


class Nets(NamedTuple):
    """The networks that imagination shares with the world model, and the world model itself."""

    world_model: Any
    prior: Any
    reward: Any
    continues: Any


def make(work: Work, compiled: bool = False) -> Made:
    """One float32 update, with every loss of the reference; `compiled` has TorchRL compile it."""
    torch.set_num_threads(work.threads)
    torch.set_default_device(work.device)
    gpu = work.device != "cpu"
    loss, targets = losses(work)
    parameters = list(
        {
            id(p): p
            for part in (loss.model_loss, loss.actor_loss.actor_model, loss.value_loss)
            for p in part.parameters()
            if p.requires_grad
        }.values()
    )
    stepper = DreamerV3OptimizationStepper(
        loss, DreamerV3Optimizer(parameters), targets, compile_train_step=compiled, cudagraph=gpu
    )
    sample = batch(work).to(work.device)
    if compiled:
        stepper.warmup(sample.clone())
    count = sum(p.numel() for p in parameters)

    def update() -> None:
        stepper.step(None, sample.clone())
        if gpu:
            torch.cuda.synchronize()

    return Made({"update": update}, count, version("torchrl"))


def mlp(work: Work, inputs: int, outputs: int | None, depth: int, scale: float = 1.0) -> Any:
    """One of its networks, at our width."""
    return DreamerV3MLP(inputs, outputs, depth=depth, num_cells=work.widths.units, outscale=scale)


def features(work: Work) -> int:
    """The size of deterministic and stochastic state together."""
    return work.widths.deter + CATEGORICALS * work.widths.classes


def chain(*parts: tuple[Any, str, str], after: bool = True) -> Any:
    """Modules by names of what they read (state and belief where it is empty) and write, of the
    next step or, for imagination, of the present one."""

    def key(name: str) -> Any:
        return ("next", name) if after else name

    return TensorDictSequential(
        *(
            TensorDictModule(
                module, [key(name) for name in (read.split() or ["state", "belief"])], [key(write)]
            )
            for module, read, write in parts
        )
    )


def networks(work: Work) -> Nets:
    """The world model: encoder, recurrence, decoder, reward and continue heads."""
    task, widths, size = work.what, work.widths, features(work)
    shared = {"num_categoricals": CATEGORICALS, "num_classes": widths.classes, "unimix": UNIMIX}
    if task.is_image:
        shape = (task.obs_shape[2], *task.obs_shape[:2])
        conv = {"depth": widths.depth, "mults": MULTIPLIERS, "kernel_size": 5}
        eyes = DreamerV3ImageEncoder(in_channels=shape[0], **conv)
        embedded = eyes.output_features(shape)
        encoder = chain((eyes, "observation", "encoded_latents"))
        picture = DreamerV3ImageDecoder(in_features=size, image_shape=shape, **conv)
        decoder = chain((picture, "", "reco_pixels"))
    else:
        embedded, (numbers,) = widths.units, task.obs_shape
        encoder = chain(
            (symlog, "observation", "symlog"),
            (mlp(work, numbers, None, 3), "symlog", "encoded_latents"),
        )
        decoder = chain(
            (mlp(work, size, numbers, 3), "", "reco_symlog"), (symexp, "reco_symlog", "reco_pixels")
        )
    prior = RSSMPriorV3(
        action_shape=(task.num_actions,),
        action_dim=task.num_actions,
        hidden_dim=widths.hidden,
        rnn_hidden_dim=widths.deter,
        recurrent_model="block_gru",
        **shared,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=widths.hidden,
        rnn_hidden_dim=widths.deter,
        obs_embed_dim=embedded,
        use_rms_norm=True,
        **shared,
    )
    recurrence = RSSMRolloutV3(
        TensorDictModule(
            prior,
            ["state", "belief", "action"],
            [("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            posterior,
            [("next", "belief"), ("next", "encoded_latents")],
            [("next", "posterior_logits"), ("next", "state")],
        ),
    )
    reward, continues = mlp(work, size, BINS, 1, 0.0), mlp(work, size, 1, 1)
    heads = chain(
        (reward, "", "reward_logits"),
        (SymExpTwoHot(BINS), "reward_logits", "reward"),
        (continues, "", "continue_pred"),
    )
    return Nets(TensorDictSequential(encoder, recurrence, decoder, heads), prior, reward, continues)


def imagination(work: Work, nets: Nets) -> Any:
    """The environment that the actor is trained in."""
    step = TensorDictModule(nets.prior, ["state", "belief", "action"], ["_", "state", "belief"])
    reward = chain(
        (nets.reward, "", "reward_logits"),
        (SymExpTwoHot(BINS), "reward_logits", "reward"),
        after=False,
    )
    stoch, deter = CATEGORICALS * work.widths.classes, work.widths.deter
    env = DreamerEnv(
        WorldModelWrapper(TensorDictSequential(step), reward),
        prior_shape=(stoch,),
        belief_shape=(deter,),
    )
    env.observation_spec = Composite(state=Unbounded(stoch), belief=Unbounded(deter))
    env.state_spec = env.observation_spec.clone()
    env.action_spec = OneHot(work.what.num_actions)
    env.reward_spec = Unbounded((1,))
    return env


def losses(work: Work) -> tuple[Any, Any]:
    """All losses as one module, and what moves the slow critic."""
    nets, size = networks(work), features(work)
    model_loss = DreamerV3ModelLoss(
        nets.world_model,
        kl_mode="separate",
        unimix=UNIMIX,
        lambda_continue=1.0,
        continue_target_scale=1 - 1 / 333,
        reco_symlog=not work.what.is_image,
        detach_output=False,
    )
    model_loss.set_keys(pixels="observation")
    value = chain(
        (mlp(work, size, BINS, 3, 0.0), "", "state_value_logits"),
        (SymExpTwoHot(BINS), "state_value_logits", "state_value"),
        after=False,
    )
    continuation = chain(
        (nets.continues, "", "continue_logits"),
        (torch.nn.Sigmoid(), "continue_logits", "continuation"),
        after=False,
    )
    actor = DreamerV3DiscreteActor(size, work.what.num_actions, num_cells=work.widths.units)
    actor_loss = DreamerV3ActorLoss(
        actor,
        value,
        imagination(work, nets),
        continuation_model=continuation,
        imagination_horizon=HORIZON,
        use_reinforce=True,
    )
    actor_loss.make_value_estimator(ValueEstimators.TDLambda, gamma=1.0, lmbda=0.95)
    value_loss = DreamerV3ValueLoss(
        value, value_loss="two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    whole = DreamerV3Loss(model_loss, actor_loss, value_loss)
    return whole, SoftUpdate(value_loss, tau=0.02)


def batch(work: Work) -> Any:
    """The batch of noise as its replay gives it."""
    arrays = {key: torch.from_numpy(value) for key, value in noise(work.what).items()}
    shape = arrays["reward"].shape
    obs = arrays["obs"].movedim(-1, -3) if work.what.is_image else arrays["obs"]
    return TensorDict(
        {
            "state": torch.zeros(*shape, CATEGORICALS * work.widths.classes),
            "belief": torch.zeros(*shape, work.widths.deter),
            "action": arrays["action"],
            "is_init": arrays["is_first"][..., None],
            "next": {
                "observation": obs.contiguous(),
                "reward": arrays["reward"][..., None],
                "done": arrays["is_last"][..., None],
                "terminated": arrays["is_terminal"][..., None],
            },
        },
        shape,
    )
