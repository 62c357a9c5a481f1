"""ScoreDistillationTrainer: the critic at every step, the generator at every n-th."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

from model.base import AlternatingConfig
from model.types import Batch, LossOutput
from trainer.base import Trainer
from trainer.parts import TrainerParts
from trainer.phases import Phase
from trainer.roles import group_of
from utils.seeding import StepRNG


class Alternating(Protocol):
    """A method whose generator and opponent take turns."""

    config: AlternatingConfig

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Moves the generator."""

    def critic_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Moves all other roles."""


class AlternatingTrainer(Trainer):
    """Alternates a generator and an opponent that judges its samples."""

    def __init__(self, parts: TrainerParts) -> None:
        super().__init__(parts)
        groups = dict.fromkeys(group_of(name) for name in parts.roles)
        self.opponents = tuple(name for name in groups if name != "generator")
        self.losses = cast(Alternating, parts.method)
        self.every = self.losses.config.generator_every
        self.head_start = self.losses.config.head_start

    def phases(self, step: int) -> Iterator[Phase]:
        """The generator first, so that both see the opponent of the step before."""
        since = step - self.head_start
        if since >= 0 and since % self.every == 0:
            again = self.losses.config.reuse_rollout
            yield Phase("generator", self.losses.generator_loss, ("generator",), hands_on=again)
        yield Phase("critic", self.losses.critic_loss, self.opponents)

    def total_updates(self, role: str) -> int:
        """One opponent update per step, one generator update per `generator_every` steps."""
        if role != "generator":
            return self.config.steps
        return -(-max(0, self.config.steps - self.head_start) // self.every)


class ScoreDistillationTrainer(AlternatingTrainer):
    """The generator follows two scores; the critic, which gives one of them, follows it."""
