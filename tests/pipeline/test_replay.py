"""Rollouts made without gradient that learn afterwards: block by block, or in one parallel pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.types import Context, Prediction
from model.wan.cache import KeyValue
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.blocks import CausalConfig
from pipeline.self_forcing import SelfForcingTrainingPipeline
from tests.gaussian import Said, Watched
from tests.memory import Live
from tests.pipeline.test_causal import (
    BLOCKS,
    SIGMAS,
    SPANS,
    Joined,
    batch,
    roll,
    streams_of_step,
    text,
    wan,
)
from utils.recompute import recompute_blocks

WanFactory = Callable[..., WanTransformer]

REPLAYED = replace(BLOCKS, kv_gradient="replayed")
PARALLEL = replace(BLOCKS, kv_gradient="parallel")
TWO = CausalConfig(num_frame_per_block=2, kv_gradient="parallel")  # of 4 frames
MODES = {
    "plain": BLOCKS,
    "exits apart": replace(BLOCKS, same_step_across_blocks=False),
    "context noise": replace(BLOCKS, context_noise=100.0),
    "last step remembered": replace(BLOCKS, remember="last_step"),
    "window and sink": replace(BLOCKS, local_attn_size=3, sink_size=1),
    "relative": replace(BLOCKS, local_attn_size=5, relative_positions=True),
    "given first frame": replace(BLOCKS, given_first_frame=True),
    "noisy, given": replace(BLOCKS, given_first_frame=True, remember="last_step"),
    "some learn": replace(BLOCKS, gradient_frames=2),
}
every_mode = pytest.mark.parametrize("config", MODES.values(), ids=MODES.keys())


def gradients(net: Any, loss: Tensor) -> Tensor:
    """All of a network's gradients of `loss`, as `backward()` leaves them."""
    net.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in net.parameters()]
    )


# ---- values ----


@every_mode
@pytest.mark.parametrize("kv_gradient", ["replayed", "parallel"])
def test_what_learns_later_holds_what_the_rollout_made(
    tiny_wan: WanFactory, config: CausalConfig, kv_gradient: Any
) -> None:
    net, config = wan(tiny_wan), replace(config, kv_gradient=kv_gradient)
    for step in range(3):
        made, plain = (roll(net, config, grad=grad, step=step) for grad in (True, False))
        assert made.x0.requires_grad and not plain.x0.requires_grad
        assert made.given_frames == plain.given_frames
        torch.testing.assert_close(made.x0, plain.x0, atol=2e-5, rtol=0.0)


# ---- replay ----


@every_mode
def test_replay_has_the_gradient_of_detached_pasts(
    tiny_wan: WanFactory, config: CausalConfig
) -> None:
    net = wan(tiny_wan)
    found, expected = (
        gradients(net, roll(net, replace(config, kv_gradient=kind), step=1).x0.square().mean())
        for kind in ("replayed", "detach")
    )
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_replay_makes_each_block_that_learns_once_more_in_the_backward_pass(
    tiny_wan: WanFactory,
) -> None:
    net = Watched(wan(tiny_wan))
    x0 = roll(net, replace(REPLAYED, gradient_frames=4), [1.0]).x0
    assert not any(call.grad for call in net.calls)
    before = len(net.calls)
    x0.square().mean().backward()
    again = net.calls[before:]
    assert all(call.grad for call in again)
    assert [int(call.context.frame_index[0]) for call in again] == [1, 3]  # type: ignore[index]


@dataclass(eq=False)
class Peak:
    """A denoiser that reads, at the end of each pass, how many bytes are held."""

    net: Any
    live: Live
    most: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        made: Prediction = self.net(*args, **kwargs)
        self.most = max(self.most, self.live.bytes())
        return made


def peak(model: WanTransformer, blocks: int, kv_gradient: Any) -> int:
    """The most bytes held in a rollout of so many blocks and its backward pass."""
    config = CausalConfig(1, last_step_only=True, kv_gradient=kv_gradient)
    pipeline = SelfForcingTrainingPipeline([1.0], config)
    net = WanDiffusionWrapper(model)
    gradients(net, sum_of(net))  # gradients are there before
    with Live() as live:
        watched = Peak(net, live)
        x0 = pipeline(watched, batch((16, blocks, 4, 4)), streams_of_step(), grad=True).x0
        x0.square().mean().backward()
    return watched.most


