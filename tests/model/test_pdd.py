"""Parallel decoding distillation: heads of a path, what they are fused to, and what they learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.base import Parts
from model.experts import ExpertLevels
from model.flow import step_sigmas, velocity_to_x0
from model.folders.heads import fused
from model.heads import OnPath, path_spans
from model.pdd import PDD, PDDConfig, grid_step
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Denoiser, Prediction
from model.wan.heads import BIAS, WEIGHT, HeadBank, Spans, declare_heads, levels_at, shares
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.build import SAMPLERS, Sampling
from pipeline.few_step import euler_steps
from pipeline.teacher import SamplingConfig, integrate
from tests.conftest import random_value
from tests.gaussian import Normals, Watched, fast_streams, streams_of_step
from utils.seeding import generator as keyed
from utils.weights import fill_weights

WanFactory = Callable[..., WanTransformer]

SHAPE = (16, 3, 4, 4)
SHIFT = 6.0
STEPS = [1000, 750, 500, 250]
GRID = 16


def conditioning(size: int, length: int = 12, width: int = 64) -> Conditioning:
    return Conditioning(torch.randn(size, length, width, generator=keyed("text")))


def noise(size: int, *key: int | str) -> Tensor:
    return torch.randn(size, *SHAPE, generator=keyed("noise", *key))


def with_heads(wan: WanTransformer, heads: int, values: dict[str, Tensor]) -> Denoiser:
    declare_heads(wan, heads, plain=False)
    fill_weights(wan, lambda name, shape: values[name].view(shape), [WEIGHT, BIAS])
    return WanDiffusionWrapper(wan)


def random_heads(wan: WanTransformer, heads: int) -> dict[str, Tensor]:
    """Heads that differ from each other by as much as they have in common."""
    head = wan.head.head
    return {
        name: value.detach() + random_value(name, torch.Size((heads, *value.shape)), seed=5)
        for name, value in ((WEIGHT, head.weight), (BIAS, head.bias))
    }


def copies(wan: WanTransformer, heads: int) -> dict[str, Tensor]:
    head = wan.head.head
    return {
        name: value.detach().expand(heads, *value.shape)
        for name, value in ((WEIGHT, head.weight), (BIAS, head.bias))
    }


# ---- heads


def test_shares_of_a_span_are_how_far_each_head_moves_the_noise_level() -> None:
    span = torch.tensor([0.25, 0.75], dtype=torch.float64)
    levels = [*step_sigmas([1000 * (8 - n) / 8 for n in range(8)], SHIFT), 0.0]
    moved = [a - b for a, b in pairwise(levels)]
    expected = [0.0] * 2 + [m / sum(moved[2:6]) for m in moved[2:6]] + [0.0] * 2
    torch.testing.assert_close(shares(span, 8, SHIFT), torch.tensor(expected).double())


def test_the_share_of_a_heads_own_step_is_exactly_one_and_of_no_step_zero() -> None:
    for heads in (3, 7, 48, 256):
        own = path_spans(torch.arange(heads), heads)
        assert torch.equal(shares(own, heads, SHIFT), torch.eye(heads).double())
        nothing = own[:, :1].expand(-1, 2)
        assert not shares(nothing, heads, SHIFT).any()


def test_a_fused_head_is_the_weighted_sum_of_its_heads() -> None:
    bank = HeadBank(GRID, 24, 6)
    fill_weights(bank, lambda name, shape: random_value(name, shape, seed=1))
    x = torch.randn(2, 5, 24, generator=keyed("tokens"))
    whole = torch.tensor([[0.25, 0.5], [0.5, 1.0]]).double()[:, None]
    with torch.no_grad():
        said = bank(x, Spans(whole, SHIFT))
        for row, (first, last) in enumerate([(4, 8), (8, 16)]):
            levels = levels_at(torch.arange(first, last + 1) / GRID, SHIFT)
            deltas = (levels[:-1] - levels[1:]).tolist()
            single = [x[row] @ bank.weight[i].T + bank.bias[i] for i in range(first, last)]
            total = sum(d * one for d, one in zip(deltas, single, strict=True)) / sum(deltas)
            torch.testing.assert_close(said[row], total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("calls", [1, 2, 4, 8])
def test_a_network_of_fused_heads_says_bit_for_bit_what_all_its_heads_say(
    calls: int, tiny_wan: WanFactory
) -> None:
    heads = random_heads(tiny_wan(), GRID)
    whole = with_heads(tiny_wan(), GRID, heads)
    served = {name: fused(value, calls, SHIFT) for name, value in heads.items()}
    served_net = with_heads(tiny_wan(), calls, served)
    levels = step_sigmas([1000 * (calls - n) / calls for n in range(calls)], SHIFT)
    with torch.no_grad():
        clips = [
            euler_steps(OnPath(net, levels, SHIFT), noise(2), conditioning(2), levels)
            for net in (whole, served_net)
        ]
    assert torch.equal(*clips)


def test_heads_that_are_fused_twice_are_those_fused_once(tiny_wan: WanFactory) -> None:
    value = random_heads(tiny_wan(), GRID)[WEIGHT]
    twice = fused(fused(value, 8, SHIFT), 2, SHIFT)
    torch.testing.assert_close(twice, fused(value, 2, SHIFT), rtol=1e-6, atol=1e-6)


def test_copies_of_the_teachers_head_in_all_steps_walk_the_teachers_euler_path(
    tiny_wan: WanFactory,
) -> None:
    teacher = WanDiffusionWrapper(tiny_wan())
    student = with_heads(tiny_wan(), GRID, copies(tiny_wan(), GRID))
    levels = step_sigmas([1000 * (GRID - n) / GRID for n in range(GRID)], SHIFT)
    sampler = SAMPLERS["path_euler"](student, Sampling(levels, shift=SHIFT))
    text = conditioning(1)
    many = SamplingConfig(GRID, cfg_scale=1.0, timestep_shift=SHIFT, solver="euler")
    with torch.no_grad():
        walked = euler_steps(OnPath(student, levels, SHIFT), noise(1), text, levels)
        expected = integrate(teacher, noise(1), text, text, many)
    assert sampler.network_evaluations(3) == GRID
    torch.testing.assert_close(walked, expected, rtol=1e-4, atol=1e-4)


def test_a_network_refuses_what_its_heads_cannot_say(tiny_wan: WanFactory) -> None:
    plain, x, text = WanDiffusionWrapper(tiny_wan()), noise(1), conditioning(1)
    many = with_heads(tiny_wan(), 4, copies(tiny_wan(), 4))
    spans = Spans(torch.tensor([[[0.0, 0.5]]]).double(), SHIFT)
    with pytest.raises(ValueError, match="this network has one"):
        plain(x, torch.ones(1, 1), text, context=Context(spans=spans))
    with pytest.raises(ValueError, match="ask for spans"):
        many(x, torch.ones(1, 1), text)


def test_a_skipped_block_is_as_if_it_were_not_there(tiny_wan: WanFactory) -> None:
    net, shorter, text = tiny_wan(), tiny_wan(), conditioning(1)
    shorter.blocks = nn.ModuleList(b for n, b in enumerate(shorter.blocks) if n != 1)
    sigma = torch.full((1, 1), 0.5)
    with torch.no_grad():
        skipped = WanDiffusionWrapper(net)(noise(1), sigma, text, context=Context(skips=(1,)))
        expected = WanDiffusionWrapper(shorter)(noise(1), sigma, text)
    assert torch.equal(skipped.velocity, expected.velocity)


# ---- the loss


def batch(size: int) -> Batch:
    return Batch(conditioning(size), conditioning(size), SHAPE)


def method(tiny_wan: WanFactory, config: PDDConfig) -> tuple[PDD, Watched, Watched]:
    heads = random_heads(tiny_wan(), config.grid)
    student = Watched(with_heads(tiny_wan(), config.grid, heads))
    teacher = Watched(WanDiffusionWrapper(tiny_wan(seed=1)))
    parts = Parts({"generator": student, "teacher": teacher}, shift=SHIFT)
    return PDD(config, parts), student, teacher


def test_the_teacher_is_asked_where_the_heads_before_lead(tiny_wan: WanFactory) -> None:
    config = PDDConfig(grid=12, calls=[3], cfg_scale=1.0)
    pdd, student, teacher = method(tiny_wan, config)
    pdd.generator_loss(batch(2), streams_of_step(2))
    levels = levels_at(torch.arange(13) / 12, SHIFT).float()
    assert [float(call.sigma[0]) for call in student.calls] == [float(levels[n]) for n in (0, 4, 8)]
    for asked, target in zip(student.calls, teacher.calls, strict=True):
        first = int((levels - asked.sigma[0]).abs().argmin())
        for row in range(2):
            x, step = asked.x[row : row + 1], int((levels - target.sigma[row]).abs().argmin())
            assert first <= step < first + 4
            for head in range(first, step):
                spans = Spans(torch.tensor([[[head / 12, (head + 1) / 12]]]).double(), SHIFT)
                said = student.net(
                    asked.x[row : row + 1],
                    asked.sigma[row : row + 1],
                    Conditioning(asked.conditioning.text[row : row + 1]),
                    context=replace(FULL_ATTENTION, spans=spans),
                )
                x = x + (levels[head + 1] - levels[head]) * said.velocity
            torch.testing.assert_close(target.x[row : row + 1], x, rtol=1e-5, atol=1e-5)


def test_a_call_begins_where_the_call_before_ends(tiny_wan: WanFactory) -> None:
    pdd, student, _ = method(tiny_wan, PDDConfig(grid=8, calls=[4], cfg_scale=1.0))
    pdd.generator_loss(batch(2), streams_of_step(2))
    levels = step_sigmas(STEPS, SHIFT)
    with torch.no_grad():
        for count in range(1, 4):
            path = OnPath(student.net, levels, SHIFT)
            walked = euler_steps(
                path, student.calls[0].x, conditioning(2), levels[:count], levels[count]
            )
            torch.testing.assert_close(student.calls[count].x, walked, rtol=1e-5, atol=1e-5)


def test_the_midpoint_is_where_half_a_grid_step_of_the_teacher_leads(tiny_wan: WanFactory) -> None:
    config = PDDConfig(grid=6, calls=[2], cfg_scale=1.0, solver="midpoint")
    pdd, _, teacher = method(tiny_wan, config)
    pdd.generator_loss(batch(1), streams_of_step(1))
    assert len(teacher.calls) == 4
    for begin, middle in (teacher.calls[:2], teacher.calls[2:]):
        with torch.no_grad():
            velocity = teacher.net(begin.x, begin.sigma, begin.conditioning).velocity
        expected = begin.x + (middle.sigma - begin.sigma) * velocity
        torch.testing.assert_close(middle.x, expected, rtol=1e-5, atol=1e-5)


def test_one_call_that_learns_has_a_gradient_and_those_before_it_none(tiny_wan: WanFactory) -> None:
    pdd, student, teacher = method(tiny_wan, PDDConfig(grid=8, calls=[4], learn="one"))
    ends = set()
    for step in range(12):
        student.calls.clear(), teacher.calls.clear()
        pdd.generator_loss(batch(1), streams_of_step(1, step))
        *before, last = student.calls
        assert last.grad and not any(call.grad for call in before)
        assert len(teacher.calls) == 1
        ends.add(len(student.calls))
    assert ends == {1, 2, 3, 4}


def test_the_negative_prompts_pass_alone_leaves_blocks_out(tiny_wan: WanFactory) -> None:
    config = PDDConfig(grid=4, calls=[1], cfg_scale=5.0, uncond_skips=[1])
    pdd, _, teacher = method(tiny_wan, config)
    pdd.generator_loss(batch(1), streams_of_step(1))
    assert [call.context.skips for call in teacher.calls] == [(), (1,)]


def test_a_sample_takes_part_as_if_it_were_alone(tiny_wan: WanFactory) -> None:
    pdd, _, _ = method(tiny_wan, PDDConfig(grid=8, calls=[2]))
    together = pdd.generator_loss(batch(2), streams_of_step(2)).loss
    alone = []
    for row in range(2):
        rng = streams_of_step(2)
        rng = replace(rng, samples=rng.samples.subset([row]), indices=[row])
        text = Conditioning(conditioning(2).text[row : row + 1])
        alone.append(pdd.generator_loss(Batch(text, text, SHAPE), rng).loss)
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0.0)


def test_every_grid_step_of_a_call_is_drawn() -> None:
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1.0 - 2.0**-24])
    assert grid_step(draws, 2, 4, 16).tolist() == [8, 8, 9, 11, 11]


# ---- a normal world: what affine heads reach


class AffineHeads(nn.Module):
    """A Denoiser of one element whose heads read that element itself, and say its velocity."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bank = HeadBank(heads, 1, 1)
        nn.init.zeros_(self.bank.weight)
        nn.init.zeros_(self.bank.bias)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """See model.types.Denoiser."""
        assert context.spans is not None
        said = self.bank(x.flatten(1)[:, :, None], context.spans)
        first, *others = (one.view_as(x) for one in said.unbind(-1))
        context.spans.said.extend(others)
        return Prediction(velocity_to_x0(x, first, sigma), first)


