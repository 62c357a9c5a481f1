"""What the benchmark's meters say, against what is known or counted in another way."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.types import Conditioning, Context
from model.wan.cache import KVCache
from model.wan.config import WanConfig
from model.wan.masks import block_causal, teacher_forcing
from model.wan_wrapper import WanDiffusionWrapper
from scripts.benchmarking import meters, traffic, training
from scripts.benchmarking.meters import Clock, FlopMeter, LivePeak
from scripts.benchmarking.traffic import Layout, Passes, Traffic
from tests.conftest import IMAGE_MINIATURE, MINIATURE, build_wan
from tests.ranks import run_on_ranks
from tests.runs import built

CPU = torch.device("cpu")


def conditioning(config: WanConfig, batch: int, frames: int) -> Conditioning:
    text = torch.zeros(batch, config.text_len, config.text_dim)
    if not config.reads_clip:
        return Conditioning(text)
    clip = torch.zeros(batch, config.image_tokens, config.image_dim)
    return Conditioning(text, clip, torch.zeros(batch, 20, frames, 4, 6))


def counted(network: WanDiffusionWrapper, batch: int, frames: int, context: Context) -> list[int]:
    """FLOPs of one pass by torch's counter, and by ours."""
    meter = FlopMeter({"generator": network})
    x, sigma = torch.zeros(batch, 16, frames, 4, 6), torch.ones(batch, 1)
    # Torch counts the products of the plain formula, and none of its kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        given = conditioning(network.model.config, batch, frames)
        out = network(x, sigma, given, context=context).velocity
        if torch.is_grad_enabled():
            out.square().sum().backward()
    return [counter.get_total_flops(), meter.take()]


@pytest.mark.parametrize("config", [MINIATURE, IMAGE_MINIATURE], ids=["t2v", "i2v"])
@pytest.mark.parametrize("context", [Context(), Context(mask=block_causal([1, 2, 2]))])
def test_forward_flops_are_those_that_torch_counts(config: WanConfig, context: Context) -> None:
    network = WanDiffusionWrapper(build_wan(config))
    with torch.no_grad():
        torch_s, ours = counted(network, 2, 5, context)
    assert ours == torch_s


def test_flops_of_a_pass_over_a_clean_past_and_known_text_are_those_that_torch_counts() -> None:
    network, cache = WanDiffusionWrapper(build_wan()), KVCache()
    with torch.no_grad():
        for first in (0, 2):
            index = torch.arange(first, first + 2)
            context = Context(cache=cache, frame_index=index, commit=True)
            torch_s, ours = counted(network, 1, 2, context)
            assert ours == torch_s


def test_a_backward_pass_counts_as_two_forward_passes() -> None:
    mask = teacher_forcing([1, 2])
    index = torch.arange(3).repeat(2)
    network = WanDiffusionWrapper(build_wan())
    torch_s, ours = counted(network, 2, 6, Context(mask=mask, frame_index=index))
    # Torch leaves out what needs no gradient: that of latents, text and noise level.
    assert torch_s < ours < 1.05 * torch_s


def test_a_frozen_network_that_hands_a_gradient_on_costs_one_forward_pass_more() -> None:
    network = build_wan().requires_grad_(False)
    x = torch.zeros(2)
    assert meters.backward_passes(network, x) == 0
    assert meters.backward_passes(network, x.requires_grad_()) == 1
    assert meters.backward_passes(network.requires_grad_(True), x) == 2
    with torch.no_grad():
        assert meters.backward_passes(network, x) == 0


def test_a_meter_that_is_closed_counts_no_more() -> None:
    network = WanDiffusionWrapper(build_wan())
    meter = FlopMeter({"generator": network})
    meter.close()
    network(torch.zeros(1, 16, 1, 4, 4), torch.ones(1, 1), conditioning(MINIATURE, 1, 1))
    assert meter.take() == 0


