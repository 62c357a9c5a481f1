"""Many-step sampling of a teacher with guidance, on the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.flow import TIMESTEPS, constant_sigma
from model.guidance import guided_velocity
from model.types import Conditioning, Denoiser
from utils.seeding import SampleRNG


@dataclass(frozen=True)
class SamplingConfig:
    """How a many-step model is sampled."""

    steps: int = 50
    cfg_scale: float = 5.0  # uncond + cfg_scale (cond - uncond), 1 = off
    timestep_shift: float = 5.0
    solver: Literal["euler", "unipc"] = "unipc"  # first order, or second (arXiv:2302.04867)


class TeacherInferencePipeline:
    """Integrates the probability-flow ODE from noise to data."""

    def __init__(self, net: Denoiser, config: SamplingConfig) -> None:
        self.net = net
        self.config = config

    @property
    def steps(self) -> int:
        """How many noise levels are visited."""
        return self.config.steps

    @property
    def network_evaluations(self) -> int:
        """How often the network runs per sample; guidance counts twice."""
        return self.config.steps * (1 if self.config.cfg_scale == 1.0 else 2)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        latent_shape: Sequence[int],
        rng: SampleRNG,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, F, H, W], fp32; latent_shape: [C, F, H, W]."""
        scheduler = build_scheduler(self.config)
        x = rng.randn(latent_shape)
        for step, timestep in enumerate(scheduler.timesteps):
            # UniPC rounds its timesteps to integers; the noise level itself is exact.
            sigma = constant_sigma(float(scheduler.sigmas[step]), x)
            velocity = guided_velocity(
                self.net, x, sigma, conditioning, unconditional, cfg_scale=self.config.cfg_scale
            )
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
            if on_step is not None:
                on_step(step + 1, self.config.steps)
        return x


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
