"""Phased DMD against closed forms: noising, the critic's target, and where the high phase ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.base import Parts
from model.dmd import DMD, DMDConfig
from model.experts import ExpertLevels, side_of
from model.flow import add_noise, expand, shift, step_sigmas, unshift
from model.phased_dmd import PhasedDMD, PhasedDMDConfig, further_velocity, noise_further
from model.types import (
    FULL_ATTENTION,
    Batch,
    Conditioning,
    Context,
    Prediction,
    Sample,
    Side,
)
from pipeline.bidirectional import BidirectionalTrainingPipeline
from pipeline.phased import PhasedTrainingPipeline
from tests.gaussian import (
    SHAPE,
    Affine,
    Called,
    Exact,
    Samples,
    Watched,
    batch_of,
    fast_streams,
    streams,
    streams_of_step,
)
from tests.pairs import paired
from utils.seeding import step_rng

SIGMAS = step_sigmas([1000, 750, 500, 250], 7.0)  # the third is .875, where A14B's experts meet
LEVEL, GATE = SIGMAS[2], (SIGMAS[1] + SIGMAS[2]) / 2
CHECKED = [(0.0, 0.5), (0.5, 0.7), (0.875, 0.93), (0.875, 0.97), (0.8333, 0.9)]  # s, t
DRAWS, BINS = 1_000_000, 30
# A mixture of two normal distributions: weights, means, deviations of x0.
MIXTURE = ((0.3, 0.7), (-1.2, 0.9), (0.3, 0.5))


def column(values: Tensor) -> Tensor:
    """Numbers as a batch of latents of one element."""
    return values[:, None, None, None, None].float()


def drawn_x0(rng: torch.Generator) -> Tensor:
    weights, means, deviations = map(torch.tensor, MIXTURE)
    which = torch.multinomial(weights, DRAWS, replacement=True, generator=rng)
    return means[which] + deviations[which] * torch.randn(DRAWS, generator=rng)


def true_velocity(x: Tensor, t: float) -> Tensor:
    """-(x + t score) / (1 - t) of the mixture at noise level t, in float64."""
    weights, means, deviations = (torch.tensor(one).double() for one in MIXTURE)
    variances = (1.0 - t) ** 2 * deviations**2 + t**2
    away = x.double()[:, None] - (1.0 - t) * means
    belief = (weights.log() - 0.5 * (away**2 / variances + variances.log())).softmax(1)
    score = -(belief * away / variances).sum(1)
    return -(x.double() + t * score) / (1.0 - t)


def standard_errors(s: float, t: float, *, wrong: bool = False) -> Tensor:
    """By how many of them the mean of the critic's target is off, per bin of x_t: [BINS]."""
    rng = torch.Generator().manual_seed(round(1e6 * (s + t)))
    x0 = drawn_x0(rng)
    anchor = column((1.0 - s) * x0 + s * torch.randn(DRAWS, generator=rng))
    noise, sigma = column(torch.randn(DRAWS, generator=rng)), torch.full((DRAWS, 1), t)
    x = noise_further(anchor, noise, sigma, s).flatten()
    target = further_velocity(anchor, noise, sigma, s)[0]
    if wrong:
        target = noise - anchor  # what would be right if the samples were clean
    gap = target.flatten().double() - true_velocity(x, t)
    bins = gap[x.argsort()][: DRAWS - DRAWS % BINS].view(BINS, -1)
    return bins.mean(1) / (bins.std(1) / math.sqrt(bins.shape[1]))


@pytest.mark.parametrize(("s", "t"), CHECKED)
def test_the_critics_target_is_the_velocity_of_what_was_noised_further(s: float, t: float) -> None:
    errors = standard_errors(s, t)
    print(f"s {s}, t {t}: at most {float(errors.abs().max()):.2f} standard errors")
    assert float(errors.abs().max()) < 4.0
    if s:
        assert float(standard_errors(s, t, wrong=True).abs().max()) > 10.0


@pytest.mark.parametrize(("s", "t"), CHECKED[1:])
def test_noising_further_leaves_the_straight_path_of_the_data(s: float, t: float) -> None:
    one, zero = torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)
    sigma = torch.tensor([[t]])
    clean = noise_further((1.0 - s) * one, zero, sigma, s)
    old, new = noise_further(s * one, zero, sigma, s), noise_further(zero, one, sigma, s)
    torch.testing.assert_close(clean, (1.0 - t) * one)
    torch.testing.assert_close(old.square() + new.square(), t * t * one)


