"""Tests that run on the CPU and, in the gpu tier, on CUDA: where, and with the same noise there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from utils.seeding import SampleRNG, StepRNG, sample_rng, step_rng

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
every_device = pytest.mark.parametrize(
    "device", [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]
)


@contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """Within the body sessions take `device`, also where a GPU lies idle; fp32 is fp32 there."""
    rounding = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in rounding]
    try:
        for kind in rounding:
            kind.allow_tf32 = False
        with patch.object(torch.cuda, "is_available", lambda: device.type == "cuda"):
            yield
    finally:
        for kind, allowed in zip(rounding, before, strict=True):
            kind.allow_tf32 = allowed


@dataclass(frozen=True, eq=False)
class SameNoise(SampleRNG):
    """Draws on the CPU what it gives to a device: generators of CUDA draw other numbers."""

    device: torch.device = CPU

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        return super()._draw(function, shape).to(self.device)

    def subset(self, indices: Sequence[int]) -> SampleRNG:
        """See SampleRNG."""
        return SameNoise([self.generators[i] for i in indices], self.device)


def same_noise(size: int, device: torch.device, seed: int = 0) -> SampleRNG:
    """Streams of `size` samples on `device`, the same on all devices."""
    return SameNoise(sample_rng(seed, "test", range(size), CPU).generators, device)


@contextmanager
def training_with_the_same_noise() -> Iterator[None]:
    """Within the body losses draw the same on every device."""

    def drawn(seed: int, phase: str, *, device: torch.device, **position: Any) -> StepRNG:
        made = step_rng(seed, phase, device=CPU, **position)
        return StepRNG(made.shared, SameNoise(made.samples.generators, device), made.indices)

    with patch("trainer.base.step_rng", drawn):
        yield


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())
