"""Noise levels of losses where two experts divide them: one expert per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.base import Method, MethodConfig, Parts
from model.consistency import Consistency, ConsistencyConfig
from model.diffusion import Diffusion, DiffusionConfig
from model.dmd import DMD, DMDConfig
from model.experts import WHOLE, ExpertLevels, ExpertPair, draw_part, draw_steps, side_of
from model.flow import shift
from model.ode import ODE, ODEConfig
from model.sid import SiD, SiDConfig
from model.types import Batch, Conditioning, Prediction
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.bidirectional import BidirectionalTrainingPipeline
from tests.conftest import build_wan
from tests.gaussian import SHAPE, Affine, Exact, Watched, saying, streams, streams_of_step
from tests.pairs import paired
from utils.seeding import step_rng

SIGMAS = [1.0, 0.9545, 0.875, 0.7]  # of shift 7: one lies on the boundary
CPU = torch.device("cpu")


def uniform(count: int = 100_000) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.cat([torch.rand(count, generator=rng), torch.tensor([0.0, 1.0 - 2**-24])])


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.35])
@pytest.mark.parametrize("factor", [1.0, 5.0, 12.0])
def test_levels_of_a_part_are_one_experts_to_the_last_bit(boundary: float, factor: float) -> None:
    levels = ExpertLevels(boundary)
    for side in levels.sides:
        sigma = levels.part(side).shifted(uniform(), factor)
        assert bool((sigma >= boundary).all()) == (side == "high")
        assert bool((sigma < boundary).all()) == (side == "low")
        assert 0.0 <= float(sigma.min()) < float(sigma.max()) <= 1.0


def test_cut_levels_stay_in_their_part() -> None:
    config = DMDConfig(min_sigma=0.02, max_sigma=0.98)
    for side, least, most in (("high", 0.875, 0.98), ("low", 0.02, 0.875)):
        part = ExpertLevels(0.875).part(side)  # type: ignore[arg-type]
        sigma = config.draw_sigma(streams(4000), torch.zeros(1), part)
        assert bool((sigma >= 0.875).all()) == (side == "high")
        assert float(sigma.min()) == pytest.approx(least, abs=2e-3)
        assert float(sigma.max()) == pytest.approx(most, abs=2e-3)


@pytest.mark.parametrize(
    ("boundary", "factor", "share"),
    [(0.875, 1.0, 0.125), (0.875, 5.0, 0.417), (0.875, 12.0, 0.632), (0.9, 5.0, 0.357)],
)
def test_the_high_experts_share_is_that_of_shifted_uniform_levels(
    boundary: float, factor: float, share: float
) -> None:
    levels, rng = ExpertLevels(boundary), torch.Generator().manual_seed(0)
    drawn = [levels.draw(rng, factor).side == "high" for _ in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(share, abs=0.03)


def test_over_both_experts_levels_are_spread_as_one_networks_are() -> None:
    levels, rng = ExpertLevels(0.875), torch.Generator().manual_seed(0)
    parts = [levels.draw(rng, 5.0) for _ in range(20_000)]
    u = torch.rand(20_000, generator=rng)
    found = torch.stack([part.shifted(one, 5.0) for part, one in zip(parts, u, strict=True)])
    quantiles = torch.linspace(0.05, 0.95, 19)
    expected = torch.tensor([shift(float(q), 5.0) for q in quantiles])
    torch.testing.assert_close(found.quantile(quantiles), expected, atol=0.02, rtol=0.0)


def test_one_network_draws_nothing_and_its_levels_are_what_they_were() -> None:
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert draw_part(None, rng, 5.0) is WHOLE
    assert draw_steps(None, rng, SIGMAS).count == 4
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(WHOLE.shifted(uniform(), 5.0), shift(uniform(), 5.0))
    assert torch.equal(WHOLE.within(uniform(), 0.02, 0.98), uniform().clamp(0.02, 0.98))


def test_one_expert_alone_is_always_drawn() -> None:
    levels = ExpertLevels(0.875, ("low",))
    rng = torch.Generator().manual_seed(0)
    assert {levels.draw(rng, 12.0).side for _ in range(20)} == {"low"}
    assert {levels.draw_steps(rng, SIGMAS, SIGMAS).first for _ in range(20)} == {3}


def test_ranks_and_micro_batches_draw_the_same_side() -> None:
    levels, found = ExpertLevels(0.875), set()
    for step in range(40):
        streams_ = [
            step_rng(0, "critic", step=step, first=8 * step, indices=indices, device=CPU)
            for indices in ([0, 1], [2, 3], [4, 5, 6, 7])
        ]
        sides = {levels.draw(rng.shared, 5.0).side for rng in streams_}
        assert len(sides) == 1
        found |= sides
    assert found == {"high", "low"}


def test_steps_are_one_experts_and_so_are_those_they_lead_to() -> None:
    levels, rng = ExpertLevels(0.875), torch.Generator().manual_seed(0)
    grid = [shift(1.0 - i / 10, 5.0) for i in range(11)]
    drawn = [levels.draw_steps(rng, grid[:-1], grid[1:]) for _ in range(600)]
    high = sum(sigma >= 0.875 for sigma in grid)
    expected = {
        (0, high - 1, "high", "high"),
        (high - 1, 1, "high", "low"),
        (high, 10 - high, "low", "low"),
    }
    assert {(one.first, one.count, one.side, one.target) for one in drawn} == expected
    crossing = sum(one.count == 1 for one in drawn) / 600
    assert crossing == pytest.approx(1 / 10, abs=0.05)
    for one in drawn[:20]:
        index = one.index(uniform())
        assert (int(index.min()), int(index.max())) == (one.first, one.first + one.count - 1)


@dataclass(frozen=True)
class Case:
    """A method over pairs, and whose calls are watched."""

    cls: type[Method]
    config: MethodConfig


CASES = [
    Case(DMD, DMDConfig(cfg_scale=2.0)),
    Case(SiD, SiDConfig(cfg_scale=2.0)),
    Case(Diffusion, DiffusionConfig()),
    Case(Consistency, ConsistencyConfig(cfg_scale=2.0)),
    Case(ODE, ODEConfig()),
]


def batch(size: int = 3) -> Batch:
    states = torch.randn((size, 5, *SHAPE), generator=torch.Generator().manual_seed(0))
    return Batch(saying(1.0, size), saying(0.0, size), SHAPE, states[:, -1], trajectory=states)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.cls.__name__)
def test_each_expert_is_asked_at_its_own_levels_alone_and_each_in_its_turn(case: Case) -> None:
    watched = {
        (role, side): Watched(Affine(seed))
        for seed, role in enumerate(("generator", "critic", "teacher"))
        for side in ("high", "low")
    }
    networks = {
        role: paired(watched[role, "high"], watched[role, "low"], 0.875)
        for role in ("generator", "critic", "teacher")
    }
    # The gate of a student's own steps lies between them: losses say whom they ask.
    networks["generator"].boundary = 0.915
    experts = ExpertLevels(0.915 if case.cls is ODE else 0.875)
    rollout = BidirectionalTrainingPipeline(SIGMAS)
    method = case.cls(case.config, Parts(networks, rollout, SIGMAS, experts=experts))
    for step in range(30):
        method.generator_loss(batch(), streams_of_step(3, step))
    networks_asked = case.cls.needs(case.config).networks
    samples = case.cls in (DMD, SiD, ODE)  # the generator is asked at its own steps
    for (role, side), net in watched.items():
        levels = {float(level) for call in net.calls for level in call.sigma.amax(dim=1)}
        bound = 0.915 if role == "generator" and samples else 0.875
        assert bool(levels) == (role in networks_asked), (role, side)
        assert all(side_of(level, bound) == side for level in levels), (role, side)


class Alone:
    """An expert that says what its name is: the teacher's guided velocity tells the scale."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, **_: object
    ) -> Prediction:
        velocity = self.value * conditioning.text[:, :, :, None, None] + 0.0 * x
        return Prediction(x - sigma[:, None, :, None, None] * velocity, velocity)