def test_from_clean_samples_on_it_is_dmds_noise_and_velocity() -> None:
    x0, noise = streams(3).randn(SHAPE), streams(3, seed=1).randn(SHAPE)
    sigma = torch.tensor([[0.1], [0.5], [0.9]])
    torch.testing.assert_close(noise_further(x0, noise, sigma, 0.0), add_noise(x0, noise, sigma))
    target, share = further_velocity(x0, noise, sigma, 0.0)
    torch.testing.assert_close(target, noise - x0)
    torch.testing.assert_close(share, torch.ones_like(share))


@pytest.mark.parametrize(
    ("above", "published"),
    [(0.001, 59), (0.005, 26), (0.01, 18), (0.02, 12), (0.05, 6.0), (0.105, 2.0)],
)
def test_near_the_anchor_the_target_is_mostly_noise(above: float, published: float) -> None:
    sigma = torch.tensor([[0.875 + above]])
    one = torch.ones(1, 1, 1, 1, 1)
    assert float(further_velocity(one, one, sigma, 0.875)[1]) == pytest.approx(published, rel=0.03)


class OneStep(nn.Module):
    """x0 = a noise + b: what a student of one step makes of pure noise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """At noise level 1."""
        del conditioning, context
        x0 = self.a * x + self.b
        return Prediction(x0, (x - x0) / expand(sigma))

    def at(self, level: float) -> tuple[Tensor, Tensor]:
        """Mean and deviation of its samples at `level`."""
        mean, deviation = (1.0 - level) * self.b, (1.0 - level) * self.a + level
        return mean.detach(), deviation.detach()


@dataclass(frozen=True, eq=False)
class OptimalCritic:
    """The exact velocity of a student's samples, noised from `level`."""

    student: OneStep
    level: float

    def __call__(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *, context: Context
    ) -> Prediction:
        """Of a normal distribution."""
        del conditioning, context
        mean, deviation = self.student.at(self.level)
        t = expand(sigma)
        a = (1.0 - t) / (1.0 - self.level)
        variance = a**2 * deviation**2 + t**2 - (a * self.level) ** 2
        velocity = -(x - t * (x - a * mean) / variance) / (1.0 - t)
        return Prediction(x - t * velocity, velocity)


@pytest.mark.parametrize("level", [0.875, 0.6])
def test_the_high_phase_ends_where_the_teachers_samples_are_at_the_boundary(level: float) -> None:
    mean, deviation = 0.7, 0.5
    student = OneStep()
    parts = Parts(
        {
            "generator": student,
            "critic": OptimalCritic(student, level),
            "teacher": Exact(deviation),
        },
        PhasedTrainingPipeline([1.0, level], (1.0 + level) / 2, "high", "euler"),
        [1.0, level],
        experts=ExpertLevels(level),
    )
    method = PhasedDMD(PhasedDMDConfig(cfg_scale=1.0), parts)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1, betas=(0.0, 0.999))
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.98**step
        optimizer.zero_grad()
        method.generator_loss(
            batch_of(64, mean=mean), fast_streams(64, "high", step)
        ).loss.backward()
        optimizer.step()
    found = [float(value) for value in student.at(level)]
    expected = [(1.0 - level) * mean, math.hypot((1.0 - level) * deviation, level)]
    print(f"x_s of mean {found[0]:.5f} and deviation {found[1]:.5f}; exact {expected}")
    assert found == pytest.approx(expected, abs=2e-4)
    if level == 0.875:
        assert found == pytest.approx([0.0875, 0.8772], abs=3e-4)


SAME = {field.name: getattr(PhasedDMDConfig(), field.name) for field in fields(DMDConfig)
        if hasattr(PhasedDMDConfig(), field.name)}  # fmt: skip


@pytest.mark.parametrize("loss", ["generator_loss", "critic_loss"])
def test_without_a_boundary_it_is_dmd_bit_for_bit(loss: str) -> None:
    networks = {"generator": Affine(0), "critic": Exact(0.8), "teacher": Exact(0.5)}
    rollouts = (
        PhasedTrainingPipeline(SIGMAS, None, "high", "renoise"),
        BidirectionalTrainingPipeline(SIGMAS),
    )
    phased = PhasedDMD(PhasedDMDConfig(walk="renoise"), Parts(networks, rollouts[0], SIGMAS))
    plain = DMD(DMDConfig(**SAME), Parts(networks, rollouts[1], SIGMAS))
    for step in range(4):
        losses = [
            getattr(method, loss)(batch_of(3, mean=1.0), streams_of_step(3, step)).loss
            for method in (phased, plain)
        ]
        assert torch.equal(*losses)
        assert losses[0] > 0.0


