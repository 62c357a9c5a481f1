"""What every method shares: the roles it trains, and the template of distribution matching."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flow import add_noise, shift, velocity_to_x0
from model.guidance import guided_velocity
from model.types import Batch, Denoiser, LossOutput, Rollout, Sample
from utils.seeding import SampleRNG, StepRNG


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a method; each method's own class adds to it."""

    def problems(self) -> Iterator[str]:
        """What is impossible about these settings, one line each, keys with their section."""
        yield from ()


class Method(ABC):
    """A training objective over named roles."""

    roles: ClassVar[tuple[str, ...]] = ("generator",)  # the networks that it needs
    trainable: ClassVar[tuple[str, ...]] = ("generator",)  # those whose weights move
    needs_latents: ClassVar[bool] = False  # whether batches must carry real latents
    config_class: ClassVar[type[MethodConfig]]

    @abstractmethod
    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """The loss whose gradient moves the generator."""


@dataclass(frozen=True)
class DistributionMatchingConfig(MethodConfig):
    """What score distillation methods have in common."""

    cfg_scale: float = 6.0  # of the teacher's score; uncond + cfg_scale (cond - uncond), 1 = off
    timestep_shift: float = 5.0  # of the noise levels at which scores are compared
    min_sigma: float = 0.02
    max_sigma: float = 0.98
    generator_every: int = 5  # outer steps per generator update; the critic moves at each

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        if self.generator_every < 1:
            yield f"loss.generator_every: must be at least 1, got {self.generator_every}"
        if not self.timestep_shift > 0:
            yield f"loss.timestep_shift: must be positive, got {self.timestep_shift}"
        if not 0.0 < self.min_sigma <= self.max_sigma <= 1.0:
            yield (
                f"loss.min_sigma and loss.max_sigma: must satisfy 0 < min <= max <= 1, "
                f"got {self.min_sigma} and {self.max_sigma}"
            )
        if not math.isfinite(self.cfg_scale):
            yield f"loss.cfg_scale: must be finite, got {self.cfg_scale}"


class DistributionMatching(Method):
    """Pull the generator's distribution to the teacher's; the critic tracks the generator's own."""

    roles = ("generator", "critic", "teacher")
    trainable = ("generator", "critic")

    def __init__(
        self,
        config: DistributionMatchingConfig,
        networks: Mapping[str, Denoiser],
        rollout: Rollout,
    ) -> None:
        self.config = config
        self.generator = networks["generator"]
        self.critic = networks["critic"]
        self.teacher = networks["teacher"]
        self.rollout = rollout

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Compare teacher and critic on the generator's samples, noised; DMD sec. 3."""
        sample = self.rollout(self.generator, batch, rng, grad=True)
        with torch.no_grad():
            sigma = self.draw_sigma(rng.samples, sample.x0)
            x = add_noise(sample.x0, rng.samples.randn(sample.x0.shape[1:]), sigma)
            x0_critic = self.critic(x, sigma, batch.conditioning).x0
            velocity = guided_velocity(
                self.teacher,
                x,
                sigma,
                batch.conditioning,
                batch.unconditional,
                cfg_scale=self.config.cfg_scale,
            )
            x0_teacher = velocity_to_x0(x, velocity, sigma)
        return self.objective(sample, x0_teacher, x0_critic)

    def critic_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Flow matching on the generator's samples: the critic learns their score."""
        with torch.no_grad():
            x0 = self.rollout(self.generator, batch, rng, grad=False).x0
            sigma = self.draw_sigma(rng.samples, x0)
            noise = rng.samples.randn(x0.shape[1:])
        velocity = self.critic(add_noise(x0, noise, sigma), sigma, batch.conditioning).velocity
        return LossOutput(F.mse_loss(velocity, noise - x0))

    def draw_sigma(self, rng: SampleRNG, like: Tensor) -> Tensor:
        """Shifted uniform noise levels [B, 1], one per sample, on the device of `like`."""
        sigma = shift(rng.rand((1,)).to(like.device), self.config.timestep_shift)
        return sigma.clamp(self.config.min_sigma, self.config.max_sigma)

    @abstractmethod
    def objective(self, sample: Sample, x0_teacher: Tensor, x0_critic: Tensor) -> LossOutput:
        """The method's loss, given both scores as x0 predictions [B, C, F, H, W]."""
