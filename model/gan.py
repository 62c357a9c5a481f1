"""Adversarial distillation: a discriminator on a denoiser's features, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from model.base import AlternatingConfig, Method, Needs, Parts
from model.discriminator import AdversarialConfig, Pair, adversarial_loss, discriminate
from model.flow import add_noise
from model.given import both_given, on_given
from model.types import Batch, LossOutput
from utils.seeding import StepRNG


@dataclass(frozen=True)
class GANConfig(AlternatingConfig):
    """How generator and discriminator meet."""

    backbone: Literal["critic", "teacher"] = "critic"  # trained with its heads, or frozen (LADD)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    discriminator_warmup_steps: int = 0  # outer steps before the generator moves for the first time

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        yield from self.adversarial.problems()
        if self.discriminator_warmup_steps < 0:
            yield (
                f"loss.discriminator_warmup_steps: must be at least 0, "
                f"got {self.discriminator_warmup_steps}"
            )

    def run_problems(self, *, steps: int, causal: bool) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().run_problems(steps=steps, causal=causal)
        if self.discriminator_warmup_steps >= steps:
            yield (
                f"loss.discriminator_warmup_steps: must be below steps={steps}, or the "
                f"generator never moves; got {self.discriminator_warmup_steps}"
            )

    @property
    def head_start(self) -> int:
        """The discriminator's."""
        return self.discriminator_warmup_steps


class GAN(Method):
    """The generator's samples, noised, against real latents noised to the same level."""

    config_class = GANConfig
    trainer = "gan"
    config: GANConfig

    def __init__(self, config: GANConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        assert parts.rollout is not None, "a GAN needs a rollout"
        self.rollout = parts.rollout
        self.backbone = parts.networks[config.backbone]
        self.discriminator = parts.networks["discriminator"]

    @classmethod
    def needs(cls, config: GANConfig) -> Needs:
        """A backbone beside the generator, and real latents."""
        backbone = () if config.backbone == "teacher" else (config.backbone,)
        return Needs(
            networks=("generator", config.backbone),
            trained=("generator", *backbone, "discriminator"),
            latents=True,
            rollout="simulation",
            backbone=config.backbone,
        )

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """softplus(-logit); relativistic: against a real sample with noise of its own."""
        sample = self.rollout(self.generator, batch, rng, grad=True)
        x0, backbone = sample.x0, on_given(self.backbone, self.parts.clean_frames(sample))
        sigma = self.config.draw_sigma(rng.samples, x0)
        x = add_noise(x0, rng.samples.randn(x0.shape[1:]), sigma)
        fake = self.discriminator(backbone, x, sigma, batch.conditioning).logits
        real = None
        if self.config.adversarial.relativistic:
            assert batch.x0 is not None
            given = self.parts.clean_frames(replace(sample, x0=batch.x0))
            x = add_noise(batch.x0, rng.samples.randn(x0.shape[1:]), sigma)
            backbone = on_given(self.backbone, given)
            real = self.discriminator(backbone, x, sigma, batch.conditioning).logits
        return LossOutput(adversarial_loss(fake, real), {"fake_logit": fake.detach().mean()})

    def critic_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """The discriminator's: real and generated samples under the same noise."""
        assert batch.x0 is not None, "the discriminator needs real latents"
        sample = self.rollout(self.generator, batch, rng, grad=False)
        x0, given = sample.x0, both_given(batch.x0, self.parts.clean_frames(sample))
        sigma = self.config.draw_sigma(rng.samples, x0)
        noise = rng.samples.randn(x0.shape[1:])
        pair = Pair(
            add_noise(batch.x0, noise, sigma),
            add_noise(x0, noise, sigma),
            sigma,
            batch.conditioning,
        )
        found = discriminate(
            self.discriminator,
            on_given(self.backbone, given),
            pair,
            self.config.adversarial,
            rng.samples,
        )
        return LossOutput(found.loss, found.metrics)
