"""GANTrainer: the discriminator alone at first, then taking turns with the generator."""

from __future__ import annotations

from trainer.distillation import AlternatingTrainer


class GANTrainer(AlternatingTrainer):
    """The opponent is the discriminator, which may get a head start."""