def sum_of(net: nn.Module) -> Tensor:
    """A loss of all weights."""
    return torch.stack([p.square().sum() for p in net.parameters()]).sum()


def test_replay_holds_the_activations_of_one_block(tiny_wan: WanFactory) -> None:
    """Each further block costs its keys and latents alone: an eighth of its activations."""
    model = tiny_wan()
    few, many = 2, 6
    held = {
        kind: (peak(model, many, kind) - peak(model, few, kind)) / (many - few)
        for kind in ("detach", "replayed")
    }
    assert held["replayed"] < held["detach"] / 8


# ---- self-gradient forcing ----


def recorded(net: Any, config: CausalConfig, sigmas: Sequence[float]) -> list[Any]:
    """What each block of a rollout was made of last, and what was remembered of it."""
    watched = Watched(net)
    roll(watched, config, sigmas, grad=False)
    return watched.calls


def two_blocks_by_hand(net: Any, inputs: list[Any]) -> Tensor:
    """Two blocks of recorded inputs, the second on keys that the first one's x0 gives, all live.

    inputs: the exit pass of block 0, the pass that remembered it, the exit pass of block 1.
    """
    exit_0, clean_0, exit_1 = inputs
    keys: list[KeyValue] = []
    x0 = net(exit_0.x, exit_0.sigma, text(1), context=Context(frame_index=torch.arange(2))).x0
    net(clean_0.x, clean_0.sigma, text(1), context=Context(frame_index=torch.arange(2), keys=keys))
    cache = Joined()
    cache.commit(torch.arange(2), keys)
    context = Context(cache=cache, frame_index=torch.arange(2, 4))
    later = net(exit_1.x, exit_1.sigma, text(1), context=context).x0
    return torch.cat([x0, later], dim=2)


def rolled_two(net: Any, config: CausalConfig, sigmas: Sequence[float], *, grad: bool) -> Tensor:
    pipeline = SelfForcingTrainingPipeline(sigmas, config)
    return pipeline(net, batch((16, 4, 4, 4)), streams_of_step(), grad=grad).x0


def exit_passes(net: Any, config: CausalConfig, sigmas: Sequence[float]) -> list[Any]:
    """The exit pass of block 0, the pass that remembers it, the exit pass of block 1."""
    watched = Watched(net)
    rolled_two(watched, replace(config, last_step_only=True), sigmas, grad=False)
    steps = len(sigmas)
    return [watched.calls[i] for i in (steps - 1, steps, 2 * steps)]


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.6]])
@pytest.mark.parametrize("context_noise", [0.0, 100.0])
def test_the_gradient_is_that_of_full_back_propagation_through_two_recorded_blocks(
    tiny_wan: WanFactory, sigmas: list[float], context_noise: float
) -> None:
    net = wan(tiny_wan)
    config = replace(TWO, context_noise=context_noise, last_step_only=True)
    explicit = two_blocks_by_hand(net, exit_passes(net, config, sigmas))
    expected = gradients(net, weighted(explicit))
    made = rolled_two(net, config, sigmas, grad=True)
    torch.testing.assert_close(made, explicit, atol=1e-5, rtol=0.0)
    found = gradients(net, weighted(made))
    assert (found - expected).norm() < 1e-4 * expected.norm()


def weighted(x0: Tensor) -> Tensor:
    """A loss whose gradient is of the same size in all blocks."""
    return (x0 * torch.linspace(-1.0, 1.0, x0.numel()).view_as(x0)).sum()


