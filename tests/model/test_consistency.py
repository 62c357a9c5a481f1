"""Consistency distillation: the exact solution of an ODE is what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.base import Parts
from model.causal import CausalLayout
from model.consistency import Consistency, ConsistencyConfig
from model.flow import expand, shift
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Prediction
from model.wan.masks import teacher_forcing
from tests.gaussian import (
    Exact,
    Normals,
    Said,
    Watched,
    correlated,
    fast_streams,
    saying,
)

SHAPE, ELEMENTS, SIZE = (2, 2, 2, 1), 8, 64
DATA = correlated(ELEMENTS)
BLOCKS = CausalLayout(num_frame_per_block=2)


class FlowMap(nn.Module):
    """m + (S / C_sigma)^power (x - (1 - sigma) m): power 1/2 is the exact end of the ODE."""

    def __init__(self, data: Normals, power: float = 0.5) -> None:
        super().__init__()
        self.data = data
        self.power = nn.Parameter(torch.tensor(power))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        del conditioning, context
        values, vectors = torch.linalg.eigh(self.data.covariances[0])
        shrink = (values / ((1.0 - sigma) ** 2 * values + sigma**2)) ** self.power
        centred = (x.flatten(1) - (1.0 - sigma) * self.data.means[0]) @ vectors
        x0 = (self.data.means[0] + (shrink * centred) @ vectors.T).view_as(x)
        return Prediction(x0, (x - x0) / expand(sigma).clamp(min=1e-6))


def real() -> Batch:
    x0 = DATA.draw(SIZE, torch.Generator().manual_seed(0)).view(SIZE, *SHAPE)
    return Batch(saying(0.0, SIZE), saying(0.0, SIZE), SHAPE, x0=x0)


def loss_of(student: nn.Module, grid: int = 48) -> Tensor:
    config = ConsistencyConfig(cfg_scale=1.0, grid=grid)
    method = Consistency(config, Parts({"generator": student, "teacher": DATA}))
    losses = [method.generator_loss(real(), fast_streams(SIZE, i)).loss for i in range(20)]
    return torch.stack(losses).mean()


def test_the_exact_solution_has_nearly_no_loss() -> None:
    """The data's variance is about 1; what is left is the error of a teacher's Euler step."""
    assert float(loss_of(FlowMap(DATA)).detach()) < 1e-3


def test_what_is_left_falls_with_the_square_of_the_step() -> None:
    coarse, fine = (float(loss_of(FlowMap(DATA), grid).detach()) for grid in (48, 192))
    assert fine < coarse / 16.0


@pytest.mark.parametrize("power", [0.0, 0.25, 0.8])
def test_a_wrong_solution_has_a_loss(power: float) -> None:
    exact = float(loss_of(FlowMap(DATA)).detach())
    assert float(loss_of(FlowMap(DATA, power)).detach()) > 3.0 * exact


def test_the_target_carries_no_gradient() -> None:
    """The gradient is that of the student at x_t alone, toward what it says at x_s."""
    student = FlowMap(DATA, 0.7)
    config = ConsistencyConfig(cfg_scale=1.0)
    method = Consistency(config, Parts({"generator": student, "teacher": DATA}))
    net = Watched(student)
    watched = Consistency(config, Parts({"generator": net, "teacher": DATA}))
    method.generator_loss(real(), fast_streams(SIZE, "loss")).loss.backward()
    watched.generator_loss(real(), fast_streams(SIZE, "loss"))
    target, own = net.calls
    assert [call.grad for call in net.calls] == [False, True]
    fixed = student(target.x, target.sigma, target.conditioning).x0.detach()
    error = student(own.x, own.sigma, own.conditioning).x0 - fixed
    (expected,) = torch.autograd.grad(error.square().mean(), student.power)
    torch.testing.assert_close(student.power.grad, expected)


def test_the_step_is_the_teachers_along_the_grid() -> None:
    net, teacher = Watched(Said(0.3)), Watched(Exact(2.0))
    config = ConsistencyConfig(cfg_scale=1.0, grid=5, timestep_shift=3.0)
    method = Consistency(config, Parts({"generator": net, "teacher": teacher}))
    batch = replace(real(), x0=real().x0)
    method.generator_loss(batch, fast_streams(SIZE, "loss"))
    (asked,), (nearer, own) = teacher.calls, net.calls
    levels = [shift(1.0 - i / 5, 3.0) for i in range(6)]
    for sigma, less in zip(own.sigma[:, 0].tolist(), nearer.sigma[:, 0].tolist(), strict=True):
        index = min(range(5), key=lambda i: abs(levels[i] - sigma))
        assert (sigma, less) == pytest.approx((levels[index], levels[index + 1]), abs=1e-6)
    assert torch.equal(asked.x, own.x)
    velocity = Exact(2.0)(own.x, own.sigma, own.conditioning).velocity
    expected = own.x + expand(nearer.sigma - own.sigma) * velocity
    torch.testing.assert_close(nearer.x, expected)


def test_the_teachers_step_is_guided() -> None:
    net, teacher = Watched(Said()), Watched(Exact())
    method = Consistency(
        ConsistencyConfig(cfg_scale=3.0), Parts({"generator": net, "teacher": teacher})
    )
    batch = replace(real(), conditioning=saying(2.0, SIZE))
    method.generator_loss(batch, fast_streams(SIZE, "loss"))
    (asked,), (nearer, own) = teacher.calls, net.calls
    assert len(asked.x) == 2 * SIZE
    cond, uncond = (Exact()(own.x, own.sigma, saying(mean, SIZE)).velocity for mean in (2.0, 0.0))
    velocity = uncond + 3.0 * (cond - uncond)
    torch.testing.assert_close(
        nearer.x, own.x + expand(nearer.sigma - own.sigma) * velocity, rtol=1e-4, atol=1e-5
    )


def test_the_last_step_regresses_onto_where_the_teacher_ends() -> None:
    """With a grid of one step that is all there is: x0 of the student against the teacher's."""
    config = ConsistencyConfig(cfg_scale=1.0, grid=1)
    method = Consistency(config, Parts({"generator": Said(0.5), "teacher": Said(-1.0)}))
    loss = method.generator_loss(real(), fast_streams(SIZE, "loss")).loss
    assert float(loss) == pytest.approx(1.5**2, rel=1e-5)


