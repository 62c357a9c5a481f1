"""Linear layers in eight bits: what they forget, what they take, and where gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from model.wan.transformer import WanTransformer
from tests.conftest import build_wan
from utils.float8 import Float8Linear, quantise, restored, store_float8
from utils.parallel import ParallelConfig, parallelize


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(seed: int = 0) -> tuple[nn.Linear, Float8Linear]:
    """A layer, and the same in eight bits."""
    torch.manual_seed(seed)
    linear = nn.Linear(64, 48).requires_grad_(False)
    return linear, Float8Linear(linear)


def predicted(model: WanTransformer, x: Tensor | None = None) -> Tensor:
    x = random(1, 16, 4, 4, 4, seed=4) if x is None else x
    return model(x, torch.full((1, 1), 600.0), random(1, 12, 64, seed=1))


def test_a_weight_is_rounded_by_a_sixteenth_of_itself_at_most() -> None:
    weight = random(32, 64) * torch.logspace(-6, 3, 32)[:, None]
    weight[:, ::2] *= 2.0**-20
    found = restored(*quantise(weight), torch.float32)
    small = weight.abs().amax(dim=1, keepdim=True) * 2.0**-15  # below, e4m3 has fewer bits
    large = weight.abs() >= small
    assert float(((found - weight).abs() / weight.abs())[large].max()) <= 1 / 16
    assert float((found - weight).abs()[~large].max()) <= float(small.max())


@pytest.mark.parametrize("value", [0.0, 1e-30, 448.0, 449.0, 1e30])
def test_rows_of_any_size_are_stored_as_numbers(value: float) -> None:
    found = restored(*quantise(torch.full((1, 4), value)), torch.float32)
    assert float((found - value).abs().max()) <= value / 16


def test_a_weight_that_is_put_back_is_exact_in_bf16() -> None:
    stored, scale = quantise(random(32, 64))
    exact = restored(stored, scale, torch.float64)
    assert torch.equal(restored(stored, scale, torch.bfloat16).double(), exact)


def test_a_layer_computes_with_the_weights_that_it_stored() -> None:
    linear, small = layers()
    x = random(2, 3, 64)
    weight = restored(small.weight, small.scale, torch.float32)
    torch.testing.assert_close(small(x), nn.functional.linear(x, weight, linear.bias))
    assert small(x.bfloat16()).dtype == torch.bfloat16


def test_the_gradient_passes_through_to_the_input_as_through_those_weights() -> None:
    _, small = layers()
    x = random(2, 64).requires_grad_()
    gradient = random(2, 48, seed=3)
    (found,) = torch.autograd.grad(small(x), x, gradient)
    weight = restored(small.weight, small.scale, torch.float32)
    torch.testing.assert_close(found, gradient @ weight)
    assert not any(p.requires_grad for p in (small.weight, small.bias))


def test_no_copy_of_the_weights_waits_for_the_backward_pass() -> None:
    _, small = layers()
    saved: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.dtype) or t, lambda t: t
    ):
        small(random(2, 64).requires_grad_())
    assert sorted(saved, key=str) == [torch.float32, torch.float8_e4m3fn]
    assert small.scale.numel() == 48


def test_blocks_alone_are_stored_in_eight_bits_under_the_same_names() -> None:
    model = build_wan().requires_grad_(False)
    names, before = list(model.state_dict()), copy.deepcopy(model)
    store_float8(model)
    assert list(model.state_dict()) == names
    for name, weight in model.named_parameters():
        matrix = name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
        assert (weight.dtype == torch.float8_e4m3fn) == matrix, name
        if not matrix:
            assert torch.equal(weight, before.get_parameter(name))


def test_a_prediction_is_a_few_percent_off_and_costs_a_byte_per_weight() -> None:
    model = build_wan().requires_grad_(False)
    expected = predicted(model)
    bytes_before = sum(p.nbytes for p in model.blocks.parameters() if p.ndim == 2)
    store_float8(model)
    error = float((predicted(model) - expected).norm() / expected.norm())
    bytes_after = sum(p.nbytes for p in model.blocks.parameters() if p.dtype.itemsize == 1)
    print(f"relative error of a prediction: {error:.4f}")
    assert 0.0 < error < 0.05
    assert bytes_after == bytes_before // 4


@pytest.mark.parametrize("kind", ["none", "block", "selective"])
def test_recomputed_blocks_in_eight_bits_pass_the_same_gradient(kind: str) -> None:
    found = []
    for config in (ParallelConfig(), ParallelConfig(activation_checkpoint=kind)):  # type: ignore[arg-type]
        model = build_wan().requires_grad_(False)
        parallelize(model, model.blocks, None, torch.float32, config)
        store_float8(model)
        x = random(1, 16, 4, 4, 4, seed=4).requires_grad_()
        found += torch.autograd.grad(predicted(model, x).square().sum(), x)
    assert torch.equal(*found)


def test_blocks_in_eight_bits_compile_whole() -> None:
    torch.compiler.reset()
    model = build_wan().requires_grad_(False)
    store_float8(model)
    x = random(1, 16, 4, 4, 4, seed=4).requires_grad_()
    expected = torch.autograd.grad(predicted(model, x).square().sum(), x)
    for block in model.blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, fullgraph=True, dynamic=False, backend="aot_eager"
        )
    found = torch.autograd.grad(predicted(model, x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()