MEAN, STD, FINE = 0.7, 0.5, 8
WORLD = Normals(torch.tensor([[MEAN]]), torch.tensor([[[STD**2]]]))
NO_TEXT = Conditioning(torch.zeros(1, 1, 1))


def velocity_of_teacher(level: float) -> tuple[float, float]:
    """Slope and offset of the teacher's velocity at a noise level, both exact."""
    variance = (1 - level) ** 2 * STD**2 + level**2
    slope = (level - (1 - level) * STD**2) / variance
    return slope, -MEAN - slope * (1 - level) * MEAN


def solved(calls: int) -> tuple[AffineHeads, float, float]:
    """The heads in closed form; mean and std of the teacher's own FINE Euler steps."""
    net, levels = AffineHeads(FINE), levels_at(torch.arange(FINE + 1) / FINE, SHIFT).tolist()
    mean, std, slope, offset = 0.0, 1.0, 1.0, 0.0
    with torch.no_grad():
        for step in range(FINE):
            if step % (FINE // calls) == 0:
                slope, offset = 1.0, 0.0  # of this step's state in that of the call's begin
            a, b = velocity_of_teacher(levels[step])
            net.bank.weight[step], net.bank.bias[step] = a * slope, a * offset + b
            move = levels[step + 1] - levels[step]
            slope, offset = slope + move * a * slope, offset + move * (a * offset + b)
            mean, std = mean + move * (a * mean + b), std * abs(1.0 + move * a)
    return net, mean, std


def loss_of(net: nn.Module, calls: int, size: int, step: int) -> Tensor:
    config = PDDConfig(grid=FINE, calls=[calls], cfg_scale=1.0)
    pdd = PDD(config, Parts({"generator": net, "teacher": WORLD}, shift=SHIFT))
    text = Conditioning(torch.zeros(size, 1, 1))
    return pdd.generator_loss(Batch(text, text, (1, 1, 1, 1)), fast_streams(size, step)).loss


def served_moments(net: AffineHeads, calls: int) -> tuple[float, float]:
    """Mean and std of what `calls` Euler steps make of standard normal noise, in closed form."""
    levels = step_sigmas([1000 * (calls - n) / calls for n in range(calls)], SHIFT)
    ends = []
    for begin in (0.0, 1.0):
        x = torch.full((1, 1, 1, 1, 1), begin)
        with torch.no_grad():
            ends.append(float(euler_steps(OnPath(net, levels, SHIFT), x, NO_TEXT, levels)))
    return ends[0], abs(ends[1] - ends[0])


@pytest.mark.parametrize("calls", [1, 2, 4, 8])
def test_affine_heads_in_closed_form_have_no_loss_and_end_where_the_fine_path_ends(
    calls: int,
) -> None:
    net, mean, std = solved(calls)
    assert float(loss_of(net, calls, 4096, 0).detach()) < 1e-10
    assert served_moments(net, calls) == pytest.approx((mean, std), abs=1e-4)


def test_a_path_of_a_few_calls_is_not_that_of_as_few_teacher_steps() -> None:
    """So that the test above tells something: coarse steps end elsewhere."""
    levels = [*step_sigmas([1000, 500], SHIFT), 0.0]
    std = 1.0
    for level, following in pairwise(levels):
        std *= abs(1.0 + (following - level) * velocity_of_teacher(level)[0])
    assert abs(std - solved(2)[2]) > 0.05


@pytest.mark.parametrize("calls", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_affine_heads_learn_the_fine_path_of_a_normal_teacher(calls: int) -> None:
    net, (_, mean, std) = AffineHeads(FINE), solved(calls)
    optimizer, updates = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.9, 0.99)), 300
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for step in range(updates):
        optimizer.zero_grad()
        loss_of(net, calls, 64, step).backward()
        optimizer.step()
        falling.step()
    assert float(loss_of(net, calls, 4096, -1).detach()) < 1e-6
    assert served_moments(net, calls) == pytest.approx((mean, std), abs=1e-3)


