"""Time states of noise levels that come again: computed once per video, and never stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.types import Batch, Conditioning
from model.wan.cache import KVCache
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.blocks import CausalConfig
from pipeline.causal import (
    CausalDiffusionInferencePipeline,
    CausalInferencePipeline,
)
from pipeline.protocol import InferencePipeline, sample
from pipeline.self_forcing import SelfForcingTrainingPipeline
from pipeline.teacher import SamplingConfig
from tests.gaussian import CPU
from utils.ema import EMA, EMAConfig
from utils.seeding import StepRNG, generator, sample_rng

WanFactory = Callable[..., WanTransformer]

SHAPE = (16, 5, 4, 4)  # [C, F, H, W]
SIGMAS = [1.0, 0.8, 0.5]
BLOCKS = CausalConfig(num_frame_per_block=2, independent_first_frame=True, last_step_only=True)
GUIDED = SamplingConfig(3, 4.0, 5.0, "euler")


def text(seed: int) -> Conditioning:
    return Conditioning(torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(seed)))


def few_steps(model: WanTransformer) -> InferencePipeline:
    return CausalInferencePipeline(WanDiffusionWrapper(model), SIGMAS, BLOCKS)


def many_steps(model: WanTransformer) -> InferencePipeline:
    return CausalDiffusionInferencePipeline(WanDiffusionWrapper(model), GUIDED, BLOCKS)


def video(pipeline: InferencePipeline) -> Tensor:
    return sample(pipeline, text(1), text(2), SHAPE, sample_rng(0, "test", range(2), CPU))


def rollout(model: WanTransformer) -> Tensor:
    """A self-forcing rollout whose blocks learn at their last step."""
    rng = StepRNG(generator("shared"), sample_rng(0, "test", range(2), CPU), range(2))
    pipeline = SelfForcingTrainingPipeline(SIGMAS, BLOCKS)
    batch = Batch(text(1), text(2), SHAPE)
    return pipeline(WanDiffusionWrapper(model), batch, rng, grad=True).x0


def count_embeddings(model: WanTransformer) -> list[bool]:
    """For every time embedding from now on, whether it carries a gradient."""
    calls: list[bool] = []
    embed = model.embed_time

    def watched(timestep: Tensor, adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return embed(timestep, adapters)

    model.embed_time = watched  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("make", [few_steps, many_steps])
def test_a_video_embeds_each_noise_level_once(
    tiny_wan: WanFactory, make: Callable[[WanTransformer], InferencePipeline]
) -> None:
    model = tiny_wan()
    calls = count_embeddings(model)
    for videos in (1, 2):
        video(make(model))
        assert len(calls) == videos * (3 + 1)  # of the steps, and of clean frames


def test_a_rollout_embeds_anew_where_it_learns(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    calls = count_embeddings(model)
    rollout(model)
    assert calls.count(True) == 3  # the last step of each block
    assert calls.count(False) == 2 + 1  # the two steps before it, and clean frames


def computed_anew(cache: KVCache, key: object, compute: Callable[[], Any]) -> Any:
    """What KVCache.time would be if it kept nothing."""
    del cache, key
    return compute()


@pytest.mark.parametrize("make", [few_steps, many_steps])
def test_keeping_time_states_changes_no_bit(
    tiny_wan: WanFactory,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[WanTransformer], InferencePipeline],
) -> None:
    kept = video(make(tiny_wan()))
    monkeypatch.setattr(KVCache, "time", computed_anew)
    assert torch.equal(video(make(tiny_wan())), kept)


def test_keeping_time_states_changes_no_gradient(
    tiny_wan: WanFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for keep in (True, False):
        if not keep:
            monkeypatch.setattr(KVCache, "time", computed_anew)
        model = tiny_wan()
        rollout(model).square().sum().backward()
        assert all(bool(weight.grad.any()) for weight in model.time_embedding.parameters())  # type: ignore[union-attr]
        found.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def step(model: nn.Module) -> None:
    """One optimizer step that moves every weight."""
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.5)
    torch.optim.AdamW(model.parameters(), lr=0.05).step()


def load(model: nn.Module) -> None:
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


@pytest.mark.parametrize("make", [few_steps, many_steps])
@pytest.mark.parametrize("change", [step, load])
def test_after_weights_changed_a_pipeline_makes_what_a_new_network_makes(
    tiny_wan: WanFactory,
    make: Callable[[WanTransformer], InferencePipeline],
    change: Callable[[nn.Module], None],
) -> None:
    model = tiny_wan()
    pipeline = make(model)
    before = video(pipeline)
    change(model)
    fresh = tiny_wan(seed=1)
    fresh.load_state_dict(model.state_dict())
    after = video(pipeline)
    assert torch.equal(after, video(make(fresh)))
    assert not torch.equal(after, before)


def test_averaged_weights_that_are_swapped_in_have_time_states_of_their_own(
    tiny_wan: WanFactory,
) -> None:
    model = tiny_wan()
    averaged = EMA(dict(model.named_parameters()), EMAConfig())
    pipeline = few_steps(model)
    first = video(pipeline)
    step(model)
    trained = video(pipeline)
    with averaged.swapped_in():
        assert torch.equal(video(pipeline), first)
    assert torch.equal(video(pipeline), trained)
    assert not torch.equal(trained, first)
