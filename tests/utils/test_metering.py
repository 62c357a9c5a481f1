"""A meter counts what is alive, by what it is, and what operations do, by where they are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from utils.metering import Meter, Peak, Place, Tag, on_host


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


def allocated_at_most(call: Callable[[], None]) -> int:
    """The most bytes that torch says were allocated during a call, after a first one."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    now = most = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("shape", "most"), [((1000, 512), 3), ((1, 1000, 512), 4)], ids=["rows", "views"]
)
def test_gradients_of_one_tensor_are_added_up_where_torch_does_it(
    shape: tuple[int, ...], most: int
) -> None:
    """In the memory of the first, if no view of it is there; a mode that looks on prevents it."""
    x = torch.ones(shape)
    scale = torch.ones(512, requires_grad=True)
    weights = [torch.ones(4, 512) for _ in range(2)]

    def call() -> None:
        scale.grad = None
        h = x * scale
        sum(nn.functional.linear(h, weight).sum() for weight in weights).backward()  # type: ignore

    expected = allocated_at_most(call)
    with Meter() as meter:
        call()
    counted = max(peak.total for peak in meter.peaks.values())
    assert counted == pytest.approx(expected, rel=0.02)
    assert counted / (1000 * 512 * 4) == pytest.approx(most, abs=0.05)


def test_what_a_peak_holds_adds_up_and_what_never_changes_stays_as_it_is() -> None:
    weights, activations = Tag("base", "weights"), Tag("", "activations")
    peak = Peak(total=130, contents={weights: 100, activations: 20})
    assert peak.told({weights}) == {weights: 100.0, activations: 30.0}
    assert sum(peak.told().values()) == pytest.approx(130.0)


def test_the_outermost_network_is_who_runs() -> None:
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner)
    with Meter() as meter:
        for role, network in (("generator", outer), ("teacher", inner)):
            meter.watch(role, network)
        outer(torch.ones(1, 2))
        inner(torch.ones(1, 2))
    assert [place.role for place, work in meter.work if work.flops] == ["generator", "teacher"]


def test_host_memory_is_not_counted() -> None:
    with Meter() as meter:
        with on_host():
            kept = torch.zeros(100)
        assert meter.total == 0
        meter.tag([kept], "base", "weights")
        assert meter.total == 0
        del kept
        again = torch.zeros(100)  # in the place of what is gone
        assert meter.total == 400
    del again


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
