"""What a clip's passes read of the text is computed once for all of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.types import Batch, Conditioning, Context
from model.wan.masks import block_causal
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline import few_step, teacher
from pipeline.bidirectional import BidirectionalInferencePipeline, BidirectionalTrainingPipeline
from pipeline.protocol import InferencePipeline, sample
from pipeline.teacher import SamplingConfig, TeacherInferencePipeline
from tests.gaussian import CPU
from utils.seeding import StepRNG, generator, sample_rng

WanFactory = Callable[..., WanTransformer]
SHAPE = (16, 3, 4, 4)
SIGMAS = [1.0, 0.8, 0.5, 0.2]


def text(seed: int) -> Conditioning:
    return Conditioning(torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(seed)))


PIPELINES: dict[str, Callable[[WanDiffusionWrapper], InferencePipeline]] = {
    "few steps": lambda net: BidirectionalInferencePipeline(net, SIGMAS),
    "guided": lambda net: TeacherInferencePipeline(net, SamplingConfig(4, 4.0, 5.0, "euler")),
}


def clip(pipeline: InferencePipeline) -> Tensor:
    return sample(pipeline, text(1), text(2), SHAPE, sample_rng(0, "test", range(2), CPU))


def count_readings(model: WanTransformer) -> list[bool]:
    """For every time that a layer reads the text from now on, whether with a gradient."""
    calls: list[bool] = []
    for block in model.blocks:
        read = block.cross_attn.keys_and_values  # type: ignore[union-attr]

        def watched(memory: Tensor, adapters: Any, read: Any = read) -> Any:
            calls.append(torch.is_grad_enabled())
            return read(memory, adapters)

        block.cross_attn.keys_and_values = watched  # type: ignore[union-attr]
    return calls


@pytest.mark.parametrize("name", PIPELINES)
def test_each_layer_reads_the_text_once_per_clip(tiny_wan: WanFactory, name: str) -> None:
    model = tiny_wan()
    calls = count_readings(model)
    for clips in (1, 2):
        clip(PIPELINES[name](WanDiffusionWrapper(model)))
        assert len(calls) == clips * len(model.blocks)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forget() -> None:
        for module in (few_step, teacher):
            monkeypatch.setattr(module, "remembering", lambda context: context)

    return forget


@pytest.mark.parametrize("name", PIPELINES)
def test_reading_it_once_changes_no_bit(
    tiny_wan: WanFactory, name: str, forgetful: Callable[[], None]
) -> None:
    kept = clip(PIPELINES[name](WanDiffusionWrapper(tiny_wan())))
    forgetful()
    assert torch.equal(clip(PIPELINES[name](WanDiffusionWrapper(tiny_wan()))), kept)


def test_a_training_rollout_reads_it_once_before_and_once_where_it_learns(
    tiny_wan: WanFactory,
) -> None:
    model = tiny_wan()
    calls = count_readings(model)
    exits = []
    rollout = BidirectionalTrainingPipeline(SIGMAS)
    for step in range(8):
        rng = StepRNG(generator("shared", step), sample_rng(0, "test", range(2), CPU), range(2))
        exits.append(int(torch.randint(4, (), generator=generator("shared", step))))
        rollout(WanDiffusionWrapper(model), Batch(text(1), text(2), SHAPE), rng, grad=True)
    assert max(exits) > 1, "no rollout had two steps that do not learn"
    layers = len(model.blocks)
    assert calls.count(True) == layers * 8
    assert calls.count(False) == layers * sum(step > 0 for step in exits)


def test_masked_passes_keep_nothing() -> None:
    masked = Context(mask=block_causal([1, 1]))
    assert few_step.remembering(masked) is masked
