"""GANTrainer: the discriminator alone at first, then taking turns with the generator."""

from __future__ import annotations

from model.gan import GANConfig
from trainer.base import TrainerParts
from trainer.distillation import AlternatingTrainer


class GANTrainer(AlternatingTrainer):
    """The opponent is the discriminator, which may get a head start."""

    def __init__(self, parts: TrainerParts) -> None:
        super().__init__(parts)
        assert isinstance(parts.config.loss, GANConfig)
        self.head_start = parts.config.loss.discriminator_warmup_steps
