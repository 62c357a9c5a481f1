"""Regression onto stored trajectories: which state is shown, at which level, toward what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.base import Parts
from model.causal import CausalLayout
from model.flow import constant_sigma, expand
from model.ode import ODE, ODEConfig
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Prediction
from model.wan.masks import block_causal, teacher_forcing
from tests.gaussian import Called, Normals, Said, Watched, batch_of, correlated, fast_streams

SHAPE, SIZE = (2, 6, 2, 2), 40  # [C, F, H, W]
SIGMAS = [1.0, 0.8, 0.5]
BLOCKS = CausalLayout(num_frame_per_block=2)
FIRST_ALONE = CausalLayout(num_frame_per_block=5, independent_first_frame=True)
layouts = pytest.mark.parametrize(
    ("layout", "sizes"), [(None, [6]), (BLOCKS, [2, 2, 2]), (FIRST_ALONE, [1, 5])]
)


def marked() -> Batch:
    """Trajectories whose state s is everywhere s, and whose end is everywhere 7."""
    states = torch.tensor([0.0, 1.0, 2.0, 7.0]).view(1, 4, 1, 1, 1, 1)
    return replace(batch_of(SIZE), trajectory=states.expand(SIZE, 4, *SHAPE))


def ask(layout: CausalLayout | None, config: ODEConfig | None = None) -> Called:
    """What the generator is asked."""
    net = Watched(Said())
    method = ODE(config or ODEConfig(), Parts({"generator": net}, None, SIGMAS, layout))
    method.generator_loss(marked(), fast_streams(SIZE, "ode"))
    (call,) = net.calls
    return call


@layouts
def test_each_state_is_shown_at_its_own_level(
    layout: CausalLayout | None, sizes: list[int]
) -> None:
    call = ask(layout)
    states = call.x[:, 0, :, 0, 0]
    levels = call.sigma.expand(SIZE, SHAPE[1])
    for state, sigma in enumerate(SIGMAS):
        assert torch.equal(states == state, levels == torch.tensor(sigma))
    assert torch.equal(call.x, states[:, None, :, None, None].expand_as(call.x))


@layouts
def test_each_block_has_one_level(layout: CausalLayout | None, sizes: list[int]) -> None:
    states = ask(layout).x[:, 0, :, 0, 0]
    for block in states.split(sizes, dim=1):
        assert torch.equal(block, block[:, :1].expand_as(block))


def test_blocks_and_samples_draw_levels_of_their_own() -> None:
    blocks = ask(BLOCKS).x[:, 0, ::2, 0, 0]
    for column in blocks.T:
        assert set(column.tolist()) == {0.0, 1.0, 2.0}
    assert not torch.equal(blocks[:, 0], blocks[:, 1])


def test_all_levels_are_equally_frequent() -> None:
    net = Watched(Said())
    method = ODE(ODEConfig(), Parts({"generator": net}, None, SIGMAS, BLOCKS))
    for step in range(20):
        method.generator_loss(marked(), fast_streams(SIZE, step))
    shown = torch.cat([call.x[:, 0, ::2, 0, 0].flatten() for call in net.calls])
    for state in range(3):
        assert float((shown == state).float().mean()) == pytest.approx(1 / 3, abs=0.04)


@layouts
def test_the_target_is_the_end(layout: CausalLayout | None, sizes: list[int]) -> None:
    """At velocity 0 a student predicts what it sees: the loss is the distance to 7."""
    method = ODE(ODEConfig(), Parts({"generator": Said()}, None, SIGMAS, layout))
    loss = method.generator_loss(marked(), fast_streams(SIZE, "ode")).loss
    expected = (7.0 - ask(layout).x).square().mean()
    assert float(loss) == pytest.approx(float(expected))


def test_a_causal_student_sees_the_noisy_past() -> None:
    call = ask(BLOCKS)
    assert call.x.shape[2] == 6
    assert call.context.mask == block_causal([2, 2, 2])


def test_under_teacher_forcing_it_sees_the_clean_past() -> None:
    call = ask(BLOCKS, ODEConfig(teacher_forcing=True))
    assert call.context.mask == teacher_forcing([2, 2, 2])
    assert torch.equal(call.x[:, :, :6], torch.full_like(call.x[:, :, :6], 7.0))
    assert torch.equal(call.sigma[:, :6], torch.zeros(SIZE, 6))


# ---- a Gaussian world, whose trajectories are known ----


def along(data: Normals, end: Tensor, sigma: Tensor) -> Tensor:
    """The state at sigma [B, 1] of the trajectory that ends in rows `end` [B, D]."""
    values, vectors = torch.linalg.eigh(data.covariances[0])
    spread = ((1.0 - sigma) ** 2 * values + sigma**2).sqrt() / values.sqrt()
    centred = (end - data.means[0]) @ vectors
    return (1.0 - sigma) * data.means[0] + (spread * centred) @ vectors.T


class Perfect:
    """The exact map from a state to the end of its trajectory, whole videos at once."""

    def __init__(self, data: Normals) -> None:
        self.data = data

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        del conditioning, context
        values, vectors = torch.linalg.eigh(self.data.covariances[0])
        spread = ((1.0 - sigma) ** 2 * values + sigma**2).sqrt() / values.sqrt()
        centred = (x.flatten(1) - (1.0 - sigma) * self.data.means[0]) @ vectors
        x0 = (self.data.means[0] + (centred / spread) @ vectors.T).view_as(x)
        return Prediction(x0, (x - x0) / expand(sigma))


def world() -> tuple[Normals, Batch]:
    """Data of 8 correlated elements, and trajectories of it."""
    data, shape = correlated(8), (2, 2, 2, 1)
    end = data.draw(SIZE, torch.Generator().manual_seed(0))
    states = [along(data, end, constant_sigma(sigma, end)) for sigma in SIGMAS]
    trajectory = torch.stack([state.view(SIZE, *shape) for state in (*states, end)], dim=1)
    return data, replace(batch_of(SIZE), trajectory=trajectory)


def test_the_perfect_student_has_no_loss() -> None:
    data, batch = world()
    method = ODE(ODEConfig(), Parts({"generator": Perfect(data)}, None, SIGMAS))
    assert float(method.generator_loss(batch, fast_streams(SIZE, "ode")).loss) < 1e-10


def test_a_denoiser_that_only_knows_the_mean_has_one() -> None:
    data, batch = world()
    method = ODE(ODEConfig(), Parts({"generator": data}, None, SIGMAS))
    assert float(method.generator_loss(batch, fast_streams(SIZE, "ode")).loss) > 0.1
