"""DiffusionTrainer: one network, one loss with a known target, every step."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.base import Trainer
from trainer.phases import Phase


class DiffusionTrainer(Trainer):
    """Flow matching: makes a teacher, or fine-tunes one."""

    def phases(self, step: int) -> Iterator[Phase]:
        """The generator alone."""
        del step
        yield Phase("generator", self.method.generator_loss, ("generator",))

    def total_updates(self, role: str) -> int:
        """One per step."""
        del role
        return self.config.steps
