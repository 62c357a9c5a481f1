"""Distribution matching: what its methods share, and how options add to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import AlternatingConfig, Method, Needs, Parts, teacher_problems
from model.experts import (
    Part,
    asking,
    draw_part,
    scale_of,
)
from model.flow import add_noise, velocity_to_x0
from model.given import count_given, learnt, on_given
from model.guidance import guided_velocity
from model.types import Batch, LossOutput, Sample, Side, Walk
from utils.seeding import StepRNG

MIN_SIZE = 1e-6  # a sample that the teacher leaves exactly as it is would divide by zero


@dataclass(frozen=True)
class DistributionMatchingConfig(AlternatingConfig):
    """What score distillation methods have in common."""

    cfg_scale: float = 6.0  # of the teacher's score; uncond + cfg_scale (cond - uncond), 1 = off
    batched_guidance: bool = True  # both passes in one batch; false: one by one, for less memory
    # Of a teacher of two experts, where cfg_scale is the high one's: that of the low one; None =
    # the same.
    cfg_scale_low: float | None = None
    boundary: float | None = (
        None  # the noise level from which on it is the high one; None = its own
    )
    # From step to step, in training and after it: by fresh noise on what is predicted, or along the
    # velocity (Euler's method), so that a clip is fixed by its first noise.
    walk: Walk = "renoise"

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        yield from teacher_problems(self.cfg_scale, self.cfg_scale_low, self.boundary)

    def run_problems(self, *, steps: int, causal: bool) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().run_problems(steps=steps, causal=causal)
        if causal and self.walk == "euler":
            yield (
                "loss.walk: 'euler' is for generator_type: bidirectional; a causal generator's "
                "blocks go from step to step by fresh noise (renoise)"
            )

    def scale(self, side: Side | None) -> float:
        """Guidance of the teacher's expert of that side."""
        return scale_of(side, self.cfg_scale, self.cfg_scale_low)


@dataclass(frozen=True, eq=False)
class Scores:
    """Teacher and critic on noised samples."""

    x: Tensor  # [B, C, F, H, W] the samples at noise level sigma
    sigma: Tensor  # [B, 1]
    noise: Tensor  # [B, C, F, H, W]
    x0_teacher: Tensor  # [B, C, F, H, W]
    x0_critic: Tensor  # [B, C, F, H, W]


@dataclass(frozen=True, eq=False)
class NoisedSample:
    """A sample without gradient, clean and at a noise level."""

    x0: Tensor  # [B, C, F, H, W]; or what it is at `level`
    x: Tensor  # [B, C, F, H, W]
    sigma: Tensor  # [B, 1]
    noise: Tensor  # [B, C, F, H, W]
    given: Tensor | None = None  # [B, C, g, H, W], see Parts.clean_frames
    side: Side | None = None  # the expert of its levels; None = one network has them all
    level: float = 0.0  # the noise level that it was noised from


@dataclass(frozen=True, eq=False)
class Comparison:
    """One generator loss as its options see it."""

    batch: Batch
    rng: StepRNG
    sample: Sample  # carries the generator's gradient
    scores: Scores  # of all frames, as `sample`
    target: Tensor  # [B, C, F, H, W] the x0 that the critic was to say of `scores.x`


Adjust = Callable[[Tensor], Tensor]  # of the loss's gradient in x0, [B, C, F, H, W]


@dataclass(frozen=True, eq=False)
class Effect:
    """What an option does to one generator loss."""

    adjust: Adjust | None = None
    term: LossOutput | None = None  # added to the loss


class Option(ABC):
    """An addition to distribution matching, with settings in the method's own `loss` section.

    A subclass overrides what it changes; a method names the options that it takes.
    """

    def __init__(self, config: Any, parts: Parts) -> None:
        self.config = config
        self.parts = parts

    @classmethod
    @abstractmethod
    def asked(cls, config: Any) -> bool:
        """Whether these settings turn it on."""

    @classmethod
    def needs(cls, config: Any, needs: Needs) -> Needs:
        """`needs`, and what the option must be given beside them."""
        del config
        return needs

    def on_generator(self, at: Comparison) -> Effect:
        """Its part in the generator's loss."""
        del at
        return Effect()

    def on_critic(self, fake: NoisedSample, batch: Batch, rng: StepRNG) -> Iterator[LossOutput]:
        """Terms that are added to the critic's loss, one after the other."""
        del fake, batch, rng
        yield from ()

    def after_update(self, role: str) -> None:
        """Called after each update of `role`."""
        del role


