"""Masked attention as a device serves it, against a loop over blocks on the same device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.wan.attention import attend, attend_blocks, device_mask
from model.wan.masks import FrameMask, block_causal, teacher_forcing
from tests.devices import CUDA, difference, every_device, working_on

MASKS = {
    "window and sink": block_causal([1] * 6, window=3, sink=1),
    "teacher forcing": teacher_forcing([1, 2]),
}
# Relative to the largest value. bf16 keeps 8 bits, and both kernels round in another order.
PRECISIONS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def inputs(mask: FrameMask, per_frame: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Queries, keys and values [3, B = 2, N, heads = 2, head_dim = 64]."""
    shape = (3, 2, mask.frames * per_frame, 2, 64)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(device, dtype).requires_grad_()


@every_device
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("per_frame", [7, 64])  # 42 tokens, and 3 whole tiles
@pytest.mark.parametrize("name", MASKS)
def test_masked_attention_has_values_and_gradients_of_a_loop_over_blocks(
    name: str, per_frame: int, dtype: torch.dtype, device: torch.device
) -> None:
    mask = MASKS[name]
    torch._dynamo.reset()  # past eight compilations it would give up and run the kernel eagerly
    with working_on(device):
        served = device_mask(mask, per_frame, device)
        found, expected = [], []
        for kernel, results in (
            (lambda q, k, v: attend(q, k, v, mask=served), found),
            (lambda q, k, v: attend_blocks(q, k, v, mask), expected),
        ):
            x = inputs(mask, per_frame, dtype, device)
            out = kernel(*x)
            weights = torch.linspace(-1.0, 1.0, out.numel(), device=device).view_as(out)
            (out.float() * weights).sum().backward()
            results += [out, x.grad]
    assert all(difference(a, b) < PRECISIONS[dtype] for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_compiled_attention_makes_no_tensor_of_all_pairs() -> None:
    mask, per_frame = block_causal([3] * 7), 512
    pairs = 2 * 2 * (mask.frames * per_frame) ** 2 * 2  # batch, heads, bytes
    with working_on(CUDA):
        x = inputs(mask, per_frame, torch.bfloat16, CUDA)
        served = device_mask(mask, per_frame, CUDA)
        for _ in range(2):  # compiled in the first
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            attend(*x, mask=served).float().sum().backward()
            used = torch.cuda.max_memory_allocated() - before
    assert used < pairs / 4
