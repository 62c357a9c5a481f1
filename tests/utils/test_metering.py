"""A meter counts what is alive, by what it is, and what operations do, by where they are called."""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from utils.metering import Meter, Place, Tag, on_host


def test_bytes_are_counted_from_the_first_holder_to_the_last() -> None:
    with Meter() as meter:
        a = torch.zeros(1000)
        view = a[:10]
        del a
        assert meter.total == 4000
        del view
        assert meter.total == 0
    assert max(peak.total for peak in meter.peaks.values()) == 4000


def test_a_tag_that_is_given_stays() -> None:
    with Meter() as meter:
        a = torch.zeros(10)
        meter.tag([a], "generator", "weights")
        a.add_(1.0)
        assert meter.live[Tag("generator", "weights")] == 40


def test_storages_that_are_emptied_and_filled_again_count_at_their_size() -> None:
    with Meter() as meter:
        a = torch.zeros(100)
        a.untyped_storage().resize_(0)
        assert meter.total == 0
        a.untyped_storage().resize_(400)
        assert meter.live[Tag("", "gathered")] == 400


def test_host_memory_is_not_counted() -> None:
    with Meter() as meter:
        with on_host():
            kept = torch.zeros(100)
        assert meter.total == 0
    del kept


def test_operations_are_counted_where_they_are_called() -> None:
    linear = nn.Linear(8, 4)
    with Meter() as meter:
        meter.watch("critic", linear)
        with meter.within("generator"), record_function("loss"):
            linear(torch.ones(2, 8))
    places = {place for place, work in meter.work if work.flops}
    assert places == {Place("generator", 0, "loss", "critic")}


def test_arithmetic_is_that_of_torchs_own_counter() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.ones(2, 8)
    with Meter() as meter:
        network(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    assert sum(w.flops * n for (_, w), n in meter.work.items()) == counter.get_total_flops()


def test_views_move_nothing_and_expanded_tensors_are_read_once() -> None:
    with Meter() as meter:
        torch.zeros(4, 4).view(16).expand(8, 16)
        before = sum(w.moved * n for (_, w), n in meter.work.items())
        torch.ones(16).expand(8, 16) + torch.zeros(8, 16)
    assert before == 64  # zeros are written
    added = sum(w.moved * n for (_, w), n in meter.work.items()) - before
    assert added == 64 + 512 + (64 + 512 + 512)
