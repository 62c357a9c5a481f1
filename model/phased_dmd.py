"""Phased DMD (arXiv:2510.27684): DMD for two experts, each judged where its part of a sample ends.

The high expert maps noise to x_s, a sample at the noise level s of the low expert's first step, and
is compared with the teacher's distribution there; the low one maps x_s to x0 under DMD as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import Needs
from model.dmd import DMD
from model.experts import SIDES, WHOLE, ExpertLevels, Part, asking
from model.flow import expand, shift, unshift, velocity_to_x0
from model.matching import DistributionMatchingConfig, NoisedSample, Scores
from model.options.ida import IDA, IDAConfig
from model.options.projection import Projection, ProjectionConfig
from model.types import Batch, Sample, Side, Walk
from utils.seeding import StepRNG


@dataclass(frozen=True)
class PhasedDMDConfig(ProjectionConfig, IDAConfig, DistributionMatchingConfig):
    """Which expert learns, how samples are walked to, and at which levels they are judged."""

    timestep_shift: float = 7.0  # of the noise levels at which samples are scored
    max_sigma: float = 0.997
    # Whose part is learnt: the high expert's alone; the low one's, behind a high student that stays
    # as it is; or both, a step of either at random.
    phase: Literal["high", "low", "both"] = "high"
    # From step to step, in training and after it: along the velocity, with no fresh noise; or by
    # noising what is predicted once more.
    walk: Walk = "euler"
    # euler: how far above the low expert's first level the high one is judged at least, in uniform
    # levels before they are shifted; nearer, the critic's target is mostly noise.
    margin: float = 0.02
    # The critic's squared error is divided by the square of how much of its target is noise, where
    # that is more than 1; false = as it is.
    bounded_target: bool = True
    # low: share of samples that are judged at the high expert's levels, by its teacher and a critic
    # of samples there; the others at the low one's.
    above: float = 0.5

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        if not 0.0 < self.margin < 1.0:
            yield f"loss.margin: must lie in (0, 1), got {self.margin}"
        if not 0.0 <= self.above < 1.0:
            yield f"loss.above: must lie in [0, 1), got {self.above}"

    def run_problems(self, *, steps: int, causal: bool) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().run_problems(steps=steps, causal=causal)
        if causal:
            yield "generator_type: phased_dmd is for models of two experts, which are bidirectional"

    def expert_problems(
        self, experts: ExpertLevels | None, sides: Mapping[str, tuple[Side, ...]]
    ) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().expert_problems(experts, sides)
        if experts is None:
            yield (
                "distribution_loss: phased_dmd is for teachers of two experts, as Wan2.2-T2V-A14B; "
                "use dmd"
            )
            return
        for role, wanted in self.wanted.items():
            lacking = [side for side in wanted if side not in sides[role]]
            if lacking and (role != "critic" or sides[role] or len(wanted) > 1):
                yield (
                    f"{role}.experts: loss.phase={self.phase} needs the {' and '.join(lacking)} "
                    f"expert of the {role}; leave {role}.experts out, or name it"
                )

    @property
    def wanted(self) -> dict[str, tuple[Side, ...]]:
        """The experts that each role must have."""
        if self.phase == "high":
            return dict.fromkeys(("generator", "critic", "teacher"), ("high",))
        judges: tuple[Side, ...] = SIDES if self.phase == "both" or self.above else ("low",)
        return {"generator": SIDES, "critic": judges, "teacher": judges}


class PhasedDMD(DMD):
    """DMD whose samples may end at a noise level s: both scores are compared at levels above it.

    The gradient in x_s is that in x0 but for a factor, so the loss is DMD's own on x0 as the
    student predicts it; its size follows the teacher's error as ever.
    """

    config_class = PhasedDMDConfig  # type: ignore[assignment]
    takes = (Projection, IDA)  # type: ignore[assignment]
    config: PhasedDMDConfig  # type: ignore[assignment]

    @classmethod
    def needs(cls, config: PhasedDMDConfig) -> Needs:  # type: ignore[override]
        """As DMD, on samples of one expert's part."""
        moved = config.wanted
        if config.phase == "low":
            moved["generator"] = ("low",)
        return replace(
            super().needs(config),
            rollout="phased",
            rollout_options={"phase": config.phase, "walk": config.walk},
            trained_sides={role: moved[role] for role in ("generator", "critic")},
        )

    def draw_part(self, sample: Sample, rng: StepRNG) -> Part:
        """Above the level at which a sample ends; of clean ones, either expert's levels."""
        experts, config = self.parts.experts, self.config
        if experts is None:
            return WHOLE
        if sample.level == 0.0:
            above = 0.0 if config.phase == "both" else config.above
            high = float(torch.rand((), generator=rng.shared)) < above
            return experts.part("high" if high else "low")
        factor, high_part = config.timestep_shift, experts.part("high")
        margin = 0.0 if sample.anchor is None else config.margin
        least = max(unshift(sample.level, factor) + margin, unshift(high_part.low, factor))
        return replace(high_part, low=shift(least, factor), high=config.max_sigma)

    def noised(self, sample: Sample, rng: StepRNG) -> NoisedSample:
        """A sample at a random noise level above its own."""
        if sample.anchor is None:
            return super().noised(sample, rng)
        anchor, part = sample.anchor, self.draw_part(sample, rng)
        sigma = self.config.draw_sigma(rng.samples, anchor, part)
        noise = rng.samples.randn(anchor.shape[1:])
        x = noise_further(anchor, noise, sigma, sample.level)
        return NoisedSample(anchor, x, sigma, noise, side=part.side, level=sample.level)

    def critic_target(self, sample: Sample, scores: Scores) -> Tensor:
        """Of a sample that ends at s, what `further_velocity` means as an x0."""
        if sample.anchor is None:
            return super().critic_target(sample, scores)
        velocity, _ = further_velocity(sample.anchor, scores.noise, scores.sigma, sample.level)
        return velocity_to_x0(scores.x, velocity, scores.sigma)

    def denoising_loss(self, fake: NoisedSample, batch: Batch) -> Tensor:
        """Mean squared error of the critic's velocity, of samples noised from s as well."""
        if fake.level == 0.0:
            return super().denoising_loss(fake, batch)
        target, share = further_velocity(fake.x0, fake.noise, fake.sigma, fake.level)
        weight = share.clamp(min=1.0).square().reciprocal() if self.config.bounded_target else 1.0
        context = asking(fake.side)
        velocity = self.critic(fake.x, fake.sigma, batch.conditioning, context=context).velocity
        return (weight * F.mse_loss(velocity, target, reduction="none")).mean()


