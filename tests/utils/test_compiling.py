"""Compiled blocks: equal numbers, one graph for all layers, none after the second block."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.types import Batch, Conditioning, Denoiser
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.blocks import CausalConfig
from pipeline.causal import CausalInferencePipeline
from pipeline.self_forcing import SelfForcingTrainingPipeline
from tests.conftest import MINIATURE, build_wan
from utils.compiling import compile_blocks, graphs_made, say_where_graphs_are_kept
from utils.parallel import ParallelConfig, parallelize
from utils.recompute import recompute_blocks
from utils.seeding import sample_rng, step_rng
from utils.start import COMPILED

CPU = torch.device("cpu")
SIGMAS = [1.0, 0.9, 0.5]
BLOCKS = CausalConfig(num_frame_per_block=2, last_step_only=True)
LAYOUTS = {
    "all": BLOCKS,
    "straight through": replace(BLOCKS, kv_gradient="straight_through"),
    "window": replace(BLOCKS, local_attn_size=4),
    "window and sink": replace(BLOCKS, local_attn_size=6, sink_size=1),
    "relative": replace(BLOCKS, local_attn_size=4, relative_positions=True),
}
SHAPE = (16, 12, 4, 4)  # six blocks


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def text() -> Conditioning:
    states = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1))
    return Conditioning(states)


def rolled(net: Denoiser, config: CausalConfig) -> list[Tensor]:
    """A training rollout and its gradients."""
    batch = Batch(text(), text(), SHAPE)
    rng = step_rng(0, "g", step=0, first=0, indices=[0], device=CPU)
    x0 = SelfForcingTrainingPipeline(SIGMAS, config)(net, batch, rng, grad=True).x0
    weights = list(net.parameters())  # type: ignore[attr-defined]
    return [x0.detach(), *torch.autograd.grad(x0.square().mean(), weights)]


def note_graphs(net: WanDiffusionWrapper) -> dict[int, int]:
    """How many graphs the passes over the block that begins at each frame have made."""
    made: dict[int, int] = {}

    def before(_: Any, args: Any, words: Any) -> None:
        note_graphs.before = graphs_made()  # type: ignore[attr-defined]

    def after(_: Any, args: Any, words: Any, output: Any) -> None:
        first = int(words["context"].frame_index[0])
        made[first] = made.get(first, 0) + graphs_made() - note_graphs.before  # type: ignore[attr-defined]

    net.register_forward_pre_hook(before, with_kwargs=True)
    net.register_forward_hook(after, with_kwargs=True)
    return made


def compiled(backend: str, *, recompute: bool, config: WanConfig = MINIATURE) -> WanTransformer:
    model = build_wan(config)
    if recompute:
        recompute_blocks(model.blocks)
    compile_blocks(model.blocks, backend=backend)
    return model


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))
        for a, b in zip(found, expected, strict=True)
    )


FAST = (("straight through", True),)  # graphs of a backward pass, with keys that are handed back
every_rollout = pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in ((layout, recompute) for layout in LAYOUTS for recompute in (False, True))
    ],
)


@every_rollout
def test_a_rollout_compiles_nothing_after_its_second_block(layout: str, *, recompute: bool) -> None:
    net = WanDiffusionWrapper(compiled("eager", recompute=recompute))
    made = note_graphs(net)
    found = rolled(net, LAYOUTS[layout])
    assert largest_difference(found, rolled(WanDiffusionWrapper(build_wan()), LAYOUTS[layout])) == 0
    assert all(made[first] for first in (0, 2))
    # A sink lies apart from the window once frames between them were dropped: one more time.
    late = {first for first, count in made.items() if first > 2 and count}
    assert late == ({6} if LAYOUTS[layout].sink_size else set())
    before = graphs_made()
    rolled(net, LAYOUTS[layout])
    assert graphs_made() == before


@pytest.mark.slow
def test_one_graph_serves_all_layers_and_networks_of_equal_use() -> None:
    found = []
    for layers in (1, 4):
        torch.compiler.reset()
        start = graphs_made()
        for _ in range(2):
            net = compiled("eager", recompute=False, config=replace(MINIATURE, num_layers=layers))
            rolled(WanDiffusionWrapper(net), BLOCKS)
        found.append(graphs_made() - start)
    assert found[0] == found[1]


def test_streams_compile_nothing_after_their_second_block() -> None:
    net = WanDiffusionWrapper(compiled("eager", recompute=False)).requires_grad_(False)
    made = note_graphs(net)
    pipeline = CausalInferencePipeline(net, SIGMAS, BLOCKS)
    blocks = list(pipeline.stream(text(), text(), SHAPE, sample_rng(0, "s", [0], CPU)))
    assert [block.shape[2] for block in blocks] == [2] * 6
    assert {first for first, count in made.items() if count} == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "block", "selective"])
@pytest.mark.parametrize("layout", ["straight through", "window and sink"])
def test_a_compiled_rollout_equals_the_eager_one(layout: str, kind: Any) -> None:
    model = build_wan()
    config = ParallelConfig(activation_checkpoint=kind, compile=True)
    parallelize(model, model.blocks, None, torch.float32, config)
    found = rolled(WanDiffusionWrapper(model), LAYOUTS[layout])
    expected = rolled(WanDiffusionWrapper(build_wan()), LAYOUTS[layout])
    assert largest_difference(found, expected) < 1e-5  # measured: below 2e-6


def test_compilation_says_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled("eager", recompute=False)
    with caplog.at_level(logging.INFO), torch.no_grad():
        model(torch.zeros(1, 16, 2, 4, 4), torch.ones(1, 1), torch.zeros(1, 12, 64))
        model(torch.ones(1, 16, 2, 4, 4), torch.ones(1, 1), torch.zeros(1, 12, 64))
    told = [r.getMessage() for r in caplog.records if "graph number" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("compiled a block's graph number ")


@pytest.mark.parametrize(("files", "told"), [(0, "none are there yet"), (1, "some are there")])
def test_a_run_says_where_graphs_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: int,
    told: str,
) -> None:
    monkeypatch.setenv(COMPILED, str(tmp_path))
    for number in range(files):
        (tmp_path / str(number)).touch()
    with caplog.at_level(logging.INFO):
        say_where_graphs_are_kept()
    assert f"graphs are kept in {tmp_path} ({told}" in caplog.text
