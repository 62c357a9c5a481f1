"""Networks and rollouts on a device: equal to the CPU's in fp32, and near it in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.families.registry import open_model
from model.types import Batch, Conditioning, Context
from model.wan.masks import block_causal
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.bidirectional import BidirectionalInferencePipeline, BidirectionalTrainingPipeline
from pipeline.blocks import CausalConfig
from pipeline.causal import (
    CausalDiffusionInferencePipeline,
    CausalInferencePipeline,
)
from pipeline.protocol import InferencePipeline, sample
from pipeline.self_forcing import SelfForcingTrainingPipeline
from pipeline.teacher import SamplingConfig, TeacherInferencePipeline
from tests.conftest import MINIATURE, build_wan
from tests.devices import CPU, difference, every_device, same_noise, working_on
from tests.folders import make_official
from utils.seeding import StepRNG, generator

SHAPE = (16, 5, 4, 4)  # [C, F, H, W]
SIZE = 2
SIGMAS = [1.0, 0.8, 0.5]
BLOCKS = CausalConfig(num_frame_per_block=2, independent_first_frame=True)  # 1, 2, 2
FP32 = 1e-4  # relative; sums in another order, through all steps of a rollout
CONVOLUTIONS = 1e-3  # relative; cuDNN transforms them
BF16 = 0.05  # relative; eight bits through two layers
CONTEXTS = {
    "whole": lambda _: Context(),
    "masked": lambda _: Context(mask=block_causal([1, 2, 2])),
    "late frames": lambda device: Context(frame_index=torch.arange(7, 12, device=device)),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> WanDiffusionWrapper:
    return WanDiffusionWrapper(build_wan(MINIATURE).to(device, dtype))


def text(seed: int, device: torch.device) -> Conditioning:
    return Conditioning(random(SIZE, 12, 64, seed=seed).to(device))


def predicted(
    device: torch.device, dtype: torch.dtype, context: Callable[[torch.device], Context]
) -> tuple[Tensor, Tensor]:
    """x0 of noisy latents, and the gradient of its sum in one of the weights."""
    net = network(device, dtype)
    x, sigma = random(SIZE, *SHAPE, seed=1).to(device), torch.full((SIZE, 1), 0.6, device=device)
    x0 = net(x, sigma, text(2, device), context=context(device)).x0
    x0.square().mean().backward()
    gradient = net.model.blocks[0].self_attn.q.weight.grad
    assert gradient is not None
    return x0, gradient


@every_device
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_transformer_is_that_of_the_cpu_in_fp32(
    context: str, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    with working_on(device):
        found = predicted(device, dtype, CONTEXTS[context])
        expected = predicted(CPU, torch.float32, CONTEXTS[context])
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) < tolerance


ROLLOUTS: dict[str, Any] = {
    "bidirectional": BidirectionalTrainingPipeline(SIGMAS),
    "self-forcing": SelfForcingTrainingPipeline(SIGMAS, BLOCKS),
    "straight through": SelfForcingTrainingPipeline(
        SIGMAS, replace(BLOCKS, kv_gradient="straight_through", local_attn_size=3, sink_size=1)
    ),
    "replayed": SelfForcingTrainingPipeline(SIGMAS, replace(BLOCKS, kv_gradient="replayed")),
    "parallel": SelfForcingTrainingPipeline(SIGMAS, replace(BLOCKS, kv_gradient="parallel")),
    "last step remembered": SelfForcingTrainingPipeline(
        SIGMAS, replace(BLOCKS, kv_gradient="parallel", remember="last_step")
    ),
}


@every_device
@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_rollout_and_its_gradient_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    def rolled(on: torch.device) -> tuple[Tensor, Tensor]:
        net, batch = network(on), Batch(text(1, on), text(2, on), SHAPE)
        rng = StepRNG(generator("shared", 2), same_noise(SIZE, on), range(SIZE))
        x0 = ROLLOUTS[name](net, batch, rng, grad=True).x0
        x0.square().mean().backward()
        gradient = net.model.blocks[0].self_attn.v.weight.grad
        assert gradient is not None
        return x0, gradient

    with working_on(device):
        found, expected = rolled(device), rolled(CPU)
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) < FP32


MANY = SamplingConfig(steps=3, cfg_scale=2.0, solver="euler")
PIPELINES: dict[str, Callable[[WanDiffusionWrapper], InferencePipeline]] = {
    "few steps": lambda net: BidirectionalInferencePipeline(net, SIGMAS),
    "many steps": lambda net: TeacherInferencePipeline(net, MANY),
    "few steps in blocks": lambda net: CausalInferencePipeline(net, SIGMAS, BLOCKS),
    "many steps in blocks": lambda net: CausalDiffusionInferencePipeline(net, MANY, BLOCKS),
}


@every_device
@pytest.mark.parametrize("name", PIPELINES)
def test_samples_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    def made(on: torch.device) -> Tensor:
        pipeline = PIPELINES[name](network(on))
        return sample(pipeline, text(1, on), text(2, on), SHAPE, same_noise(SIZE, on))

    with working_on(device):
        assert difference(made(device), made(CPU)) < FP32


@every_device
def test_text_states_and_pixels_are_those_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    make_official(tmp_path / "model")
    model = open_model(tmp_path / "model")

    def encoded(on: torch.device) -> list[Tensor]:
        states = model.load_text_encoder(torch.float32).to(on)(["a red cat runs", "a street"])
        codec = model.load_codec(on, torch.float32)
        latents = codec.encode_to_latent(random(1, 3, 5, 32, 32, seed=3).clamp(-1, 1).to(on))
        return [states, latents, codec.decode_to_pixel(latents)]

    with working_on(device):
        pairs = zip(encoded(device), encoded(CPU), strict=True)
        assert max(difference(a, b) for a, b in pairs) < CONVOLUTIONS
