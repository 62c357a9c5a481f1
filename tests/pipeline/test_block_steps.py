"""Steps of the first block and of all later ones: in rollouts, in streams, in what is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.types import Denoiser
from model.wan.transformer import WanTransformer
from pipeline.blocks import CausalConfig
from pipeline.build import Sampling, few_step_sampler
from pipeline.data import DataRollout
from pipeline.protocol import sample
from tests.gaussian import Said, Watched
from tests.pipeline.test_causal import (
    BLOCKS,
    FRAMES,
    SHAPE,
    SIZE,
    batch,
    infer,
    roll,
    streams,
    streams_of_step,
    text,
    wan,
)

FIRST, LATER = [1.0, 0.9, 0.7, 0.4], [1.0, 0.6]
FRAMEWISE = CausalConfig(num_frame_per_block=1)
APART = replace(BLOCKS, same_step_across_blocks=False)
LAST = replace(BLOCKS, last_step_only=True)


def levels(net: Watched) -> list[list[float]]:
    """The noise levels of each block's steps, without the passes that remember."""
    found: dict[int, list[float]] = {}
    for call in net.calls:
        assert call.context.frame_index is not None
        if not call.context.commit:
            first = int(call.context.frame_index[0])
            found.setdefault(first, []).append(round(float(call.sigma[0, 0]), 4))
    return list(found.values())


def rolled(config: CausalConfig, step: int) -> list[list[float]]:
    net = Watched(Said())
    roll(net, config, LATER, first=FIRST, step=step)
    return levels(net)


@pytest.mark.parametrize("config", [BLOCKS, FRAMEWISE], ids=["blocks", "frames"])
def test_a_stream_makes_its_first_block_in_its_own_steps(config: CausalConfig) -> None:
    net = Watched(Said())
    infer(net, config, LATER, first=FIRST)
    blocks = len(config.blocks(FRAMES))
    assert levels(net) == [FIRST, *[LATER] * (blocks - 1)]


@pytest.mark.parametrize("config", [LAST, replace(FRAMEWISE, last_step_only=True)])
def test_a_rollout_holds_what_a_stream_holds(
    tiny_wan: Callable[..., WanTransformer], config: CausalConfig
) -> None:
    net = wan(tiny_wan)
    made = roll(net, config, LATER, first=FIRST).x0
    assert torch.equal(made, infer(net, config, LATER, first=FIRST))


def test_each_block_exits_at_a_step_of_its_own_list() -> None:
    found = [rolled(APART, step) for step in range(60)]
    assert {tuple(blocks[0]) for blocks in found} == {tuple(FIRST[:n]) for n in (1, 2, 3, 4)}
    for block in (1, 2):
        assert {tuple(blocks[block]) for blocks in found} == {(1.0,), (1.0, 0.6)}


def test_later_blocks_exit_together_and_the_first_by_itself() -> None:
    found = [rolled(BLOCKS, step) for step in range(60)]
    assert all(blocks[1] == blocks[2] for blocks in found)
    assert {(len(blocks[0]), len(blocks[1])) for blocks in found} == {
        (first, later) for first in (1, 2, 3, 4) for later in (1, 2)
    }


def test_exits_follow_from_the_step_and_not_from_the_samples() -> None:
    other = torch.Generator().manual_seed(5)
    for step in range(5):
        net = Watched(Said())
        samples = replace(streams(), generators=[other] * SIZE)
        roll(net, APART, LATER, first=FIRST, step=step, samples=samples)
        assert levels(net) == rolled(APART, step)


def test_without_a_list_of_its_own_the_first_block_draws_as_before() -> None:
    for config in (BLOCKS, APART):
        for step in range(10):
            net, same = Watched(Said()), Watched(Said())
            roll(net, config, LATER, step=step)
            draws = torch.Generator().manual_seed(0)
            draws.set_state(streams_of_step(step).shared.get_state())
            count = 1 if config is BLOCKS else 3
            drawn = torch.randint(2, (count,), generator=draws).tolist()
            roll(same, config, LATER, step=step)
            assert [len(block) - 1 for block in levels(net)] == (drawn * 3)[:3]


def test_a_given_first_block_leaves_only_later_ones() -> None:
    net, x0 = Watched(Said()), batch().x0
    assert x0 is not None
    infer(net, LAST, LATER, first=FIRST, initial=x0[:, :, :1])
    assert levels(net) == [LATER, LATER]


@pytest.mark.parametrize("initial", [None, 1])
@pytest.mark.parametrize("config", [BLOCKS, FRAMEWISE], ids=["blocks", "frames"])
def test_what_is_run_is_what_is_counted(config: CausalConfig, initial: int | None) -> None:
    net, told = Watched(Said()), []
    pipeline = few_step_sampler(net, Sampling(LATER, config, first_sigmas=FIRST))
    given = None if initial is None else torch.zeros(SIZE, 16, initial, 4, 4)
    sample(
        pipeline, text(1), text(2), SHAPE, streams(), initial=given,
        on_step=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    steps = sum(len(block) for block in levels(net))
    assert told == [(done, steps) for done in range(1, steps + 1)]
    if initial is None:
        assert pipeline.steps(FRAMES) == steps
        assert pipeline.network_evaluations(FRAMES) == len(net.calls)


def noised_levels(net: Denoiser, first: list[float] | None) -> Tensor:
    """What a rollout from real videos draws, [many, F]."""
    watched = Watched(net)
    rollout = DataRollout(LATER, BLOCKS, teacher_forcing=False, first_sigmas=first)
    for step in range(30):
        samples = streams() if step == 0 else replace(streams(), generators=[
            torch.Generator().manual_seed(100 * step + i) for i in range(SIZE)
        ])  # fmt: skip
        rollout(watched, batch(), streams_of_step(step, samples), grad=False)
    return torch.cat([call.sigma for call in watched.calls])


def test_real_videos_are_noised_to_levels_of_each_blocks_own_list() -> None:
    drawn = noised_levels(Said(), FIRST)
    assert drawn[:, 0].unique().tolist() == pytest.approx(sorted(FIRST))
    assert drawn[:, 1:].unique().tolist() == pytest.approx(sorted(LATER))
    assert torch.equal(drawn[:, 1:], noised_levels(Said(), None)[:, 1:])
