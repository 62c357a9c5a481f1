"""Blocks that enter the cache by their last step: what is kept, what is run, what learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.flow import constant_sigma
from model.types import Context
from model.wan.cache import KeyValue, KVCache
from model.wan.transformer import WanTransformer
from pipeline import blocks
from pipeline.blocks import CausalConfig
from pipeline.causal import CausalInferencePipeline
from tests.gaussian import Said, Watched
from tests.pipeline.test_causal import (
    BLOCKS,
    FRAMES,
    MODES,
    SIGMAS,
    SIZE,
    SPANS,
    Joined,
    batch,
    infer,
    leaves,
    roll,
    step_with,
    streams,
    text,
    wan,
)

WanFactory = Callable[..., WanTransformer]

LAST = replace(BLOCKS, remember="last_step")
NOISY = {
    name: replace(config, remember="last_step", context_noise=0.0) for name, config in MODES.items()
}
every_mode = pytest.mark.parametrize("config", NOISY.values(), ids=NOISY.keys())


@dataclass(frozen=True)
class Open(CausalConfig):
    """A layout that shows its caches."""

    made: list[KVCache] = field(default_factory=list)

    def new_cache(self, frames: int) -> KVCache:
        """See CausalLayout."""
        self.made.append(super().new_cache(frames))
        return self.made[-1]


def kept(cache: KVCache) -> list[KeyValue]:
    """Keys and values of all frames in a cache, per layer."""
    with torch.enable_grad():
        layers = cache.past(torch.arange(FRAMES, FRAMES + 1)).layers
    return [joined(pieces) for pieces in layers]


def joined(pieces: Sequence[KeyValue]) -> KeyValue:
    """Pieces of one layer, one behind the other."""
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    return keys, values


class Recording:
    """A denoiser that asks for the keys of every pass, and says what the cache was given."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.passes: list[tuple[int, float, list[KeyValue]]] = []

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Any, *, context: Context) -> Any:
        keys: list[KeyValue] = [] if context.keys is None else context.keys
        made = self.net(x, sigma, conditioning, context=replace(context, keys=keys))
        assert context.frame_index is not None
        self.passes.append((int(context.frame_index[0]), float(sigma[0, 0]), keys))
        return made


def open_layout(config: CausalConfig) -> Open:
    return Open(**{name: getattr(config, name) for name in CausalConfig.__dataclass_fields__})


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("how", ["stream", "rollout", "rollout that learns"])
def test_the_cache_is_the_last_steps_keys_bit_for_bit(
    tiny_wan: WanFactory, how: str, relative: bool
) -> None:
    config = open_layout(replace(LAST, last_step_only=True, relative_positions=relative))
    net = Recording(wan(tiny_wan))
    if how == "stream":
        infer(net, config)
    else:
        roll(net, config, grad=how.endswith("learns"))
    last = {first: keys for first, _, keys in net.passes}
    expected = [joined(pairs) for pairs in zip(last[0], last[1], strict=True)]
    found = kept(config.made[0])
    assert len(found) == len(expected) > 0
    for layer, other in zip(found, expected, strict=True):
        assert torch.equal(layer[0], other[0]) and torch.equal(layer[1], other[1])


def test_each_block_takes_one_pass_less() -> None:
    for make in (infer, lambda net, config: roll(net, replace(config, last_step_only=True))):
        counts = []
        for config in (BLOCKS, LAST):
            net = Watched(Said())
            make(net, config)
            counts.append(len(net.calls))
        assert counts == [3 * 3 + 2, 3 * 3]


def test_passes_are_counted_right() -> None:
    for config, passes in ((BLOCKS, 11), (LAST, 9)):
        pipeline = CausalInferencePipeline(Said(), SIGMAS, config)
        assert pipeline.network_evaluations(FRAMES) == passes
        assert pipeline.steps(FRAMES) == 9


@every_mode
@pytest.mark.parametrize("exit_step", range(3))
def test_a_rollout_holds_what_inference_holds_at_its_exit(
    tiny_wan: WanFactory, config: CausalConfig, exit_step: int
) -> None:
    net = wan(tiny_wan)
    made = roll(net, config, step=step_with(exit_step), grad=False).x0
    assert torch.equal(made, infer(net, config, SIGMAS[: exit_step + 1]))


@pytest.mark.parametrize("kv_gradient", ["detach", "straight_through"])
def test_a_gradient_changes_no_sample(tiny_wan: WanFactory, kv_gradient: Any) -> None:
    net, config = wan(tiny_wan), replace(LAST, kv_gradient=kv_gradient)
    with_gradient, without = (roll(net, config, grad=grad).x0 for grad in (True, False))
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient, without, atol=1e-5, rtol=0.0)


def test_a_given_block_is_remembered_by_a_pass_over_it() -> None:
    net = Watched(Said())
    roll(net, replace(LAST, given_first_frame=True, last_step_only=True), grad=False)
    commits = [
        (int(call.context.frame_index[0]), float(call.sigma[0, 0]))  # type: ignore[index]
        for call in net.calls
        if call.context.commit
    ]
    assert commits == [(0, 0.0), (1, 0.5)]
    x0 = batch().x0
    assert x0 is not None and torch.equal(net.calls[0].x, x0[:, :, :1])


def by_hand(net: Any, *, whole: bool) -> Tensor:
    """One step per block on the keys of the steps before; `whole`: gradients flow through them."""
    cache, rng, parts = Joined(), streams(), []
    for first, end in SPANS:
        index, keys = torch.arange(first, end), []
        x = rng.randn((16, end - first, 4, 4))
        context = Context(cache=cache, frame_index=index, keys=keys)
        parts.append(net(x, constant_sigma(1.0, x), text(1), context=context).x0)
        cache.commit(index, keys if whole else [(k.detach(), v.detach()) for k, v in keys])
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("kv_gradient", ["detach", "straight_through"])
def test_the_gradient_is_that_of_steps_by_hand_and_straight_through_the_whole_one(
    tiny_wan: WanFactory, kv_gradient: Any
) -> None:
    net = wan(tiny_wan)
    made = roll(net, replace(LAST, kv_gradient=kv_gradient), [1.0]).x0
    explicit = by_hand(net, whole=kv_gradient == "straight_through")
    torch.testing.assert_close(made, explicit, atol=1e-5, rtol=0.0)
    found, expected = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x0.square().sum(), net.parameters())])
        for x0 in (made, explicit)
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_blocks_learn_apart_as_when_pasts_are_clean(tiny_wan: WanFactory) -> None:
    rng = leaves()
    x0 = roll(wan(tiny_wan), LAST, [1.0], samples=rng).x0
    found = torch.autograd.grad(x0[:, :, 3:].square().sum(), rng.drawn, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in found] == [False, False, True]


def test_nothing_is_remembered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Sequence[KeyValue]] = []
    monkeypatch.setattr(blocks, "remember", lambda *_: written.append([]))
    net = Watched(Said())
    infer(net, LAST)
    assert not written
    assert [call.context.commit for call in net.calls] == [False, False, True] * 2 + [False] * 3
    assert len(net.calls[0].x) == SIZE
