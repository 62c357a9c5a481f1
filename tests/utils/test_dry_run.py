"""Code runs without values: shapes follow, memory does not; what the host counts has values."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.dry_run import Draw, dry_run
from utils.metering import Meter
from utils.seeding import generator


def test_what_no_machine_could_hold_is_multiplied() -> None:
    with dry_run():
        a = torch.randn(10**6, 10**6)
        assert (a @ a).shape == (10**6, 10**6)


def test_whole_numbers_that_the_host_makes_have_values() -> None:
    with dry_run():
        assert (torch.arange(3) + 1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("draw", "drawn"), [("least", 2), ("most", 6)])
def test_what_is_drawn_is_one_end_of_its_range(draw: Draw, drawn: int) -> None:
    with dry_run(draw=draw):
        assert int(torch.randint(2, 7, (), generator=generator(0))) == drawn


@pytest.mark.parametrize(("draw", "drawn"), [("least", 0.0), ("most", 1.0 - 2.0**-24)])
def test_one_number_that_is_drawn_for_all_samples_is_one_end_of_its_range(
    draw: Draw, drawn: float
) -> None:
    with dry_run(draw=draw):
        assert float(torch.rand((), generator=generator(0))) == drawn
        assert torch.rand(2**17, generator=generator(0)).shape == (2**17,)  # without values


def test_this_process_is_the_first_of_as_many_ranks_as_are_asked_for() -> None:
    with dry_run(world_size=4096):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 4096)
        whole = torch.randn(4096 * 3)
        dist.all_gather_into_tensor(whole, torch.randn(3))
    assert not dist.is_initialized()


def test_a_gpus_norm_is_one_operation_each_way_in_recomputed_code_too() -> None:
    with dry_run(on_gpu=True):
        norm, x = nn.RMSNorm(64), torch.randn(8, 64, requires_grad=True)
        grad = torch.randn(8, 64)
        with Meter() as meter:
            checkpoint(norm, x, use_reentrant=False).backward(grad)
    assert sum(meter.work.values()) == 3  # forward, forward again, backward
