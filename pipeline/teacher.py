"""Many-step sampling of a teacher with guidance, on the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from model.experts import side_of
from model.flow import TIMESTEPS, constant_sigma
from model.given import begin_with, on_given
from model.guidance import guided_velocity
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Side
from pipeline.few_step import OnStep, remembering
from pipeline.protocol import refuse_filling
from utils.seeding import SampleRNG


@dataclass(frozen=True)
class SamplingConfig:
    """How a many-step model is sampled."""

    steps: int = 50
    cfg_scale: float = 5.0  # uncond + cfg_scale (cond - uncond), 1 = off
    timestep_shift: float = 5.0
    solver: Literal["euler", "unipc"] = "unipc"  # first order, or second (arXiv:2302.04867)
    # Of models of two experts, where cfg_scale is the high one's: that of the low one; None = the
    # same.
    cfg_scale_low: float | None = None
    # The noise level from which on the high expert is asked; None = the model's, or of a model of
    # few steps the middle between the two of them around it.
    boundary: float | None = None

    def side(self, level: float) -> Side | None:
        """The expert that is asked at a noise level; None = that of the network itself."""
        return None if self.boundary is None else side_of(level, self.boundary)

    def scale(self, level: float) -> float:
        """Guidance at a noise level."""
        if self.cfg_scale_low is None:
            return self.cfg_scale
        assert self.boundary is not None, "the guidance of two experts changes at a boundary"
        return self.cfg_scale if self.side(level) == "high" else self.cfg_scale_low


def adjusted(config: SamplingConfig, steps: int | None, cfg_scale: float | None) -> SamplingConfig:
    """Other settings; None = as they are. A scale is for both experts."""
    config = config if steps is None else replace(config, steps=steps)
    if cfg_scale is None:
        return config
    return replace(config, cfg_scale=cfg_scale, cfg_scale_low=None)


class TeacherInferencePipeline:
    """Integrates the probability-flow ODE from noise to data."""

    def __init__(self, net: Denoiser, config: SamplingConfig) -> None:
        self.net = net
        self.config = config

    def adjusted(
        self, *, steps: int | None = None, cfg_scale: float | None = None
    ) -> TeacherInferencePipeline:
        """See pipeline.protocol.InferencePipeline."""
        return TeacherInferencePipeline(self.net, adjusted(self.config, steps, cfg_scale))

    def steps(self, frames: int) -> int:
        """See pipeline.protocol.InferencePipeline."""
        del frames
        return self.config.steps

    def network_evaluations(self, frames: int) -> int:
        """One per step, two where it is guided."""
        del frames
        if self.config.cfg_scale_low is None:
            return self.config.steps * evaluations_per_step(self.config)
        levels = build_scheduler(self.config).sigmas[: self.config.steps].tolist()
        return sum(1 if self.config.scale(level) == 1.0 else 2 for level in levels)

    def stream(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        latent_shape: Sequence[int],
        rng: SampleRNG,
        *,
        initial: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Tensor]:
        """The whole clip at once, fp32."""
        refuse_filling(initial, latent_shape)
        yield integrate(
            self.net,
            rng.randn(latent_shape),
            conditioning,
            unconditional,
            self.config,
            given=initial,
            on_step=on_step,
        )


def integrate(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    config: SamplingConfig,
    *,
    given: Tensor | None = None,
    context: Context = FULL_ATTENTION,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow the guided ODE from noise [B, C, F, H, W] to clean latents, fp32."""
    states = trajectory(
        net,
        noise,
        conditioning,
        unconditional,
        config,
        given=given,
        context=context,
        on_step=on_step,
    )
    *_, last = states
    return last


@torch.no_grad()
def trajectory(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    config: SamplingConfig,
    *,
    given: Tensor | None = None,
    context: Context = FULL_ATTENTION,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """All states of the guided ODE [B, C, F, H, W], the noise first and clean latents last.

    given: [B, C, g, H, W], frames that all states begin with, clean.
    """
    scheduler, net = build_scheduler(config), on_given(net, given)
    x, context = begin_with(given, noise), remembering(context)
    yield x
    for step, timestep in enumerate(scheduler.timesteps):
        # UniPC rounds its timesteps to integers; the noise level itself is exact.
        level = float(scheduler.sigmas[step])
        velocity = guided_velocity(
            net,
            x,
            constant_sigma(level, x),
            conditioning,
            unconditional,
            cfg_scale=config.scale(level),
            context=replace(context, level=level, side=config.side(level)),
        )
        # Solvers leave what does not move where it is, but for their rounding.
        x = begin_with(given, scheduler.step(velocity, timestep, x, return_dict=False)[0])
        if on_step is not None:
            on_step(step + 1, config.steps)
        yield x


def evaluations_per_step(config: SamplingConfig) -> int:
    """Network evaluations of one step of one network; guidance counts twice."""
    return 1 if config.cfg_scale == 1.0 else 2


def build_scheduler(config: SamplingConfig) -> Any:
    """diffusers' scheduler for `config`, its noise levels set."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # slow

    train_steps = int(TIMESTEPS)
    if config.solver == "euler":
        euler = FlowMatchEulerDiscreteScheduler(train_steps, shift=config.timestep_shift)
        levels = torch.linspace(1.0, 0.0, config.steps + 1)[:-1]
        euler.set_timesteps(sigmas=levels.tolist())
        return euler
    unipc = UniPCMultistepScheduler(
        train_steps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.timestep_shift,
    )
    unipc.set_timesteps(config.steps)
    return unipc