def test_a_clean_sample_with_an_anchor_at_zero_gives_dmds_loss() -> None:
    x0 = streams(4).randn(SHAPE)
    samples = Samples(x0)
    rollout: Any = samples.rollout
    networks: dict[str, Any] = {"generator": samples, "critic": Exact(0.8), "teacher": Exact(0.5)}

    def anchored(generator: Any, batch: Batch, rng: Any, *, grad: bool) -> Sample:
        found = samples.rollout(generator, batch, rng, grad=grad)
        return Sample(found.x0, anchor=found.x0.detach())

    phased = PhasedDMD(PhasedDMDConfig(), Parts(networks, anchored, SIGMAS))
    plain = DMD(DMDConfig(**SAME), Parts(networks, rollout, SIGMAS))
    for loss in ("generator_loss", "critic_loss"):
        ours, theirs = (
            getattr(method, loss)(batch_of(4, mean=1.0), streams_of_step(4)).loss
            for method in (phased, plain)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)


def networks(watched: Mapping[tuple[str, Side], Watched]) -> dict[str, Any]:
    pairs = {
        role: paired(watched[role, "high"], watched[role, "low"])
        for role in ("generator", "critic", "teacher")
    }
    pairs["generator"].boundary = GATE
    return pairs


def watch() -> dict[tuple[str, Side], Watched]:
    sides: tuple[Side, Side] = ("high", "low")
    return {
        (role, side): Watched(Affine(seed))
        for seed, role in enumerate(("generator", "critic", "teacher"))
        for side in sides
    }


def method_of(config: PhasedDMDConfig, watched: Mapping[tuple[str, Side], Watched]) -> PhasedDMD:
    rollout = PhasedTrainingPipeline(SIGMAS, GATE, config.phase, config.walk)
    parts = Parts(networks(watched), rollout, SIGMAS, experts=ExpertLevels(0.875))
    return PhasedDMD(config, parts)


def levels_of(calls: list[Called]) -> list[float]:
    return [float(level) for call in calls for level in call.sigma.flatten()]


def asked(net: Watched) -> list[float]:
    """The noise levels of its calls, each once."""
    return sorted(set(levels_of(net.calls)))


@pytest.mark.parametrize("walk", ["euler", "renoise"])
def test_in_the_high_phase_nobody_asks_a_low_expert(walk: Any) -> None:
    watched = watch()
    method = method_of(PhasedDMDConfig(walk=walk), watched)
    for step in range(12):
        method.generator_loss(batch_of(3, mean=1.0), streams_of_step(3, step))
        method.critic_loss(batch_of(3, mean=1.0), streams_of_step(3, step, "critic"))
    assert not any(net.calls for (_, side), net in watched.items() if side == "low")
    assert asked(watched["generator", "high"]) == pytest.approx(SIGMAS[1::-1])
    judged = levels_of(watched["critic", "high"].calls)
    least = shift(unshift(LEVEL, 7.0) + 0.02, 7.0) if walk == "euler" else LEVEL
    assert least - 1e-6 <= min(judged) < least + 0.02
    assert 0.99 < max(judged) <= 0.997 + 1e-6


def test_the_published_margin_begins_at_8835() -> None:
    method = method_of(PhasedDMDConfig(), watch())
    part = method.draw_part(
        Sample(torch.zeros(1), level=LEVEL, anchor=torch.zeros(1)), fast_streams(1)
    )
    assert (part.side, part.high) == ("high", 0.997)
    assert part.low == pytest.approx(0.8835, abs=1e-4)


def test_in_the_low_phase_the_high_student_stays_and_samples_are_judged_on_both_sides() -> None:
    watched = watch()
    method = method_of(PhasedDMDConfig(phase="low"), watched)
    for step in range(16):
        method.generator_loss(batch_of(3, mean=1.0), streams_of_step(3, step))
        method.critic_loss(batch_of(3, mean=1.0), streams_of_step(3, step, "critic"))
    assert not any(call.grad for call in watched["generator", "high"].calls)
    assert any(call.grad for call in watched["generator", "low"].calls)
    assert asked(watched["generator", "low"]) == pytest.approx(SIGMAS[:1:-1])
    for role in ("critic", "teacher"):
        for side in ("high", "low"):
            judged = levels_of(watched[role, side].calls)
            assert judged
            assert all(side_of(level, 0.875) == side for level in judged)