@pytest.mark.parametrize(("side", "expected"), [("high", 4.0), ("low", 3.0)])
def test_the_teachers_guidance_in_losses_is_its_experts_own(side: str, expected: float) -> None:
    exact = paired(Exact(), Exact())
    networks = {"generator": exact, "critic": exact, "teacher": paired(Alone(1.0), Alone(1.0))}
    parts = Parts(
        networks,
        BidirectionalTrainingPipeline([1.0]),
        [1.0],
        experts=ExpertLevels(0.875, (side,)),  # type: ignore[arg-type]
    )
    method = DMD(DMDConfig(cfg_scale=4.0, cfg_scale_low=3.0), parts)
    _, scores = method.simulate(batch(2), streams_of_step(2))
    velocity = (scores.x - scores.x0_teacher) / scores.sigma[:, None, :, None, None]
    torch.testing.assert_close(velocity, torch.full_like(velocity, expected))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["dmd", "diffusion"])
def test_a_loss_gives_gradients_to_one_expert(case: Case) -> None:
    shape, text = (16, 3, 4, 4), Conditioning(torch.ones(2, 12, 64))
    found = set()
    for step in range(8):
        high, low = (WanDiffusionWrapper(build_wan(seed=seed)) for seed in (1, 2))
        pair = ExpertPair(high, low, 0.915)
        networks = dict.fromkeys(("generator", "critic", "teacher"), pair)
        parts = Parts(
            networks, BidirectionalTrainingPipeline(SIGMAS), SIGMAS, experts=ExpertLevels(0.875)
        )
        x0 = torch.zeros(2, *shape)
        loss = case.cls(case.config, parts).generator_loss(
            Batch(text, text, shape, x0), streams_of_step(2, step)
        )
        loss.loss.backward()
        reached = {
            side
            for side, net in pair.model.items()
            if any(p.grad is not None for p in net.parameters())
        }
        assert len(reached) == 1
        found |= reached
    assert found == {"high", "low"}


@pytest.mark.parametrize(
    ("config", "experts", "told"),
    [
        (DMDConfig(max_sigma=0.8), ExpertLevels(0.875), "no noise level of the high expert"),
        (SiDConfig(min_sigma=0.9), ExpertLevels(0.875), "no noise level of the low expert"),
        (ConsistencyConfig(), ExpertLevels(0.875, ("high",)), "has no target to be consistent"),
    ],
)
def test_settings_that_leave_an_expert_nothing_are_refused(
    config: MethodConfig, experts: ExpertLevels, told: str
) -> None:
    (problem,) = config.expert_problems(experts, {})
    assert told in problem


@pytest.mark.parametrize("config", [DMDConfig(boundary=1.0), DiffusionConfig(boundary=875.0)])
def test_a_boundary_in_settings_is_a_noise_level(config: MethodConfig) -> None:
    assert "loss.boundary: must be a noise level between 0 and 1" in "".join(config.problems())
