"""Sampling of two experts: one schedule through both, each with its guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.experts import ExpertPair
from model.types import Conditioning
from model.wan.config import WanConfig, diffusers_config
from model.wan.transformer import WanTransformer
from model.wan.weights import to_diffusers
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.bidirectional import BidirectionalInferencePipeline
from pipeline.protocol import sample
from pipeline.teacher import (
    SamplingConfig,
    TeacherInferencePipeline,
    adjusted,
    build_scheduler,
    integrate,
)
from tests.conftest import build_wan
from tests.gaussian import SHAPE, Exact, saying, streams
from tests.pairs import paired

T2V = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_len=12, text_dim=20
)
A14B = SamplingConfig(40, 4.0, 12.0, "unipc", cfg_scale_low=3.0, boundary=0.875)


@pytest.mark.parametrize(
    ("timestep_shift", "boundary", "high"), [(12.0, 0.875, 26), (5.0, 0.9, 15), (3.0, 0.9, 11)]
)
def test_forty_published_steps_divide_as_in_diffusers(
    timestep_shift: float, boundary: float, high: int
) -> None:
    config = replace(A14B, timestep_shift=timestep_shift, boundary=boundary)
    scheduler = build_scheduler(config)
    ours = [config.side(level) for level in scheduler.sigmas[:40].tolist()]
    assert ours == ["high"] * high + ["low"] * (40 - high)
    assert int((scheduler.timesteps >= 1000 * boundary).sum()) == high


def test_guidance_is_that_of_the_expert_at_hand() -> None:
    assert [A14B.scale(level) for level in (1.0, 0.875, 0.8749, 0.1)] == [4.0, 4.0, 3.0, 3.0]
    assert replace(A14B, cfg_scale_low=None).scale(0.1) == 4.0


def test_a_scale_that_is_asked_for_is_for_both_experts() -> None:
    assert adjusted(A14B, None, 1.0) == replace(A14B, cfg_scale=1.0, cfg_scale_low=None)
    assert adjusted(A14B, 8, None) == replace(A14B, steps=8)


@pytest.mark.parametrize(("high", "low"), [(4.0, 3.0), (1.0, 3.0), (2.0, 1.0), (1.0, 1.0)])
def test_one_schedule_runs_through_both_and_evaluations_are_counted_right(
    high: float, low: float
) -> None:
    above, below = Exact(), Exact()
    config = replace(A14B, steps=8, cfg_scale=high, cfg_scale_low=low)
    pipeline = TeacherInferencePipeline(paired(above, below), config)
    sample(pipeline, saying(1.0, 3), saying(0.0, 3), SHAPE, streams(3))
    assert [level for _, level in above.calls + below.calls] == pytest.approx(
        build_scheduler(config).sigmas[:8].tolist()
    )
    assert {size for size, _ in above.calls} == {3 if high == 1.0 else 6}
    assert {size for size, _ in below.calls} == {3 if low == 1.0 else 6}
    evaluations = sum(size for size, _ in above.calls + below.calls) / 3
    assert pipeline.network_evaluations(SHAPE[1]) == evaluations


def test_a_schedule_may_have_another_boundary_than_the_network() -> None:
    above, below = Exact(), Exact()
    config = SamplingConfig(10, 1.0, 1.0, "euler", boundary=0.35)
    noise = streams(1).randn(SHAPE)
    integrate(paired(above, below), noise, saying(0.0, 1), saying(0.0, 1), config)
    assert [len(above.calls), len(below.calls)] == [7, 3]


@pytest.mark.parametrize(
    ("boundary", "high"), [(0.875, [1.0, 0.9545, 0.875]), (0.9148, [1.0, 0.9545])]
)
def test_few_steps_follow_the_boundary_of_the_network(boundary: float, high: list[float]) -> None:
    above, below, levels = Exact(), Exact(), [1.0, 0.9545, 0.875, 0.7]
    pipeline = BidirectionalInferencePipeline(paired(above, below, boundary), levels)
    sample(pipeline, saying(1.0, 2), saying(0.0, 2), SHAPE, streams(2))
    asked = [[level for _, level in net.calls] for net in (above, below)]
    assert asked == [pytest.approx(high), pytest.approx(levels[len(high) :])]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twin(model: WanTransformer) -> Any:
    """diffusers' own transformer with the weights of `model`."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_config(diffusers_config(model.config))
    theirs.load_state_dict({to_diffusers(name): v for name, v in model.state_dict().items()})
    return theirs.eval()


def exact_steps(config: SamplingConfig) -> Any:
    """diffusers' scheduler without the rounding of its timesteps to whole numbers."""
    from diffusers import UniPCMultistepScheduler

    class ExactSteps(UniPCMultistepScheduler):  # type: ignore[misc]
        def set_timesteps(self, steps: int, **options: Any) -> None:
            super().set_timesteps(steps, **options)
            self.timesteps = 1000 * self.sigmas[:-1]

    return ExactSteps.from_config(build_scheduler(config).config)


def diffusers_latents(
    transformers: tuple[Any, Any], config: SamplingConfig, noise: Tensor, texts: tuple[Tensor, ...]
) -> Tensor:
    """What diffusers' whole pipeline of two experts makes of a noise and two encoded prompts."""
    from diffusers import AutoencoderKLWan, WanPipeline

    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=8, z_dim=16),
        scheduler=exact_steps(config),
        transformer=transformers[0],
        transformer_2=transformers[1],
        boundary_ratio=config.boundary,
    )
    pipeline.set_progress_bar_config(disable=True)
    made: Tensor = pipeline(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        height=8 * noise.shape[3],
        width=8 * noise.shape[4],
        num_frames=4 * noise.shape[2] - 3,
        num_inference_steps=config.steps,
        guidance_scale=config.cfg_scale,
        guidance_scale_2=config.cfg_scale_low,
        latents=noise,
        output_type="latent",
    ).frames
    return made


@torch.no_grad()
def test_a_whole_pipeline_of_two_experts_equals_diffusers() -> None:
    high, low = (build_wan(T2V, seed=seed) for seed in (1, 2))
    config = replace(A14B, steps=10)
    noise, texts = random(2, 16, 3, 4, 6, seed=3), [random(2, 12, 20, seed=s) for s in (4, 5)]
    pair = ExpertPair(WanDiffusionWrapper(high), WanDiffusionWrapper(low), 0.875)
    ours = integrate(pair, noise, Conditioning(texts[0]), Conditioning(texts[1]), config)
    theirs = diffusers_latents((twin(high), twin(low)), config, noise, tuple(texts))
    difference, size = float((ours - theirs).abs().max()), float(theirs.abs().mean())
    print(f"10 steps, guided: {difference:.1e} from diffusers, latents of mean size {size:.2f}")
    assert difference < 1e-4
    swapped = diffusers_latents((twin(low), twin(high)), config, noise, tuple(texts))
    same_scale = replace(config, cfg_scale_low=4.0)
    other = diffusers_latents((twin(high), twin(low)), same_scale, noise, tuple(texts))
    assert all(float((ours - wrong).abs().max()) > 0.1 for wrong in (swapped, other))
