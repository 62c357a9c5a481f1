"""DiffusionTrainer: one network, one loss on real latents, every step."""

from __future__ import annotations

from collections.abc import Iterator

from model.diffusion import Diffusion
from trainer.base import Phase, Trainer, TrainerParts


class DiffusionTrainer(Trainer):
    """Flow matching: makes a teacher, or fine-tunes one."""

    def __init__(self, parts: TrainerParts, method: Diffusion) -> None:
        super().__init__(parts)
        self.method = method

    def phases(self, step: int) -> Iterator[Phase]:
        """The generator alone."""
        del step
        yield Phase("generator", self.method.generator_loss)

    def total_updates(self, role: str) -> int:
        """One per step."""
        del role
        return self.config.steps
