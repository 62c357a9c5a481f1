"""The plain version of what is timed: equal weights, equal noise, the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.dmd import DMD, DMDConfig
from model.types import Batch
from model.wan.config import WanConfig
from scripts.benchmarking import plain
from trainer.base import Trainer
from trainer.config import Config, sigmas
from trainer.networks import TrainedNetworkConfig
from trainer.phases import Phase
from trainer.run import Run
from utils.seeding import step_rng


def plain_network(
    network: nn.Module, compute: torch.dtype, *, recompute: bool
) -> plain.Transformer:
    """The plain transformer with the weights of ours, in its dtype and on its device."""
    model = network.get_submodule("model")
    weights = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    some = next(iter(weights.values()))
    sizes = getattr(model, "config")  # noqa: B009
    with torch.device("meta"):
        built = plain.Transformer(sizes, compute, recompute=recompute)
    built = built.to_empty(device=some.device).to(some.dtype)
    built.load_state_dict(weights)
    return built


def whole(value: Tensor) -> Tensor:
    """A weight without its layout: on one rank FSDP2 still wraps what it casts."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def plain_blocks(run: Run) -> list[int] | None:
    """Frames of each block of a causal generator."""
    return None if run.causal is None else run.causal.blocks(run.latent_shape[1])


def unlike(run: Run, ranks: int) -> str | None:
    """Why the plain version does not compute what `run` trains; None = it does."""
    config, causal = run.config, run.causal
    loss = config.loss
    plain_dmd = isinstance(loss, DMDConfig) and not (
        loss.reuse_rollout or any(option.asked(loss) for option in DMD.takes)
    )
    reasons = {
        "it is one process": ranks > 1,
        "it knows DMD alone, without options": not plain_dmd,
        "it reads no images": run.begins_with_given,
        "it takes one micro-batch": config.accumulation > 1,
        "its teacher is not rounded to 8 bits": config.teacher.storage is not None,
        "its learning rates are constant": any(not _constant(o) for o in trained(config).values()),
        "its causal rollout has no options": causal is not None
        and (
            causal.local_attn_size is not None
            or causal.context_noise > 0
            or causal.remember != "clean"
            or causal.kv_gradient != "detach"
            or not causal.same_step_across_blocks
            or causal.last_step_only
            or causal.gradient_frames is not None
            or causal.rollout_frames is not None
            or config.first_block_step_list is not None
        ),
        "its average moves from the start": config.ema.start_step > 0,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def trained(config: Config) -> Mapping[str, TrainedNetworkConfig]:
    """The settings of both trained roles."""
    return {"generator": config.generator, "critic": config.critic}


def _constant(moves: TrainedNetworkConfig) -> bool:
    """Whether the first updates are at the full rate; what is timed ends before a decay begins."""
    return moves.warmup_updates == 0 and (moves.schedule == "constant" or moves.decay_from >= 0.5)


def recipe(run: Run) -> plain.Recipe:
    """A run's settings, as the plain version takes them."""
    config, loss = run.config, run.config.loss
    assert isinstance(loss, DMDConfig), "`unlike` has looked"
    return plain.Recipe(
        shape=run.latent_shape,
        sigmas=sigmas(config),
        blocks=plain_blocks(run),
        cfg_scale=loss.cfg_scale,
        timestep_shift=loss.timestep_shift,
        min_sigma=loss.min_sigma,
        max_sigma=loss.max_sigma,
        ema_decay=config.ema.decay,
        moves={
            role: plain.Moves(
                lr=moves.lr,
                betas=(moves.betas[0], moves.betas[1]),
                weight_decay=moves.weight_decay,
                max_norm=moves.max_grad_norm,
                muon_lr=moves.muon_lr,
                muon_momentum=moves.muon_momentum,
                muon_weight_decay=moves.muon_weight_decay,
            )
            for role, moves in trained(config).items()
        },
    )


class PlainTraining:
    """Steps of the plain version, beside a trainer whose weights it began with."""

    def __init__(self, trainer: Trainer) -> None:
        run = trainer.parts.run
        self.config = run.config
        self.step_number, self.draws = trainer.state.step, trainer.state.draws
        recompute = run.config.parallel.activation_checkpoint != "none"
        networks = {
            role: plain_network(network, run.compute, recompute=recompute)
            for role, network in trainer.method.parts.networks.items()
        }
        networks["teacher"].requires_grad_(False)
        self.plain = plain.Distillation(networks, recipe(run))

    def step(self, phases: Sequence[Phase], batches: Sequence[Batch]) -> list[Tensor]:
        """One outer step on the encoded prompts of ours, with its noise; each phase's loss."""
        losses = []
        for phase, batch in zip(phases, batches, strict=True):
            text, negative = batch.conditioning.text, batch.unconditional.text
            rng = step_rng(
                self.config.seed,
                phase.name,
                step=self.step_number,
                first=self.draws,
                indices=range(self.config.batch_size),
                device=text.device,
            )
            if phase.name == "generator":
                loss = self.plain.generator_loss(text, negative, rng)
            else:
                loss = self.plain.critic_loss(text, rng)
            losses.append(self.plain.move(phase.name, loss))
            self.draws += self.config.batch_size
        self.step_number += 1
        return losses


def sizes_of(network: nn.Module) -> WanConfig | None:
    """The sizes of a Wan transformer behind its wrapper; None = it is another network."""
    sizes = getattr(getattr(network, "model", None), "config", None)
    return sizes if isinstance(sizes, WanConfig) else None
