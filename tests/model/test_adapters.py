"""Adapters of one network: off they are not there, on they add up, run again they are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.adapters import (
    AdapterConfig,
    OnAdapters,
    declare,
    fill,
    install,
    pairs,
    parameter_names,
    start,
)
from model.types import FULL_ATTENTION, Conditioning, Context
from model.wan.cache import KVCache
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from utils.errors import UserError
from utils.float8 import store_float8
from utils.recompute import recompute_blocks

WanFactory = Callable[..., WanTransformer]

ALL = AdapterConfig(rank=3, targets="blocks+embeddings")
X = torch.linspace(-2.0, 2.0, 2 * 16 * 3 * 4 * 4).view(2, 16, 3, 4, 4)
SIGMA = torch.tensor([[0.3], [0.9]])
TEXT = Conditioning(torch.linspace(-1.0, 1.0, 2 * 12 * 64).view(2, 12, 64))


def adapted(model: WanTransformer, *names: str, seed: int = 0) -> WanTransformer:
    """`model` with adapters that are not zero."""
    declare(model, dict.fromkeys(names, ALL.rank_of))
    for name in names:
        start(model, name, seed)
    for layer, name, pair in pairs(model):
        rng = torch.Generator().manual_seed(len(layer) + 7 * sum(map(ord, name)))
        pair.b.data = 0.3 * torch.randn(pair.b.shape, generator=rng)
    return model


def predict(model: nn.Module, *names: str, context: Context = FULL_ATTENTION) -> Tensor:
    """The velocity with the adapters `names` on."""
    net = OnAdapters(WanDiffusionWrapper(model), names)  # type: ignore[arg-type]
    velocity: Tensor = net(X, SIGMA, TEXT, context=context).velocity
    return velocity


def merged(model: WanTransformer, *names: str) -> None:
    """Add what the adapters add to the weights themselves. In place."""
    for layer, name, pair in pairs(model):
        if name in names:
            model.get_parameter(f"{layer}.weight").data += pair.b.data @ pair.a.data


def test_adapters_that_are_off_change_nothing_bit_for_bit(tiny_wan: WanFactory) -> None:
    assert torch.equal(predict(adapted(tiny_wan(), "generator")), predict(tiny_wan()))


def test_an_adapter_that_has_learnt_nothing_changes_nothing_bit_for_bit(
    tiny_wan: WanFactory,
) -> None:
    model = tiny_wan()
    declare(model, {"generator": ALL.rank_of})
    start(model, "generator", seed=1)
    assert torch.equal(predict(model, "generator"), predict(tiny_wan()))
    a = model.blocks[0].self_attn.q.adapters.generator.a  # type: ignore[union-attr]
    assert 0.5 * a.shape[1] ** -0.5 < float(a.detach().abs().max()) <= a.shape[1] ** -0.5


def test_merged_weights_predict_what_their_adapter_does(tiny_wan: WanFactory) -> None:
    model, plain = adapted(tiny_wan(), "generator"), adapted(tiny_wan(), "generator")
    merged(plain, "generator")
    torch.testing.assert_close(predict(model, "generator"), predict(plain), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predict(model, "generator"), predict(model), atol=1e-2)


def test_adapters_add_up_in_any_order(tiny_wan: WanFactory) -> None:
    model, plain = adapted(tiny_wan(), "style", "few"), adapted(tiny_wan(), "style", "few")
    merged(plain, "style", "few")
    for names in (("style", "few"), ("few", "style")):
        torch.testing.assert_close(predict(model, *names), predict(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("blocks", 2 * 10), ("blocks+embeddings", 2 * 10 + 6)],
)
def test_the_targets_are_the_ten_matrices_of_each_block_and_the_embeddings(
    tiny_wan: WanFactory, targets: str, layers: int
) -> None:
    model = tiny_wan()
    assert len(model.blocks) == 2
    declare(model, {"critic": AdapterConfig(rank=2, targets=targets).rank_of})  # type: ignore[arg-type]
    found = [layer for layer, _, _ in pairs(model)]
    assert len(found) == layers
    assert {layer.split(".", 2)[2] for layer in found if layer.startswith("blocks.1.")} == {
        *(f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"),
        "ffn.0",
        "ffn.2",
    }
    assert len(parameter_names(model, "critic")) == 2 * layers
    assert parameter_names(model, "other") == []


def test_every_factor_gets_a_gradient_and_the_network_none(tiny_wan: WanFactory) -> None:
    model = adapted(tiny_wan(), "generator", "critic")
    model.requires_grad_(False)
    for _, _, pair in pairs(model):
        pair.requires_grad_(True)
    predict(model, "generator").square().mean().backward()
    given = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert given == set(parameter_names(model, "generator"))


def gradients(model: WanTransformer, *, between: bool) -> list[Tensor]:
    """Of the generator's adapter; between: whether a pass of the critic's comes before backward."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = predict(model, "generator").square().mean()
    if between:
        predict(model, "critic")
    loss.backward()
    found = [model.get_parameter(name).grad for name in parameter_names(model, "generator")]
    return [grad.clone() for grad in found if grad is not None]


