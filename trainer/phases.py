"""What an outer step is made of, and what a run remembers of the steps that it has done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from model.types import Batch, LossOutput
from trainer.roles import group_of
from utils.seeding import StepRNG


@dataclass(frozen=True)
class Phase:
    """One loss within an outer step, and one update of each role that it moves."""

    name: str  # of its randomness and its metrics
    loss: Callable[[Batch, StepRNG], LossOutput]
    roles: tuple[str, ...]  # whose weights it moves; of two experts, those that it reaches
    hands_on: bool = False  # whether the phase after it is given the same samples of the data


@dataclass
class TrainState:
    """All that a resumed run needs beside weights, averages and optimizer states."""

    step: int = 0  # outer steps done
    draws: int = 0  # samples taken from the data order so far, over all ranks
    updates: dict[str, int] = field(default_factory=dict)  # optimizer updates per role

    def updates_of(self, group: str) -> int:
        """Those of a role, or of both of its experts together."""
        return sum(count for name, count in self.updates.items() if group_of(name) == group)
