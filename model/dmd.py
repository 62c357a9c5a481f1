"""Distribution matching distillation (DMD, arXiv:2311.18828), and the small terms that help it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import (
    DistributionMatching,
    DistributionMatchingConfig,
    Needs,
    Parts,
    Scores,
    error_size,
    made_frames,
)
from model.discriminator import AdversarialConfig, Pair, adversarial_loss, discriminate
from model.flow import add_noise
from model.types import Batch, LossOutput, Sample
from utils.seeding import StepRNG

MAX_LOG_RATIO = 3.0  # density ratios are cut to e^-3 .. e^3: a discriminator may be sure of itself

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "neyman", "hellinger",
    "jeffreys",
]  # fmt: skip


@dataclass(frozen=True)
class DMDConfig(DistributionMatchingConfig):
    """DMD's own options; all are off by default."""

    gan_weight: float = 0.0  # of an adversarial term on the teacher's features (DMD2); 0 = off
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    divergence: Divergence = "reverse_kl"  # other than reverse_kl: f-distill, with the same heads
    critic_pull: float = 0.0  # IDA: share by which the critic jumps to the generator's new weights

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
        if not 0.0 <= self.critic_pull < 1.0:
            yield f"loss.critic_pull: must lie in [0, 1), got {self.critic_pull}"

    @property
    def judges(self) -> bool:
        """Whether a discriminator is needed."""
        return self.gan_weight > 0.0 or self.divergence != "reverse_kl"


class DMD(DistributionMatching):
    """The gradient in x0 is (x0_critic - x0_teacher) / mean |x0 - x0_teacher|; DMD eq. 7 and 8.

    Options: a GAN term (DMD2, arXiv:2405.14867 sec. 4.3), weights of another f-divergence
    (f-distill, arXiv:2502.15681), and the critic pulled after the generator (IDA, SenseFlow,
    arXiv:2506.00523).
    """

    config_class = DMDConfig
    config: DMDConfig

    def __init__(self, config: DMDConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.discriminator = parts.networks.get("discriminator")

    @classmethod
    def needs(cls, config: DMDConfig) -> Needs:  # type: ignore[override]
        """A discriminator compares with real latents; a pulled critic has the generator's sizes."""
        needs = super().needs(config)
        if config.critic_pull:
            needs = replace(needs, same_architecture=("generator", "critic"))
        if not config.judges:
            return needs
        trained = (*needs.trained, "discriminator")
        return replace(
            needs,
            trained=trained,
            latents=True,
            because="" if needs.latents else "with loss.gan_weight or loss.divergence",
            backbone="teacher",
        )

    def objective(self, sample: Sample, scores: Scores, weight: Tensor | None = None) -> LossOutput:
        """Half the mean squared distance to a target that is one such gradient away.

        weight: [B], of each sample's gradient; None = 1.
        """
        with torch.no_grad():
            x0 = sample.x0
            gradient = (scores.x0_critic - scores.x0_teacher) / error_size(x0, scores)
            if weight is not None:
                gradient = gradient * weight.view(-1, 1, 1, 1, 1)
            target = x0 - gradient  # the stop-gradient of eq. 7
        loss = 0.5 * F.mse_loss(sample.x0, target)
        return LossOutput(loss, {"dmd_gradient": gradient.abs().mean()})

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """DMD's loss, weighted by the divergence, and the adversarial term where they are asked."""
        if self.discriminator is None:
            return super().generator_loss(batch, rng)
        sample, scores = self.simulate(batch, rng)
        with torch.set_grad_enabled(self.config.gan_weight > 0.0):
            x = add_noise(sample.x0, scores.noise, scores.sigma)  # once more, with the gradient
            judged = self.discriminator(self.teacher, x, scores.sigma, batch.conditioning)
        weight = divergence_weight(self.config.divergence, judged.logits.detach())
        weight = weight / judged.mean_weight.detach().clamp(min=math.exp(-MAX_LOG_RATIO))
        output = self.objective(*made_frames(sample, scores), weight)
        if not self.config.gan_weight:
            return output
        real = None
        if self.config.adversarial.relativistic:
            real = self.real_logits(batch, scores.sigma, rng)
        term = adversarial_loss(judged.logits, real)
        return LossOutput(
            output.loss + self.config.gan_weight * term,
            {**output.metrics, "adversarial": term.detach()},
        )

    def real_logits(self, batch: Batch, sigma: Tensor, rng: StepRNG) -> Tensor:
        """Logits [B] of the real latents at noise levels sigma [B, 1], with noise of their own."""
        assert self.discriminator is not None and batch.x0 is not None
        x = add_noise(batch.x0, rng.samples.randn(batch.x0.shape[1:]), sigma)
        return self.discriminator(self.teacher, x, sigma, batch.conditioning).logits

    def critic_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """The critic's loss, and beside it, on the same samples, the discriminator's own."""
        if self.discriminator is None:
            return super().critic_loss(batch, rng)
        fake = self.noised_sample(batch, rng)
        assert batch.x0 is not None, "the discriminator needs real latents"
        pair = Pair(
            add_noise(batch.x0, fake.noise, fake.sigma), fake.x, fake.sigma, batch.conditioning
        )
        verdict = discriminate(
            self.discriminator, self.teacher, pair, self.config.adversarial, rng.samples
        )
        weight = divergence_weight(self.config.divergence, verdict.fake.logits.detach())
        fit = F.mse_loss(verdict.fake.mean_weight, weight)
        loss = self.denoising_loss(fake, batch)
        return LossOutput(
            loss + verdict.loss + fit, {**verdict.metrics, "denoising": loss.detach()}
        )

    @torch.no_grad()
    def after_update(self, role: str) -> None:
        """After the generator moved: pull the critic toward it (IDA)."""
        if role != "generator" or not self.config.critic_pull:
            return
        for own, other in zip(self.critic.parameters(), self.generator.parameters(), strict=True):
            own.lerp_(other, self.config.critic_pull)


def divergence_weight(divergence: Divergence, logits: Tensor) -> Tensor:
    """h(r) of an f-divergence for density ratios r = p_real / p_fake = exp(logits) [B].

    What the reverse KL's gradient is multiplied by, arXiv:2502.15681 table 1.
    """
    r = logits.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = {
        "reverse_kl": torch.ones_like(r),
        "forward_kl": r,
        "jensen_shannon": r / (1.0 + r),
        "softened_reverse_kl": 1.0 / (1.0 + r),
        "neyman": 1.0 / r,
        "hellinger": r.sqrt(),
        "jeffreys": 1.0 + r,
    }
    return weights[divergence]
