"""Many-step sampling of a teacher with guidance, on the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from model.flow import TIMESTEPS, constant_sigma
from model.given import begin_with, on_given
from model.guidance import guided_velocity
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser
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


def adjusted(config: SamplingConfig, steps: int | None, cfg_scale: float | None) -> SamplingConfig:
    """Other settings; None = as they are."""
    return replace(
        config,
        steps=config.steps if steps is None else steps,
        cfg_scale=config.cfg_scale if cfg_scale is None else cfg_scale,
    )


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
        return self.steps(frames) * evaluations_per_step(self.config)

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
            cfg_scale=config.cfg_scale,
            context=replace(context, level=level),
        )
        # Solvers leave what does not move where it is, but for their rounding.
        x = begin_with(given, scheduler.step(velocity, timestep, x, return_dict=False)[0])
        if on_step is not None:
            on_step(step + 1, config.steps)
        yield x


def evaluations_per_step(config: SamplingConfig) -> int:
    """Network evaluations of one step; guidance counts twice."""
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