def test_the_peak_is_the_most_that_is_held_at_a_time() -> None:
    held = torch.zeros(100)
    with LivePeak(held.nbytes) as live:
        first = held + 1.0  # 400 more bytes
        second = torch.cat([first, first])  # 800 more
        del first
        third = second.view(2, 100)[0]  # none
        held.add_(third)
        del second, third
        gc.collect()
        now = live.now
        for _ in range(10):
            held = held + 1.0  # the old one goes when the new one is there
    assert live.peak == 400 + 400 + 800
    assert now == 400


def test_a_clock_tells_the_median_of_pairs() -> None:
    ours, theirs = Clock(CPU, wall=[1.0, 4.0, 3.0], cpu=[1.0] * 3), Clock(CPU, wall=[1.0, 2.0, 1.0])
    assert ours.ratio(theirs) == 2.0
    assert ours.ratio(Clock(CPU)) is None
    with theirs():
        sum(range(1000))
    assert len(theirs.wall) == 4
    assert theirs.wall[-1] > 0.0


def test_the_peak_of_a_cpu_is_measured_and_that_of_a_known_gpu_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak, source = meters.peak_flops(CPU, torch.float32)
    assert peak > 1e9
    assert source == "measured by a matrix product"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert meters.peak_flops(torch.device("cuda"), torch.bfloat16) == (989e12, "data sheet, bf16")


def test_traffic_of_one_network_is_what_the_formula_says() -> None:
    layout = Layout(blocks=80, rest=20, shards=4, replicas=2, compute_bytes=2)
    found = layout.traffic(Passes(forwards=3, learning=2, backwards=1, scatters=1, updates=1))
    assert found.gathered == 2 * ((3 + 2) * 60 + (3 + 1) * 15)
    assert found.scattered == 4 * 75
    twice = layout.traffic(Passes(6, 4, backwards=2, scatters=1, updates=1))
    assert twice.scattered == 4 * (2 * 60 + 15)
    assert found.replicated == 2 * 25 * 4 // 2
    assert found.total == found.gathered + found.scattered + found.replicated
    alone = replace(layout, shards=1, replicas=1)
    assert alone.traffic(Passes(3, 2, 1, 1, 1)) == Traffic()


def rank_traffic(config: Path, logdir: Path, *overrides: str) -> list[tuple[Traffic, Traffic]]:
    """Two steps of a run on this rank: what was counted, and what the formula says."""
    torch.set_num_threads(1)
    with built(config, logdir, *overrides) as trainer:
        return [traffic.measured_traffic(trainer, training.take_step) for _ in range(2)]


@pytest.mark.parametrize(
    ("ranks", "local_world", "overrides"),
    [
        (2, None, ()),
        (4, 2, ("sharding_strategy=hybrid_full",)),
        pytest.param(
            4,
            None,
            ("accumulation=1", "parallel.activation_checkpoint=block"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            None,
            ("accumulation=2", "parallel.reduce_gradients=last", "mixed_precision=true"),
            marks=pytest.mark.slow,
        ),
        pytest.param(2, None, ("sharding_strategy=none",), marks=pytest.mark.slow),
    ],
    ids=["2", "2x2", "4", "2-last", "2-none"],
)
@pytest.mark.parametrize(
    "method", ["dmd", pytest.param("self_forcing_dmd", marks=pytest.mark.slow)]
)
def test_what_ranks_receive_in_a_step_is_what_the_formula_says(
    method: str,
    ranks: int,
    local_world: int | None,
    overrides: tuple[str, ...],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    words = (configs[method], tmp_path, "batch_size=4", *overrides)
    for steps in run_on_ranks(ranks, rank_traffic, *words, local_world=local_world):
        for counted_, formula in steps:
            assert counted_ == formula
            assert counted_.total > 0


def test_one_rank_receives_nothing(configs: dict[str, Path], tmp_path: Path) -> None:
    for counted_, formula in rank_traffic(configs["dmd"], tmp_path):
        assert counted_ == formula == Traffic()
