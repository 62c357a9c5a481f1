"""ScoreDistillationTrainer: the critic at every step, the generator at every n-th."""

from __future__ import annotations

from collections.abc import Iterator

from model.base import DistributionMatching
from trainer.base import Phase, Trainer, TrainerParts


class ScoreDistillationTrainer(Trainer):
    """Alternates a generator that follows two scores and a critic that follows the generator."""

    def __init__(self, parts: TrainerParts, method: DistributionMatching) -> None:
        super().__init__(parts)
        self.method = method

    def phases(self, step: int) -> Iterator[Phase]:
        """The generator first, so that both see the critic of the step before."""
        if step % self.method.config.generator_every == 0:
            yield Phase("generator", self.method.generator_loss)
        yield Phase("critic", self.method.critic_loss)

    def total_updates(self, role: str) -> int:
        """One critic update per step, one generator update per `generator_every` steps."""
        every = self.method.config.generator_every if role == "generator" else 1
        return -(-self.config.steps // every)
