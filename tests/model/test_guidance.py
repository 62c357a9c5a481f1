"""Classifier-free guidance: its formula, and how many forward passes it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.guidance import concatenate, guided_velocity
from model.types import Conditioning, Context
from model.wan.cache import KVCache
from tests.gaussian import SHAPE, Exact, saying, streams

X = streams(3).randn(SHAPE)
SIGMA = torch.tensor([[0.3], [0.6], [0.9]])


def guided(net: Exact, cfg_scale: float) -> Tensor:
    return guided_velocity(net, X, SIGMA, saying(2.0, 3), saying(-1.0, 3), cfg_scale=cfg_scale)


def test_without_guidance_the_network_sees_the_batch_once() -> None:
    net = Exact()
    guided(net, 1.0)
    assert [size for size, _ in net.calls] == [3]


def test_with_guidance_the_network_sees_both_halves_in_one_forward() -> None:
    net = Exact()
    guided(net, 4.0)
    assert [size for size, _ in net.calls] == [6]


def test_one_by_one_the_network_sees_the_batch_twice_and_the_result_is_the_same() -> None:
    net = Exact()
    found = guided_velocity(
        net, X, SIGMA, saying(2.0, 3), saying(-1.0, 3), cfg_scale=4.0, batched=False
    )
    assert [size for size, _ in net.calls] == [3, 3]
    torch.testing.assert_close(found, guided(Exact(), 4.0))


def test_one_by_one_a_cache_is_refused_that_holds_the_past_of_both() -> None:
    context, halves = Context(cache=KVCache()), (saying(2.0, 3), saying(-1.0, 3))
    with pytest.raises(AssertionError, match="batch them"):
        guided_velocity(Exact(), X, SIGMA, *halves, cfg_scale=4.0, context=context, batched=False)


def test_scale_one_is_the_conditional_prediction() -> None:
    assert torch.equal(guided(Exact(), 1.0), Exact()(X, SIGMA, saying(2.0, 3)).velocity)


def test_scale_zero_is_the_unconditional_prediction() -> None:
    expected = Exact()(X, SIGMA, saying(-1.0, 3)).velocity
    torch.testing.assert_close(guided(Exact(), 0.0), expected)


@pytest.mark.parametrize("cfg_scale", [0.5, 2.0, 6.0])
def test_guidance_follows_the_standard_formula(cfg_scale: float) -> None:
    cond = Exact()(X, SIGMA, saying(2.0, 3)).velocity
    uncond = Exact()(X, SIGMA, saying(-1.0, 3)).velocity
    torch.testing.assert_close(guided(Exact(), cfg_scale), uncond + cfg_scale * (cond - uncond))


def test_the_conditioned_half_comes_first() -> None:
    both = concatenate(saying(2.0, 1), saying(-1.0, 1))
    assert both.text.flatten().tolist() == [2.0, -1.0]


def test_optional_parts_are_doubled_too() -> None:
    image = Conditioning(torch.zeros(1, 1, 1), torch.ones(1, 2, 3), torch.ones(1, 20, 1, 1, 1))
    both = concatenate(image, image)
    assert both.clip is not None
    assert both.first_frame is not None
    assert (len(both.clip), len(both.first_frame)) == (2, 2)


def test_conditionings_with_different_parts_do_not_mix() -> None:
    image = Conditioning(torch.zeros(1, 1, 1), clip=torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="only one of the two conditionings has 'clip'"):
        concatenate(image, saying(0.0, 1))