def test_a_causal_student_and_its_teacher_both_see_the_clean_past() -> None:
    size, shape = 3, (2, 4, 2, 2)
    net, teacher = Watched(Said()), Watched(Said())
    parts = Parts({"generator": net, "teacher": teacher}, None, (), BLOCKS)
    x0 = torch.randn((size, *shape), generator=torch.Generator().manual_seed(0))
    batch = Batch(saying(1.0, size), saying(0.0, size), shape, x0=x0)
    Consistency(ConsistencyConfig(), parts).generator_loss(batch, fast_streams(size, "loss"))
    for call in (*net.calls, *teacher.calls):
        assert call.context.mask == teacher_forcing([2, 2])
        copies = len(call.x) // size
        assert torch.equal(call.x[:, :, :4], x0.repeat(copies, 1, 1, 1, 1))
        assert torch.equal(call.sigma[:, :4], torch.zeros(copies * size, 4))
    assert [len(call.x) for call in (*net.calls, *teacher.calls)] == [3, 3, 6]


def test_each_block_makes_a_step_of_its_own() -> None:
    size, shape = 30, (2, 4, 2, 2)
    net = Watched(Said())
    parts = Parts({"generator": net, "teacher": Said()}, None, (), BLOCKS)
    x0 = torch.zeros(size, *shape)
    batch = Batch(saying(1.0, size), saying(0.0, size), shape, x0=x0)
    config = ConsistencyConfig(cfg_scale=1.0, teacher_forcing=False)
    Consistency(config, parts).generator_loss(batch, fast_streams(size, "loss"))
    sigma = net.calls[1].sigma
    assert torch.equal(sigma[:, 0], sigma[:, 1])
    assert torch.equal(sigma[:, 2], sigma[:, 3])
    assert (sigma[:, 0] != sigma[:, 2]).float().mean() > 0.8
