"""On a GPU: attention kernels that are there agree, the fastest is found, and blocks compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.types import Batch, Conditioning
from model.wan import kernels
from model.wan.kernels import EXACT, Shape, fastest, fault
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.blocks import CausalConfig
from pipeline.self_forcing import SelfForcingTrainingPipeline
from tests.conftest import MINIATURE, build_wan
from tests.devices import CUDA, difference, working_on
from utils.parallel import ParallelConfig, parallelize
from utils.seeding import StepRNG, generator, sample_rng

NOT_HERE = ("is not installed", "it needs a Hopper GPU", "it fails here")
LAYOUT = CausalConfig(num_frame_per_block=2, last_step_only=True, kv_gradient="straight_through")


@pytest.mark.gpu
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_a_kernel_agrees_with_the_formula_or_is_not_there(name: str) -> None:
    told = fault(name, CUDA, torch.bfloat16, grad=name in EXACT)
    if told is not None and any(reason in told for reason in NOT_HERE):
        pytest.skip(f"{name}: {told}")
    assert told is None


@pytest.mark.gpu
def test_the_fastest_kernel_is_no_slower_than_torchs_own_choice() -> None:
    shape = Shape(tokens=4096, heads=12, head_dim=128)
    chosen = fastest(shape, CUDA, torch.bfloat16, grad=True)
    times = {
        name: kernels.milliseconds(name, shape, CUDA, torch.bfloat16, grad=True)
        for name in {chosen, "sdpa"}
    }
    assert times[chosen] < 1.2 * times["sdpa"]


def rolled(device: torch.device, dtype: torch.dtype, config: ParallelConfig) -> list[Tensor]:
    """A self-forcing rollout of six blocks, and the gradient of one of its weights."""
    model = build_wan(replace(MINIATURE, dim=128, num_heads=2)).to(device, dtype)
    parallelize(model, model.blocks, None, dtype, config)
    states = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1)).to(device)
    batch = Batch(Conditioning(states), Conditioning(states), (16, 12, 4, 4))
    rng = StepRNG(generator("shared"), sample_rng(0, "test", range(1), device), range(1))
    net = WanDiffusionWrapper(model)
    x0 = SelfForcingTrainingPipeline([1.0, 0.8], LAYOUT)(net, batch, rng, grad=True).x0
    x0.square().mean().backward()
    gradient = model.blocks[0].self_attn.k.weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    return [x0, gradient]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"]
)
def test_a_compiled_rollout_is_the_eager_one(
    kind: Any, dtype: torch.dtype, tolerance: float
) -> None:
    torch.compiler.reset()
    with working_on(CUDA):
        plain = rolled(CUDA, dtype, ParallelConfig(activation_checkpoint=kind))
        compiled = rolled(CUDA, dtype, ParallelConfig(activation_checkpoint=kind, compile=True))
    assert all(difference(a, b) < tolerance for a, b in zip(compiled, plain, strict=True))


@pytest.mark.gpu
def test_inputs_that_wait_on_the_host_change_nothing() -> None:
    found = []
    with working_on(CUDA):
        for offload in (False, True):
            config = ParallelConfig(activation_checkpoint="block", offload_inputs=offload)
            found.append(rolled(CUDA, torch.bfloat16, config))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