def test_blocks_that_run_again_see_the_adapters_that_were_on(tiny_wan: WanFactory) -> None:
    plain = adapted(tiny_wan(), "generator", "critic")
    again = adapted(tiny_wan(), "generator", "critic")
    recompute_blocks(again.blocks)
    expected = gradients(plain, between=False)
    for between in (False, True):
        found = gradients(again, between=between)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


def test_a_second_derivative_is_refused(tiny_wan: WanFactory) -> None:
    """The backward pass writes into gradients that nobody else reads, which has no derivative."""
    model, x = adapted(tiny_wan(), "generator"), X.clone().requires_grad_(True)
    net = OnAdapters(WanDiffusionWrapper(model), ("generator",))
    loss = net(x, SIGMA, TEXT).velocity.square().mean()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_cache_is_of_one_choice_of_adapters(tiny_wan: WanFactory) -> None:
    model = adapted(tiny_wan(), "generator", "critic")
    context = replace(FULL_ATTENTION, cache=KVCache(), commit=True)
    with torch.no_grad():
        predict(model, "generator", context=context)
        with pytest.raises(ValueError, match=r"adapters \('generator',\).*with \('critic',\)"):
            predict(model, "critic", context=replace(context, commit=False))


def test_weights_in_eight_bits_keep_their_adapters(tiny_wan: WanFactory) -> None:
    model, plain = adapted(tiny_wan(), "generator"), tiny_wan()
    for network in (model, plain):
        store_float8(network)
    assert torch.equal(predict(model), predict(plain))
    assert not torch.allclose(predict(model, "generator"), predict(plain), atol=0.1)


def test_an_adapter_is_installed_in_a_network_that_is_loaded(tiny_wan: WanFactory) -> None:
    model, other = adapted(tiny_wan(), "generator"), tiny_wan()
    factors = {layer: (pair.a.detach(), pair.b.detach()) for layer, _, pair in pairs(model)}
    install(other, "served0", factors, what="adapter x")
    assert torch.equal(predict(model, "generator"), predict(other, "served0"))
    with pytest.raises(UserError, match="adapter x: 1 of its 1 layers are not in this network"):
        install(
            other, "served1", {"blocks.7.ffn.0": next(iter(factors.values()))}, what="adapter x"
        )


def test_factors_must_be_of_the_adapter_that_they_are_for(tiny_wan: WanFactory) -> None:
    model = adapted(tiny_wan(), "generator")
    factors = {layer: (pair.a.detach(), pair.b.detach()) for layer, _, pair in pairs(model)}
    short = dict(list(factors.items())[1:])
    with pytest.raises(UserError, match=r"1 layers missing.*rank and targets must be those"):
        fill(model, "generator", short, what="x")
    wide = {layer: (torch.zeros(5, a.shape[1]), b) for layer, (a, b) in factors.items()}
    with pytest.raises(UserError, match="26 of another shape"):
        fill(model, "generator", wide, what="x")


def test_a_network_that_computes_with_no_adapters_is_refused() -> None:
    with pytest.raises(UserError, match=r"no layers that take adapters; set critic.adapter.rank"):
        declare(nn.Sequential(nn.Linear(2, 2)), {"critic": ALL.rank_of})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(alpha=1.0), "critic.adapter.alpha: has no effect without"),
        (AdapterConfig(weights="x"), "critic.adapter.weights: has no effect without"),
        (AdapterConfig(targets="blocks+embeddings"), "critic.adapter.targets: has no effect"),
        (AdapterConfig(rank=0), "critic.adapter.rank: must be at least 1, or null"),
        (AdapterConfig(rank=4, alpha=0.0), "critic.adapter.alpha: must be positive and finite"),
    ],
)
def test_impossible_settings_are_refused(config: AdapterConfig, message: str) -> None:
    (found,) = config.problems("critic")
    assert found.startswith(message)
