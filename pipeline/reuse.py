"""Samples that serve twice: the critic of a step learns on those that moved the generator."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from model.types import Batch, Denoiser, Rollout, Sample
from utils.seeding import StepRNG


@dataclass(frozen=True, eq=False)
class ReusedRollout:
    """A rollout without gradient returns what the earliest unused one with a gradient made.

    If there is none it is rolled out. Both must be asked with the same batches in the same order.
    """

    rollout: Rollout
    made: deque[Sample] = field(default_factory=deque)  # without their gradients

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """See model.types.Rollout."""
        if grad:
            sample = self.rollout(generator, batch, rng, grad=True)
            self.made.append(replace(sample, x0=sample.x0.detach()))
            return sample
        if not self.made:
            return self.rollout(generator, batch, rng, grad=False)
        return self.made.popleft()