class DistributionMatching(Method):
    """Pull the generator's distribution to the teacher's; the critic tracks the generator's own."""

    scores_need_grad: ClassVar[bool] = False  # whether the loss differentiates through the scores
    takes: ClassVar[tuple[type[Option], ...]] = ()  # the options that its settings may turn on
    trainer = "score_distillation"
    config: DistributionMatchingConfig

    def __init__(self, config: DistributionMatchingConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        assert parts.rollout is not None, "distribution matching needs a rollout"
        self.critic = parts.networks["critic"]
        self.teacher = parts.networks["teacher"]
        self.rollout = parts.rollout
        self.options = [option(config, parts) for option in self.takes if option.asked(config)]

    @classmethod
    def needs(cls, config: DistributionMatchingConfig) -> Needs:
        """Three networks, samples that the generator makes itself, and what options need."""
        needs = Needs(
            networks=("generator", "critic", "teacher"),
            trained=("generator", "critic"),
            rollout="simulation",
            rollout_options={"walk": config.walk},
            sampler="few_step_euler" if config.walk == "euler" else "few_step",
        )
        for option in cls.takes:
            if option.asked(config):
                needs = option.needs(config, needs)
        return needs

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Compare teacher and critic on the generator's samples, noised; DMD sec. 3."""
        sample, scores = self.simulate(batch, rng)
        at = Comparison(batch, rng, sample, scores, self.critic_target(sample, scores))
        effects = [option.on_generator(at) for option in self.options]
        adjusts = [effect.adjust for effect in effects if effect.adjust is not None]
        terms = [effect.term for effect in effects if effect.term is not None]
        return total(self.objective(*made_frames(sample, scores), adjusts), terms)

    def simulate(self, batch: Batch, rng: StepRNG) -> tuple[Sample, Scores]:
        """Samples with the generator's gradient, and both networks on them."""
        sample = self.rollout(self.generator, batch, rng, grad=True)
        with torch.set_grad_enabled(self.scores_need_grad):
            return sample, self.scores(self.noised(sample, rng), batch)

    def critic_target(self, sample: Sample, scores: Scores) -> Tensor:
        """The x0 that the critic learns to say of a noised sample, [B, C, F, H, W]."""
        del scores
        return sample.x0.detach()

    def draw_part(self, sample: Sample, rng: StepRNG) -> Part:
        """The noise levels at which a sample is judged: one expert's, where there are two."""
        del sample
        return draw_part(self.parts.experts, rng.shared, self.config.timestep_shift)

    def noised(self, sample: Sample, rng: StepRNG) -> NoisedSample:
        """A sample at a random noise level."""
        x0, given = sample.x0, self.parts.clean_frames(sample)
        part = self.draw_part(sample, rng)
        sigma = self.config.draw_sigma(rng.samples, x0, part)
        noise = rng.samples.randn(x0.shape[1:])
        return NoisedSample(x0, add_noise(x0, noise, sigma), sigma, noise, given, part.side)

    def scores(self, fake: NoisedSample, batch: Batch) -> Scores:
        """Both networks on noised samples."""
        critic, context = on_given(self.critic, fake.given), asking(fake.side)
        x0_critic = critic(fake.x, fake.sigma, batch.conditioning, context=context).x0
        velocity = guided_velocity(
            on_given(self.teacher, fake.given),
            fake.x,
            fake.sigma,
            batch.conditioning,
            batch.unconditional,
            cfg_scale=self.config.scale(fake.side),
            context=context,
            batched=self.config.batched_guidance,
        )
        x0_teacher = velocity_to_x0(fake.x, velocity, fake.sigma)
        return Scores(fake.x, fake.sigma, fake.noise, x0_teacher, x0_critic)

    @abstractmethod
    def objective(
        self, sample: Sample, scores: Scores, adjusts: Sequence[Adjust] = ()
    ) -> LossOutput:
        """The method's loss on the frames that the generator made.

        adjusts: what options do to its gradient in x0 of these frames, one after the other.
        """

    def critic_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Flow matching on the generator's samples: the critic learns their score."""
        fake = self.noised_sample(batch, rng)
        terms = [term for option in self.options for term in option.on_critic(fake, batch, rng)]
        loss = self.denoising_loss(fake, batch)
        output = total(LossOutput(loss), terms)
        if not terms:
            return output
        return LossOutput(output.loss, {**output.metrics, "denoising": loss.detach()})

    @torch.no_grad()
    def noised_sample(self, batch: Batch, rng: StepRNG) -> NoisedSample:
        """A sample of the generator as it is now, at a random noise level."""
        return self.noised(self.rollout(self.generator, batch, rng, grad=False), rng)

    def denoising_loss(self, fake: NoisedSample, batch: Batch) -> Tensor:
        """Mean squared error of the critic's velocity."""
        critic, given = on_given(self.critic, fake.given), count_given(fake.given)
        context = asking(fake.side)
        velocity = critic(fake.x, fake.sigma, batch.conditioning, context=context).velocity
        return F.mse_loss(learnt(velocity, given), learnt(fake.noise - fake.x0, given))

    def after_update(self, role: str) -> None:
        """What options do then."""
        for option in self.options:
            option.after_update(role)


def total(output: LossOutput, terms: Sequence[LossOutput]) -> LossOutput:
    """The sum of a loss and its terms, added in order, and the metrics of all."""
    loss, metrics = output.loss, dict(output.metrics)
    for term in terms:
        loss = loss + term.loss
        metrics |= term.metrics
    return LossOutput(loss, metrics)


@torch.no_grad()
def error_size(x0: Tensor, scores: Scores) -> Tensor:
    """mean |x0 - x0_teacher| per sample, [B, 1, 1, 1, 1], by which losses are scaled; DMD eq. 8."""
    size = (x0 - scores.x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return size.clamp(min=MIN_SIZE)


def made_frames(sample: Sample, scores: Scores) -> tuple[Sample, Scores]:
    """Both on the frames that the generator made, without those that it was given."""
    first = sample.given_frames
    if not first:
        return sample, scores
    return Sample(learnt(sample.x0, first)), replace(
        scores,
        x=learnt(scores.x, first),
        noise=learnt(scores.noise, first),
        x0_teacher=learnt(scores.x0_teacher, first),
        x0_critic=learnt(scores.x0_critic, first),
    )
