"""Two experts behind one Denoiser: whose pass it is, and what each sees of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.experts import ExpertPair, side_of
from model.flow import constant_sigma
from model.folders.loading import blocks_of
from model.types import FULL_ATTENTION, Conditioning, Context, Prediction
from model.wan.cache import KVCache
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.few_step import remembering
from tests.gaussian import Affine, saying
from tests.pretend import PRETENDED, OnDevice, pretended_device
from utils.recompute import recompute_blocks

WanFactory = Callable[..., WanTransformer]

X = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TEXT = Conditioning(torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1)))


class Noted(nn.Module):
    """A denoiser that keeps the contexts of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)
        self.contexts: list[Context] = []

    def forward(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *, context: Context
    ) -> Prediction:
        del sigma, conditioning
        self.contexts.append(context)
        return Prediction(x, x)


def noted(boundary: float = 0.875) -> tuple[ExpertPair, Noted, Noted]:
    high, low = Noted(), Noted()
    return ExpertPair(high, low, boundary), high, low


def pair_of(tiny_wan: WanFactory) -> ExpertPair:
    high, low = (WanDiffusionWrapper(tiny_wan(seed=seed)) for seed in (1, 2))
    return ExpertPair(high, low, 0.875)


def asked(*levels: Sequence[float], context: Context = FULL_ATTENTION) -> str:
    """Which expert a batch goes to, a row of levels per sample."""
    pair, high, low = noted()
    pair(
        torch.zeros(len(levels), 1, 3, 1, 1), torch.tensor(levels), saying(0.0, 1), context=context
    )
    assert len(high.contexts) + len(low.contexts) == 1
    return "high" if high.contexts else "low"


@pytest.mark.parametrize(
    ("sigma", "side"), [(1.0, "high"), (0.9, "high"), (0.875, "high"), (0.8749, "low"), (0, "low")]
)
def test_the_boundary_itself_is_the_high_experts(sigma: float, side: str) -> None:
    assert asked([sigma], [sigma]) == side
    assert asked([0.5], context=Context(level=sigma)) == side


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.915])
def test_a_level_that_is_the_boundary_in_fp32_is_on_it_wherever_it_is_known(
    boundary: float,
) -> None:
    rounded = float(torch.tensor(boundary))
    below = float(torch.tensor(boundary).nextafter(torch.tensor(0.0)))
    assert [side_of(s, boundary) for s in (boundary, rounded, below)] == ["high", "high", "low"]
    pair, _, _ = noted(boundary)
    for level, side in ((rounded, "high"), (below, "low")):
        assert pair.side(torch.tensor([[level]]), FULL_ATTENTION) == side


def test_a_sample_of_several_levels_is_on_the_side_of_its_largest_given_frames_being_at_zero() -> (
    None
):
    assert asked([0.0, 0.9, 0.9], [0.0, 0.95, 0.2]) == "high"
    assert asked([0.0, 0.3, 0.8]) == "low"
    assert asked([0.0, 0.0, 0.0]) == "low"


def test_a_batch_on_both_sides_is_refused_with_its_levels() -> None:
    told = "levels 0.9, 0.5 lie on both sides of the experts' boundary 0.875; draw one expert per"
    with pytest.raises(ValueError, match=told):
        asked([0.9], [0.5])


def test_a_side_that_is_asked_for_is_taken_whatever_the_level() -> None:
    assert asked([0.5], [0.9], context=Context(side="high")) == "high"
    assert asked([1.0], context=Context(side="low", level=1.0)) == "low"


def test_all_of_a_context_but_its_cache_is_handed_on() -> None:
    pair, high, _ = noted()
    context = Context(frame_index=torch.arange(3), level=0.9, keys=[], cache=KVCache())
    pair(X, constant_sigma(0.9, X), TEXT, context=context)
    (given,) = high.contexts
    assert vars(replace(given, cache=None)) == vars(replace(context, cache=None))


def test_each_expert_has_a_cache_of_its_own_for_the_same_videos() -> None:
    pair, high, low = noted()
    context = remembering(FULL_ATTENTION)
    for level in (1.0, 0.9, 0.5, 0.2):
        pair(X, constant_sigma(level, X), TEXT, context=replace(context, level=level))
    caches = [[given.cache for given in one.contexts] for one in (high, low)]
    assert caches[0][0] is caches[0][1]
    assert caches[1][0] is caches[1][1]
    assert caches[0][0] is not caches[1][0]
    assert context.cache not in (caches[0][0], caches[1][0])


