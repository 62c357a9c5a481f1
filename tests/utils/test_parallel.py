"""Gradients over ranks: what each rank holds between micro-batches, and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.memory import Live
from tests.ranks import run_on_ranks
from utils.distributed import distributed_session
from utils.parallel import (
    ParallelConfig,
    build_mesh,
    fix_gradient_reduction,
    parallelize,
    sync_gradients,
)

WIDTH, BLOCKS, MICRO = 64, 3, 3
Reduction = Literal["each", "last"]


class Stack(nn.Module):
    """Blocks, and weights around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))
        for index, weight in enumerate(self.parameters()):
            weight.data = random(WIDTH, WIDTH, seed=index) / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


FULL_BYTES = 4 * (1 + BLOCKS) * WIDTH**2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def micro_batch(part: int, rank: int) -> Tensor:
    return random(2, WIDTH, seed=100 + 10 * part + rank)


@dataclass
class Found:
    """What one rank sees of an update."""

    held: list[int] = field(default_factory=list)  # bytes of gradients after each micro-batch
    all_reduced: list[int] = field(default_factory=list)  # calls during each micro-batch
    gradients: dict[str, Tensor] = field(default_factory=dict)


def count_all_reduces(counts: list[int]) -> None:
    """Count in `counts[-1]` what replicas share from now on, in this process."""
    function = dist.all_reduce

    def counting(*args: Any, **words: Any) -> Any:
        counts[-1] += 1
        return function(*args, **words)

    dist.all_reduce = counting


def update(sharding: str, reduction: Reduction) -> Found:
    """One update's gradients on this rank, micro-batch by micro-batch."""
    found, config = Found(), ParallelConfig(reduce_gradients=reduction)
    with distributed_session(timeout_s=60.0) as session:
        stack = Stack()
        parallelize(stack, stack.blocks, build_mesh(session, sharding), torch.float32)
        fix_gradient_reduction(stack)
        count_all_reduces(found.all_reduced)
        with Live() as live:
            for part in range(MICRO):
                found.all_reduced.append(0)
                sync_gradients(stack, config, last=part == MICRO - 1)
                (stack(micro_batch(part, session.rank)).square().sum() / MICRO).backward()
                found.held.append(live.settled_bytes())
        for name, weight in stack.named_parameters():
            assert isinstance(weight.grad, DTensor)
            found.gradients[name] = weight.grad.full_tensor().clone()
    return found


def explicit_gradients(ranks: int) -> dict[str, Tensor]:
    """Those of one process that sees all micro-batches of all ranks."""
    stack = Stack()
    for part in range(MICRO):
        for rank in range(ranks):
            (stack(micro_batch(part, rank)).square().sum() / MICRO / ranks).backward()
    return {name: weight.grad for name, weight in stack.named_parameters()}  # type: ignore[misc]


def check_gradients(found: Found, ranks: int) -> None:
    expected = explicit_gradients(ranks)
    assert found.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found.gradients[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def reduced_each() -> list[Found]:
    return run_on_ranks(2, update, "full", "each")


@pytest.fixture(scope="module")
def reduced_last() -> list[Found]:
    return run_on_ranks(2, update, "full", "last")


def test_a_rank_holds_the_gradients_of_its_shard_alone(reduced_each: list[Found]) -> None:
    for found in reduced_each:
        print(f"reduced after each micro-batch: {found.held} bytes of {FULL_BYTES}")
        assert found.held == [FULL_BYTES // 2] * MICRO


def test_reduced_at_the_last_a_rank_holds_all_gradients_until_then(
    reduced_last: list[Found],
) -> None:
    for found in reduced_last:
        print(f"reduced after the last: {found.held} bytes of {FULL_BYTES}")
        assert found.held == [FULL_BYTES] * (MICRO - 1) + [FULL_BYTES // 2]


def test_both_ways_add_up_to_the_gradients_of_one_process(
    reduced_each: list[Found], reduced_last: list[Found]
) -> None:
    for found in (*reduced_each, *reduced_last):
        check_gradients(found, 2)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["each", "last"])
def test_replicas_share_gradients_once_per_update(reduction: Reduction) -> None:
    for found in run_on_ranks(4, update, "hybrid_full", reduction, local_world=2):
        assert found.all_reduced == [0] * (MICRO - 1) + [1 + BLOCKS]
        assert found.held[-1] == FULL_BYTES // 2
        check_gradients(found, 4)


def test_gradients_are_reduced_after_each_micro_batch_unless_asked_otherwise() -> None:
    assert ParallelConfig().reduce_gradients == "each"