def test_the_gradient_is_the_finite_difference_along_a_direction_of_a_key_matrix(
    tiny_wan: WanFactory,
) -> None:
    """Of the recorded rollout; detached pasts and the straight-through estimate miss it."""
    net = wan(tiny_wan)
    weight = net.model.blocks[0].self_attn.k.weight  # type: ignore[union-attr, operator]
    assert isinstance(weight, Tensor)
    inputs = exit_passes(net, TWO, [1.0])
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()

    def later(x0: Tensor) -> Tensor:  # of the second block alone: all of it passes the cache
        return x0[:, :, 2:].double().square().sum()

    values, eps = [], 0.05
    for sign in (1.0, -1.0):
        with torch.no_grad():
            weight += sign * eps * direction
            values.append(float(later(two_blocks_by_hand(net, inputs))))
            weight -= sign * eps * direction
    difference = (values[0] - values[1]) / (2.0 * eps)
    slopes = {}
    for kind in ("parallel", "straight_through", "detach"):
        config = replace(TWO, kv_gradient=kind, last_step_only=True)  # type: ignore[arg-type]
        loss = later(rolled_two(net, config, [1.0], grad=True))
        found = torch.autograd.grad(loss, weight)[0]
        slopes[kind] = float((found * direction).sum())
    assert slopes["parallel"] == pytest.approx(difference, rel=0.02)
    for kind in ("straight_through", "detach"):
        assert abs(slopes[kind] - difference) > 0.1 * abs(difference)


def test_without_a_pass_to_remember_one_pass_over_the_exit_inputs_is_enough(
    tiny_wan: WanFactory,
) -> None:
    """It has the gradient of steps whose keys stay live, as the cache holds them."""
    net, found = wan(tiny_wan), []
    for kind in ("parallel", "straight_through"):
        config = replace(BLOCKS, remember="last_step", kv_gradient=kind)  # type: ignore[arg-type]
        found.append(gradients(net, weighted(roll(net, config, [1.0]).x0)))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()
    watched = Watched(net)
    roll(watched, replace(PARALLEL, remember="last_step"), [1.0])
    assert [call.x.shape[2] for call in watched.calls] == [1, 2, 2, 5]
    roll(watched, PARALLEL, [1.0])
    assert watched.calls[-1].x.shape[2] == 10  # a clean past beside them


def test_one_pass_alone_runs_under_autograd_whatever_the_number_of_blocks(
    tiny_wan: WanFactory,
) -> None:
    net = Watched(wan(tiny_wan))
    roll(net, PARALLEL)
    assert [call.grad for call in net.calls] == [False] * (len(net.calls) - 1) + [True]
    (levels,) = {tuple(call.sigma[0].tolist()) for call in net.calls[-1:]}
    exits = [float(call.sigma[0, 0]) for call in net.calls[:-1] if not call.context.commit]
    assert set(levels[5:]) <= set(exits)  # behind the clean past's
    assert levels[:5] == (0.0,) * 5


@pytest.mark.parametrize("kind", ["replayed", "parallel"])
def test_blocks_that_run_again_in_the_backward_pass_learn_the_same(
    tiny_wan: WanFactory, kind: Any
) -> None:
    found = []
    for again in (False, True):
        net = wan(tiny_wan)
        if again:
            recompute_blocks(net.model.blocks, "block")
        made = roll(net, replace(BLOCKS, kv_gradient=kind), step=1).x0
        found.append(gradients(net, weighted(made)))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_only_scored_frames_that_learn_carry_a_gradient() -> None:
    net = Watched(Said())
    for kind in ("replayed", "parallel"):
        x0 = roll(net, replace(BLOCKS, kv_gradient=kind, given_first_frame=True), SIGMAS).x0  # type: ignore[arg-type]
        given = batch().x0
        assert given is not None and torch.equal(x0[:, :, : SPANS[0][1]], given[:, :, :1])


# ---- settings that cannot work ----


def test_positions_that_moved_are_refused_where_one_pass_would_count_others() -> None:
    moved = replace(PARALLEL, local_attn_size=3, relative_positions=True)
    assert list(moved.problems(5)) == [
        "causal.kv_gradient: parallel counts positions from the video's start, but rollouts of 5 "
        "frames drop some (causal.local_attn_size=3) and causal.relative_positions counts from "
        "those that are kept; use replayed, detach or straight_through, or keep all frames"
    ]
    assert list(replace(moved, sink_size=1).problems(5)) == list(moved.problems(5))
    assert list(replace(moved, local_attn_size=5).problems(5)) == []
    assert list(replace(moved, local_attn_size=5, rollout_frames=7).problems(5)) != []
    assert list(replace(moved, relative_positions=False).problems(5)) == []
    assert list(replace(moved, kv_gradient="replayed").problems(5)) == []