@torch.no_grad()
def test_what_is_kept_of_the_text_is_each_experts_own(tiny_wan: WanFactory) -> None:
    pair = pair_of(tiny_wan)
    alone = [pair.expert("high"), pair.expert("low")]
    context = remembering(FULL_ATTENTION)
    for level, net in ((1.0, alone[0]), (0.5, alone[1]), (0.9, alone[0]), (0.25, alone[1])):
        sigma = constant_sigma(level, X)
        found = pair(X, sigma, TEXT, context=replace(context, level=level))
        assert torch.equal(found.velocity, net(X, sigma, TEXT).velocity)


def test_a_past_is_refused() -> None:
    pair, high, _ = noted()
    with pytest.raises(ValueError, match="two experts make whole videos"):
        pair(X, constant_sigma(0.9, X), TEXT, context=Context(cache=KVCache(), commit=True))
    assert not high.contexts


def test_weights_have_one_name_each_that_begins_with_the_side(tiny_wan: WanFactory) -> None:
    high, low = (WanDiffusionWrapper(tiny_wan(seed=seed)) for seed in (1, 2))
    pair = ExpertPair(high, low, 0.875)
    names = [f"{side}.{name}" for side in ("high", "low") for name in high.model.state_dict()]
    assert list(pair.model.state_dict()) == names
    assert list(pair.state_dict()) == [f"model.{name}" for name in names]
    assert pair.model["low"] is low.model


def test_a_pass_gives_the_other_expert_no_gradient(tiny_wan: WanFactory) -> None:
    pair = pair_of(tiny_wan)
    pair(X, constant_sigma(0.5, X), TEXT).x0.square().mean().backward()
    assert all(p.grad is None for p in pair.model["high"].parameters())
    assert all(p.grad is not None for p in pair.model["low"].parameters())


def test_a_copy_asks_its_own_weights(tiny_wan: WanFactory) -> None:
    pair = pair_of(tiny_wan)
    twin = copy.deepcopy(pair)
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.zero_()
        assert pair(X, constant_sigma(0.5, X), TEXT).velocity.abs().max() == 0.0
        assert twin(X, constant_sigma(0.5, X), TEXT).velocity.abs().max() > 0.0


@pytest.mark.parametrize("boundary", [0.0, 1.0, 875.0])
def test_a_boundary_is_a_noise_level_that_leaves_both_something(boundary: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got"):
        noted(boundary)


def test_weights_outside_of_an_experts_model_are_refused() -> None:
    with pytest.raises(AttributeError, match="model"):
        ExpertPair(Affine(), Affine(), 0.5)


def test_experts_that_take_turns_say_the_same_and_only_the_one_at_hand_is_on_the_device(
    tiny_wan: WanFactory,
) -> None:
    pair, twin = pair_of(tiny_wan), pair_of(tiny_wan)
    with pretended_device(), torch.no_grad():
        pair.requires_grad_(False)
        pair.take_turns(PRETENDED)
        x, text = X.to(PRETENDED), Conditioning(TEXT.text.to(PRETENDED))
        for level, side in ((1.0, "high"), (0.9, "high"), (0.5, "low"), (0.95, "high")):
            found = pair(
                x, constant_sigma(level, X).to(PRETENDED), text, context=Context(level=level)
            )
            expected = twin(X, constant_sigma(level, X), TEXT, context=Context(level=level))
            torch.testing.assert_close(found.velocity.cpu(), expected.velocity)
            there = {
                name: {isinstance(weight, OnDevice) for weight in net.parameters()}
                for name, net in pair.model.items()
            }
            assert there == {name: {name == side} for name in ("high", "low")}


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_gradient_brings_an_expert_back_whose_turn_is_over(
    tiny_wan: WanFactory, recomputed: bool
) -> None:
    pair, twin = pair_of(tiny_wan), pair_of(tiny_wan)
    if recomputed:
        recompute_blocks(blocks_of(pair.model["low"]))
    pair.requires_grad_(False)
    with pretended_device():
        pair.take_turns(PRETENDED)
        text, sigma = Conditioning(TEXT.text.to(PRETENDED)), constant_sigma(0.5, X)
        x, y = X.clone().requires_grad_(True), X.clone().requires_grad_(True)
        loss = pair(x.to(PRETENDED), sigma.to(PRETENDED), text).x0.square().mean()
        with torch.no_grad():
            pair(x.to(PRETENDED), constant_sigma(1.0, X).to(PRETENDED), text)
        assert {isinstance(weight, OnDevice) for weight in pair.model["low"].parameters()} == {
            False
        }
        loss.backward()
        twin(y, sigma, TEXT).x0.square().mean().backward()
        torch.testing.assert_close(x.grad, y.grad)
        assert {isinstance(weight, OnDevice) for weight in pair.model["low"].parameters()} == {True}
