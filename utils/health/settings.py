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

    def problems(self) -> Iterator[str]:
        """What is impossible about these settings, one line each."""
        if self.every < 0:
            yield f"health.every: must be at least 0 (0 = never), got {self.every}"
        for name in ("count", "seeds", "patience"):
            if getattr(self, name) < 1:
                yield f"health.{name}: must be at least 1, got {getattr(self, name)}"