# ---- settings


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PDDConfig(grid=0), "loss.grid: must be at least 1, got 0"),
        (
            PDDConfig(grid=256, calls=[3]),
            "loss.calls: must be different divisors of loss.grid=256, got [3]",
        ),
        (PDDConfig(calls=[]), "loss.calls: must be different divisors of loss.grid=256, got []"),
        (
            PDDConfig(calls=[4, 4]),
            "loss.calls: must be different divisors of loss.grid=256, got [4, 4]",
        ),
        (
            PDDConfig(uncond_skips=[-1]),
            "loss.uncond_skips: must be blocks, counted from 0, got [-1]",
        ),
        (
            PDDConfig(uncond_skips=[1], cfg_scale=1.0),
            "loss.uncond_skips: has no effect with loss.cfg_scale=1, without guidance",
        ),
        (PDDConfig(head_rate=0.0), "loss.head_rate: must be positive and finite, got 0.0"),
        (PDDConfig(cfg_scale=float("nan")), "loss.cfg_scale: must be finite, got nan"),
    ],
)
def test_impossible_settings_are_named(config: PDDConfig, said: str) -> None:
    assert list(config.problems()) == [said]


def test_only_equal_steps_that_were_trained_can_be_served() -> None:
    config = PDDConfig(calls=[2, 4])
    assert not list(config.list_problems([1000, 500]))
    for steps in ([1000], [1000, 750, 500, 125], [1000, 875, 750, 625, 500, 375, 250, 125]):
        (said,) = config.list_problems(steps)
        assert said == (
            "denoising_step_list: a path is walked in equal steps, as many as one of "
            f"loss.calls=[2, 4]: [1000, 500] or [1000, 750, 500, 250]; got {steps}"
        )


def test_neither_causal_generators_nor_two_experts_have_a_path_to_walk() -> None:
    config: Any = PDDConfig()
    assert not list(config.run_problems(steps=1, causal=False))
    (said,) = config.run_problems(steps=1, causal=True)
    assert said.startswith("generator_type: causal is not for distribution_loss: pdd")
    assert not list(config.expert_problems(None, {"generator": ()}))
    experts = ExpertLevels(0.875, ("high", "low"))
    for problems in (
        config.expert_problems(experts, {"generator": ()}),
        config.expert_problems(None, {"generator": ("high",)}),
    ):
        (said,) = problems
        assert said.startswith("distribution_loss: pdd is for models of one network")
