"""A discriminator beside the critic: a GAN term, and the density ratios of other f-divergences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import MethodConfig, Needs, Parts
from model.discriminator import (
    AdversarialConfig,
    DiscriminatorOutput,
    Pair,
    adversarial_loss,
    discriminate,
)
from model.flow import add_noise
from model.given import both_given, on_given
from model.matching import Comparison, Effect, NoisedSample, Option
from model.options.f_divergence import MIN_MEAN_WEIGHT, Divergence, divergence_weight
from model.types import Batch, LossOutput
from utils.seeding import StepRNG


@dataclass(frozen=True)
class AdversarialOptionConfig(MethodConfig):
    """What the discriminator is for; without either use there is none."""

    gan_weight: float = 0.0  # of an adversarial term on the teacher's features (DMD2); 0 = off
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    divergence: Divergence = "reverse_kl"  # other than reverse_kl: f-distill, with the same heads

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        yield from self.adversarial.problems()
        if not 0.0 <= self.gan_weight < math.inf:
            yield f"loss.gan_weight: must be at least 0 and finite, got {self.gan_weight}"
        if self.adversarial.relativistic and self.divergence != "reverse_kl":
            yield (
                f"loss.divergence: '{self.divergence}' needs logits that are density ratios; "
                f"set loss.adversarial.relativistic=false"
            )

    @property
    def discriminates(self) -> bool:
        """Whether a discriminator is needed."""
        return self.gan_weight > 0.0 or self.divergence != "reverse_kl"


class AdversarialOption(Option):
    """Heads on the teacher's features tell samples from real latents; one pass serves both uses.

    A GAN term pulls samples toward what looks real (DMD2, arXiv:2405.14867 sec. 4.3); weights
    h(p_real / p_fake) of each sample's gradient, divided by their mean at its noise level, make
    DMD another f-divergence (f-distill, arXiv:2502.15681).
    """

    config: AdversarialOptionConfig

    def __init__(self, config: AdversarialOptionConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.teacher = parts.networks["teacher"]
        self.discriminator = parts.networks["discriminator"]

    @classmethod
    def asked(cls, config: AdversarialOptionConfig) -> bool:
        """See Option."""
        return config.discriminates

    @classmethod
    def needs(cls, config: AdversarialOptionConfig, needs: Needs) -> Needs:
        """A discriminator, and real latents to compare with."""
        del config
        return replace(
            needs,
            trained=(*needs.trained, "discriminator"),
            latents=True,
            because="" if needs.latents else "with loss.gan_weight or loss.divergence",
            backbone="teacher",
        )

    def on_generator(self, at: Comparison) -> Effect:
        """The divergence's weights, and the adversarial term where it is asked."""
        gan_weight, sigma = self.config.gan_weight, at.scores.sigma
        teacher = on_given(self.teacher, self.parts.clean_frames(at.sample))
        with torch.set_grad_enabled(gan_weight > 0.0):
            x = add_noise(at.sample.x0, at.scores.noise, sigma)  # once more, with the gradient
            fake: DiscriminatorOutput = self.discriminator(teacher, x, sigma, at.batch.conditioning)
        weight = self.weight(fake)
        weight = weight / fake.mean_weight.detach().clamp(min=MIN_MEAN_WEIGHT)

        def adjust(gradient: Tensor) -> Tensor:
            return gradient * weight.view(-1, 1, 1, 1, 1)

        if not gan_weight:
            return Effect(adjust)
        real = self.real_logits(at) if self.config.adversarial.relativistic else None
        term = adversarial_loss(fake.logits, real)
        return Effect(adjust, LossOutput(gan_weight * term, {"adversarial": term.detach()}))

    def weight(self, fake: DiscriminatorOutput) -> Tensor:
        """h of generated samples, [B]."""
        return divergence_weight(self.config.divergence, fake.logits.detach())

    def real_logits(self, at: Comparison) -> Tensor:
        """Logits [B] of the real latents at the same noise levels, with noise of their own."""
        x0, sigma = at.batch.x0, at.scores.sigma
        assert x0 is not None, "the discriminator needs real latents"
        x = add_noise(x0, at.rng.samples.randn(x0.shape[1:]), sigma)
        given = self.parts.clean_frames(replace(at.sample, x0=x0))
        teacher = on_given(self.teacher, given)
        logits: Tensor = self.discriminator(teacher, x, sigma, at.batch.conditioning).logits
        return logits

    def on_critic(self, fake: NoisedSample, batch: Batch, rng: StepRNG) -> Iterator[LossOutput]:
        """The discriminator's own loss on the critic's samples, and the fit of the mean weights."""
        assert batch.x0 is not None, "the discriminator needs real latents"
        real = add_noise(batch.x0, fake.noise, fake.sigma)
        pair = Pair(real, fake.x, fake.sigma, batch.conditioning)
        teacher = on_given(self.teacher, both_given(batch.x0, fake.given))
        found = discriminate(
            self.discriminator, teacher, pair, self.config.adversarial, rng.samples
        )
        yield LossOutput(found.loss, found.metrics)
        yield LossOutput(F.mse_loss(found.fake.mean_weight, self.weight(found.fake)))