@pytest.mark.parametrize(("above", "share"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5)])
def test_as_many_low_samples_are_judged_above_as_asked(above: float, share: float) -> None:
    method = method_of(PhasedDMDConfig(phase="low", above=above), watch())
    rng = fast_streams(1)
    parts = [method.draw_part(Sample(torch.zeros(1)), rng).side for _ in range(2000)]
    assert sum(side == "high" for side in parts) / 2000 == pytest.approx(share, abs=0.04)


def test_both_learn_in_turns_and_ranks_agree_on_whose_turn_it_is() -> None:
    watched = watch()
    method = method_of(PhasedDMDConfig(phase="both"), watched)
    turns = set()
    for step in range(24):
        asked = []
        for indices in ([0, 1], [2, 3]):
            for net in watched.values():
                net.calls.clear()
            rng = step_rng(
                0, "generator", step=step, first=0, indices=indices, device=torch.device("cpu")
            )
            method.generator_loss(batch_of(2, mean=1.0), rng)
            asked.append(
                [
                    (role, side, [call.grad for call in net.calls])
                    for (role, side), net in watched.items()
                    if net.calls
                ]
            )
        assert asked[0] == asked[1]
        (turn,) = {side for role, side, _ in asked[0] if role == "critic"}
        assert {side for role, side, _ in asked[0] if role == "teacher"} == {turn}
        grads = {side: grads for role, side, grads in asked[0] if role == "generator"}
        assert grads[turn][-1]
        assert sum(map(sum, grads.values())) == 1
        turns.add(turn)
    assert turns == {"high", "low"}


def test_a_weighted_error_is_no_larger_and_the_same_where_noise_is_little() -> None:
    watched = watch()
    plain, bounded = (
        method_of(PhasedDMDConfig(bounded_target=bound), watched) for bound in (False, True)
    )
    fake = bounded.noised_sample(batch_of(3, mean=1.0), streams_of_step(3))
    assert fake.level == LEVEL
    share = further_velocity(fake.x0, fake.noise, fake.sigma, fake.level)[1]
    assert float(share.max()) > 1.0
    batch = batch_of(3, mean=1.0)
    assert bounded.denoising_loss(fake, batch) < plain.denoising_loss(fake, batch)


BOTH_EXPERTS: dict[str, tuple[Side, ...]] = {
    "generator": ("high", "low"), "critic": ("high", "low"), "teacher": ("high", "low")
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "changed", "told"),
    [
        (PhasedDMDConfig(phase="low"), {"generator": ("low",)}, "needs the high expert of the gen"),
        (PhasedDMDConfig(phase="low"), {"critic": ("low",)}, "needs the high expert of the critic"),
        (PhasedDMDConfig(phase="both"), {"teacher": ("high",)}, "needs the low expert of the teac"),
        (
            PhasedDMDConfig(),
            {"generator": ("low",)},
            "loss.phase=high needs the high expert of the",
        ),
        (
            PhasedDMDConfig(),
            {"generator": ()},
            "loss.phase=high needs the high expert of the gener",
        ),
    ],
)
def test_experts_that_a_phase_needs_must_be_there(
    config: PhasedDMDConfig, changed: dict[str, tuple[Side, ...]], told: str
) -> None:
    assert list(config.expert_problems(ExpertLevels(0.875), BOTH_EXPERTS)) == []
    (problem,) = config.expert_problems(ExpertLevels(0.875), {**BOTH_EXPERTS, **changed})
    assert told in problem


def test_one_network_for_all_levels_is_refused_as_a_teacher() -> None:
    (problem,) = PhasedDMDConfig().expert_problems(None, {})
    assert "phased_dmd is for teachers of two experts" in problem


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (PhasedDMDConfig(margin=0.0), "loss.margin: must lie in (0, 1), got 0.0"),
        (PhasedDMDConfig(above=1.0), "loss.above: must lie in [0, 1), got 1.0"),
    ],
)
def test_impossible_settings_are_told(config: PhasedDMDConfig, told: str) -> None:
    assert told in "".join(config.problems())


@pytest.mark.parametrize(
    ("phase", "generator", "critic"),
    [
        ("high", ("high",), ("high",)),
        ("low", ("low",), ("high", "low")),
        ("both", ("high", "low"), ("high", "low")),
    ],
)
def test_each_phase_moves_its_own_experts(phase: Any, generator: Any, critic: Any) -> None:
    needs = PhasedDMD.needs(PhasedDMDConfig(phase=phase))
    assert needs.trained_sides == {"generator": generator, "critic": critic}
    assert needs.sampler == "few_step_euler"
    assert PhasedDMD.needs(PhasedDMDConfig(walk="renoise")).sampler == "few_step"