def noise_further(anchor: Tensor, noise: Tensor, sigma: Tensor, level: float) -> Tensor:
    """x_s at noise level s moved to `sigma` > s: a x_s + b noise. Returns [B, C, F, H, W], fp32.

    a = (1 - sigma) / (1 - s) and b^2 = sigma^2 - a^2 s^2, so that a sample of the teacher at s
    becomes one at `sigma`. sigma: [B, 1].
    """
    a, b = _kernel(sigma, level)
    return a * anchor.float() + b * noise.float()


def further_velocity(
    anchor: Tensor, noise: Tensor, sigma: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """What a critic of x_s regresses at `sigma` [B, 1], and the share of noise in it [B, 1, ...].

    -x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) noise / b. Its mean, given where it was noised
    to, is the velocity of the distribution there: the score of the kernel, -noise / b, is unbiased.
    """
    t = expand(sigma)
    _, b = _kernel(sigma, level)
    share = (t + (1.0 - t) * (level / (1.0 - level)) ** 2) / b
    return share * noise.float() - anchor.float() / (1.0 - level), share


def _kernel(sigma: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """a and b of `noise_further`; b from factors that lose nothing near s."""
    t = expand(sigma)
    a = (1.0 - t) / (1.0 - level)
    return a, ((t - level) / (1.0 - level) * (t + a * level)).sqrt()
