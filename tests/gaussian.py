"""A world in closed form: normal data, its exact denoiser, and denoisers small enough to train.

The text of a conditioning, [B, 1, 1], is the mean of the data; so captions and guidance mean
something here too. Letters as in model/types.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.flow import expand, velocity_to_x0
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Prediction
from utils.seeding import SampleRNG, StepRNG, sample_rng, step_rng

SHAPE = (2, 3, 4, 4)  # [C, F, H, W] of a sample
CPU = torch.device("cpu")


def saying(mean: float, batch: int) -> Conditioning:
    """The conditioning whose data has mean `mean`."""
    return Conditioning(torch.full((batch, 1, 1), mean))


def batch_of(size: int, *, mean: float = 0.0) -> Batch:
    """A batch that asks for data of mean `mean`; the negative prompt stands for mean 0."""
    return Batch(saying(mean, size), saying(0.0, size), SHAPE)


def streams(size: int, seed: int = 0) -> SampleRNG:
    """Random streams for `size` samples."""
    return sample_rng(seed, "test", range(size), CPU)


def streams_of_step(size: int, step: int = 0, phase: str = "generator") -> StepRNG:
    """The randomness of one loss."""
    return step_rng(0, phase, step=step, first=step * size, indices=range(size), device=CPU)


@dataclass(eq=False)
class Exact:
    """The optimal denoiser of N(text, std^2) per element, which keeps a record of its calls."""

    std: float = 1.0
    calls: list[tuple[int, float]] = field(default_factory=list)  # batch size, noise level

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """E[x0 | x], and the velocity that points there from x."""
        assert context is FULL_ATTENTION
        self.calls.append((len(x), float(sigma[0, 0])))
        level = expand(sigma)
        mean = conditioning.text[:, :, :, None, None]
        gain = (1.0 - level) * self.std**2 / ((1.0 - level) ** 2 * self.std**2 + level**2)
        x0 = mean + gain * (x - (1.0 - level) * mean)
        return Prediction(x0, (x - x0) / level)


class Affine(nn.Module):
    """velocity = a(sigma) x + b(sigma); a and b are a small network, and zero at first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.coefficients = nn.Sequential(
            nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )
        with torch.no_grad():
            for i, p in enumerate(self.coefficients.parameters()):
                rng = torch.Generator().manual_seed(seed + i)
                p.copy_(torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5)
            for p in self.coefficients[-1].parameters():
                p.zero_()

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """Predict from x at noise level sigma."""
        del conditioning, context
        scale, offset = self.coefficients(sigma[..., None]).unbind(-1)
        velocity = expand(scale) * x + expand(offset)
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)
