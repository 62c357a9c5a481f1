"""Weights over ranks: who holds them, how often they are gathered, and that no number changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.ranks import run_on_ranks
from tests.utils.test_parallel import BLOCKS, WIDTH, Stack, check_gradients, micro_batch
from tests.utils.test_parallel import Found as Update
from utils.distributed import distributed_session
from utils.parallel import (
    ParallelConfig,
    build_mesh,
    fix_gradient_reduction,
    keep_gathered,
    parallelize,
    sync_gradients,
)

MICRO, PASSES, UNITS = 3, 4, 1 + BLOCKS  # a unit is a block, or what is around them
# By what they do; of several names the first that this version of torch has is what FSDP2 calls.
COLLECTIVES = {
    "gather": ("all_gather_single", "all_gather_into_tensor"),
    "all_reduce": ("all_reduce",),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
WAYS = {
    "full": ("full", ParallelConfig()),
    "none": ("none", ParallelConfig()),
    "prefetch": ("full", ParallelConfig(prefetch=2)),
    "prefetch all": ("full", ParallelConfig(prefetch=9)),
}


@dataclass
class Found:
    """What one rank sees of no-grad passes and an update."""

    update: Update = field(default_factory=Update)
    outputs: list[Tensor] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # of each weight's values on this rank
    rollout: Counter[str] = field(default_factory=Counter)  # collective calls by name
    training: Counter[str] = field(default_factory=Counter)


def count_collectives(into: list[Counter[str]]) -> None:
    """Count them in `into[-1]` from now on, in this process."""
    for kind, names in COLLECTIVES.items():
        name = next(name for name in names if hasattr(dist, name))
        function = getattr(dist, name)

        def counting(*args: Any, function: Any = function, kind: str = kind, **words: Any) -> Any:
            into[-1][kind] += 1
            return function(*args, **words)

        setattr(dist, name, counting)


def sharded_stack(session: Any, sharding: str, config: ParallelConfig) -> Stack:
    stack = Stack()
    parallelize(stack, stack.blocks, build_mesh(session, sharding), torch.float32, config)
    fix_gradient_reduction(stack)
    return stack


def work(sharding: str, config: ParallelConfig) -> Found:
    """Passes without a gradient, and an update's gradients."""
    found = Found()
    with distributed_session(timeout_s=60.0) as session:
        stack = sharded_stack(session, sharding, config)
        count_collectives(counts := [found.rollout])
        with torch.no_grad():
            found.outputs = [stack(micro_batch(part, session.rank)) for part in range(PASSES)]
        counts.append(found.training)
        for part in range(MICRO):
            sync_gradients(stack, config, last=part == MICRO - 1)
            (stack(micro_batch(part, session.rank)).square().sum() / MICRO).backward()
        for name, weight in stack.named_parameters():
            assert isinstance(weight, DTensor)
            assert isinstance(weight.grad, DTensor)
            found.held.append(weight.to_local().numel())
            found.update.gradients[name] = weight.grad.full_tensor().clone()
    return found


@pytest.fixture(scope="module")
def ways() -> dict[str, list[Found]]:
    """Each way on two ranks."""
    return {name: run_on_ranks(2, work, *way) for name, way in WAYS.items()}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_adds_up_to_the_gradients_of_one_process(
    ways: dict[str, list[Found]], way: str
) -> None:
    for found in ways[way]:
        check_gradients(found.update, 2)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_makes_the_same_outputs(ways: dict[str, list[Found]], way: str) -> None:
    for found, full in zip(ways[way], ways["full"], strict=True):
        torch.testing.assert_close(found.outputs, full.outputs)


def test_without_sharding_each_rank_holds_all_weights_and_shares_gradients_once_per_update(
    ways: dict[str, list[Found]],
) -> None:
    for found in ways["none"]:
        assert found.held == [WIDTH**2] * UNITS
        assert found.rollout == {}
        assert found.training == {"all_reduce": UNITS}


@pytest.mark.parametrize("way", ["full", "prefetch", "prefetch all"])
def test_prefetching_gathers_as_often(ways: dict[str, list[Found]], way: str) -> None:
    for found in ways[way]:
        assert found.held == [WIDTH**2 // 2] * UNITS
        assert found.rollout == {"gather": PASSES * UNITS}
        assert found.training == {
            "gather": 2 * MICRO * UNITS,  # forward and backward
            "reduce_scatter": MICRO * UNITS,
        }


@dataclass
class Rollout:
    """What one rank sees of a rollout whose weights stay gathered."""

    kept: Counter[str] = field(default_factory=Counter)  # in passes without a gradient
    learning: Counter[str] = field(default_factory=Counter)  # in the pass that has one
    gathered: list[int] = field(default_factory=list)  # units, after each of both
    outputs: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)
    sharded_again: bool = False
    update: Update = field(default_factory=Update)


def gathered_units(stack: Stack) -> int:
    units = [unit for unit in stack.modules() if isinstance(unit, FSDPModule)]
    return sum(not isinstance(unit.weight, DTensor) for unit in units[1:])


def rollout(sharding: str) -> Rollout:
    """Passes without a gradient and one with it, then an update and a pass with new weights."""
    found = Rollout()
    with distributed_session(timeout_s=60.0) as session:
        stack = sharded_stack(session, sharding, ParallelConfig())
        x = micro_batch(0, session.rank)
        with torch.no_grad():
            found.expected = [stack(x) for _ in range(PASSES)]
        count_collectives(counts := [found.kept])
        with keep_gathered(stack):
            with torch.no_grad():
                found.outputs = [stack(x) for _ in range(PASSES)]
            found.gathered.append(gathered_units(stack))
            counts.append(found.learning)
            loss = stack(x).square().sum() / MICRO
            found.gathered.append(gathered_units(stack))
        counts.append(Counter())
        found.sharded_again = all(isinstance(p, DTensor) for p in stack.parameters())
        loss.backward()
        for part in range(1, MICRO):
            (stack(micro_batch(part, session.rank)).square().sum() / MICRO).backward()
        for name, weight in stack.named_parameters():
            assert isinstance(weight.grad, DTensor)
            found.update.gradients[name] = weight.grad.full_tensor().clone()
        torch.optim.SGD(stack.parameters(), lr=0.1).step()
        with torch.no_grad(), keep_gathered(stack):
            found.outputs.append(stack(x))
        with torch.no_grad():
            found.expected.append(stack(x))
    return found


@pytest.fixture(scope="module")
def kept() -> list[Rollout]:
    return run_on_ranks(2, rollout, "full")


def test_weights_that_stay_gathered_are_gathered_once_per_rollout(kept: list[Rollout]) -> None:
    for found in kept:
        assert found.kept == {"gather": UNITS}
        assert found.learning == {}  # what is there need not be gathered


def test_a_pass_that_learns_gives_weights_back_for_its_activations(kept: list[Rollout]) -> None:
    for found in kept:
        assert found.gathered == [BLOCKS, 0]


def test_after_a_rollout_all_weights_are_sharded_and_learn_as_ever(kept: list[Rollout]) -> None:
    for found in kept:
        assert found.sharded_again
        check_gradients(found.update, 2)


def test_weights_that_stay_gathered_change_no_output_and_are_never_stale(
    kept: list[Rollout],
) -> None:
    for found in kept:
        assert not torch.equal(found.outputs[-1], found.outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(found.outputs, found.expected, strict=True))


def test_a_network_that_is_not_sharded_has_nothing_to_keep() -> None:
    stack, x = Stack(), micro_batch(0, 0)
    with keep_gathered(stack):
        inside = stack(x)
    assert torch.equal(inside, stack(x))
