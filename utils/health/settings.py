"""What is probed of a run's health, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class HealthConfig:
    """A fixed probe of the averaged weights: it is sampled, measured, and moves nothing."""

    every: int = 0  # outer steps between probes; 0 = never
    prompts: str | None = None  # file with one prompt per line; None = the data's first prompts
    count: int = 4  # prompts
    seeds: int = 2  # clips of each prompt; one has no diversity across seeds
    patience: int = 2  # probes in a row that raise an alarm, or end it
    # Whether an alarm such as collapse takes the run back to its newest checkpoint from before the
    # signs, and on with other samples; at most faults.max_roll_backs times to the same one.
    roll_back: bool = False

    def problems(self) -> Iterator[str]:
        """What is impossible about these settings, one line each."""
        if self.every < 0:
            yield f"health.every: must be at least 0 (0 = never), got {self.every}"
        for name in ("count", "seeds", "patience"):
            if getattr(self, name) < 1:
                yield f"health.{name}: must be at least 1, got {getattr(self, name)}"
        if self.roll_back and not self.every:
            yield "health.roll_back: alarms need probes; set health.every"
