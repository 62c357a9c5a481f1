"""CausVid: DMD's gradient on predictions from noised real videos, each block at its own level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.base import Parts
from model.causal import CausalLayout, per_block
from model.causvid import CausVid, CausVidConfig
from model.flow import step_sigmas
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Prediction
from pipeline.data import DataRollout
from tests.gaussian import correlated, drawn_noise, expected_x0, fast_streams, saying

SHAPE, ELEMENTS, SIZE = (1, 6, 1, 2), 12, 5  # [C, F, H, W]
SIGMAS = step_sigmas([1000, 750, 500], 5.0)
TEACHER, CRITIC = correlated(ELEMENTS), correlated(ELEMENTS, seed=5)
BLOCKS = CausalLayout(num_frame_per_block=2)


class PerElement(nn.Module):
    """x0 = a x + b sigma, a and b another weight for each element."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(0.5, 1.5, ELEMENTS).view(SHAPE))
        self.b = nn.Parameter(torch.linspace(1.0, -1.0, ELEMENTS).view(SHAPE))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        del conditioning, context
        x0 = self.a * x + self.b * sigma[:, None, :, None, None]
        return Prediction(x0, x - x0)


def real() -> Tensor:
    return torch.randn((SIZE, *SHAPE), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", [None, BLOCKS], ids=["whole", "blocks"])
def test_the_generators_gradient_is_the_written_one(layout: CausalLayout | None) -> None:
    config, net = CausVidConfig(cfg_scale=1.0), PerElement()
    networks = {"generator": net, "critic": CRITIC, "teacher": TEACHER}
    rollout = DataRollout(SIGMAS, layout, teacher_forcing=False)
    method = CausVid(config, Parts(networks, rollout, SIGMAS, layout))
    batch = Batch(saying(0.0, SIZE), saying(0.0, SIZE), SHAPE, x0=real())
    method.generator_loss(batch, fast_streams(SIZE, "gradient")).loss.backward()

    rng = fast_streams(SIZE, "gradient")  # the same draws: level, noise, level, noise
    choice = (rng.samples.rand((1 if layout is None else 3,)) * len(SIGMAS)).long()
    level = per_block(torch.tensor(SIGMAS, dtype=torch.float64)[choice], layout, SHAPE[1])
    level = level[:, None, :, None, None]
    noisy = (1.0 - level) * real().double() + level * rng.samples.randn(SHAPE).double()
    x0 = net.a.detach().double() * noisy + net.b.detach().double() * level
    at = drawn_noise(config, rng, SHAPE)
    teacher, critic = (expected_x0(d, at.noised(x0), at.sigma) for d in (TEACHER, CRITIC))
    size = (x0.flatten(1) - teacher).abs().mean(1, keepdim=True)
    gradient = ((critic - teacher) / size / x0.numel()).view_as(x0)
    for weight, slope in ((net.a, noisy), (net.b, level)):
        expected = (gradient * slope).sum(0)
        assert weight.grad is not None
        assert (weight.grad - expected).norm() < 1e-6 * expected.norm()


def test_it_needs_real_latents_and_makes_samples_from_them() -> None:
    needs = CausVid.needs(CausVidConfig())
    assert needs.latents
    assert needs.rollout == "data"


def test_the_critic_learns_the_velocity_of_noised_predictions() -> None:
    config, net = CausVidConfig(cfg_scale=1.0), PerElement()
    networks = {"generator": net, "critic": CRITIC, "teacher": TEACHER}
    rollout = DataRollout(SIGMAS, None, teacher_forcing=False)
    method = CausVid(config, Parts(networks, rollout, SIGMAS))
    batch = Batch(saying(0.0, SIZE), saying(0.0, SIZE), SHAPE, x0=real())
    loss = method.critic_loss(batch, fast_streams(SIZE, "critic")).loss
    rng = fast_streams(SIZE, "critic")
    x0 = rollout(net, batch, rng, grad=False).x0.double()
    at = drawn_noise(config, rng, SHAPE)
    guess = (at.noised(x0) - expected_x0(CRITIC, at.noised(x0), at.sigma)) / at.sigma
    expected = (guess - (at.noise - x0).flatten(1)).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
