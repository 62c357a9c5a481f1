"""Randomness as an argument: every draw is keyed by what it is for, never by who draws it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine and Python version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator on `device`, seeded by `key`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


@dataclass(frozen=True, eq=False)
class SampleRNG:
    """One random stream per sample of a batch, so that a sample's noise follows the sample."""

    generators: Sequence[torch.Generator]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [B, *shape], fp32, on the generators' device."""
        return self._draw(torch.randn, shape)

    def rand(self, shape: Sequence[int] = ()) -> Tensor:
        """Uniform noise in [0, 1) of shape [B, *shape], fp32, on the generators' device."""
        return self._draw(torch.rand, shape)

    def subset(self, indices: Sequence[int]) -> SampleRNG:
        """The streams of some samples; drawing from them advances the originals."""
        return SampleRNG([self.generators[i] for i in indices])

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        rows = [function(tuple(shape), generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows)


def sample_rng(
    seed: int, purpose: str, samples: Sequence[int | str], device: torch.device | str
) -> SampleRNG:
    """Streams keyed by (seed, purpose, sample); a sample's key is the same on any rank."""
    return SampleRNG([generator(seed, purpose, key, device=device) for key in samples])


@dataclass(frozen=True, eq=False)
class StepRNG:
    """The randomness of one loss: what all ranks share, and what belongs to each sample."""

    shared: torch.Generator  # on the CPU, equal on all ranks: what decides the number of forwards
    samples: SampleRNG  # this rank's samples
    indices: Sequence[int]  # their positions in the global batch of this step


def step_rng(
    seed: int, phase: str, *, step: int, first: int, indices: Sequence[int], device: torch.device
) -> StepRNG:
    """The randomness of `phase` at `step`.

    `first`: draws taken from the data before this batch, over all ranks; `indices`: positions of
    this rank's samples in the global batch. Ranks, micro-batches and restarts draw
    the same numbers.
    """
    keys = [first + i for i in indices]
    shared = generator(seed, phase, "shared", step)
    return StepRNG(shared, sample_rng(seed, phase, keys, device), list(indices))
