"""The moving average of weights, and putting it in their place for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.ema import EMA, EMAConfig


def layer(value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(2, 1, bias=False, dtype=dtype)
    return set_to(made, value)


def set_to(module: nn.Linear, value: float) -> nn.Linear:
    with torch.no_grad():
        module.weight.fill_(value)
    return module


def average(module: nn.Module, config: EMAConfig | None = None) -> EMA:
    return EMA(dict(module.named_parameters()), config or EMAConfig())


def test_the_average_begins_at_the_weights() -> None:
    assert torch.equal(average(layer(3.0)).shadow["weight"], torch.full((1, 2), 3.0))


def test_the_average_follows_the_formula() -> None:
    module = layer(1.0)
    ema = average(module, EMAConfig(decay=0.75))
    set_to(module, 2.0)
    ema.update(step=0)  # .75 * 1 + .25 * 2 = 1.25
    set_to(module, 4.0)
    ema.update(step=1)  # .75 * 1.25 + .25 * 4 = 1.9375
    assert torch.equal(ema.shadow["weight"], torch.full((1, 2), 1.9375))


def test_the_average_equals_the_weights_before_its_first_step() -> None:
    module = layer(1.0)
    ema = average(module, EMAConfig(decay=0.75, start_step=2))
    set_to(module, 2.0)
    ema.update(step=1)
    assert torch.equal(ema.shadow["weight"], module.weight)
    set_to(module, 6.0)
    ema.update(step=2)
    assert torch.equal(ema.shadow["weight"], torch.full((1, 2), 3.0))


def test_the_average_is_kept_in_fp32_and_resolves_what_bf16_cannot() -> None:
    module = layer(1.0, torch.bfloat16)
    ema = average(module, EMAConfig(decay=0.999))
    set_to(module, 2.0)
    ema.update(step=0)
    assert ema.shadow["weight"].dtype == torch.float32
    assert float(ema.shadow["weight"][0, 0]) == pytest.approx(1.001, abs=1e-6)


def test_an_update_leaves_the_weights_alone() -> None:
    module = layer(2.0)
    average(module).update(step=0)
    assert torch.equal(module.weight, torch.full((1, 2), 2.0))


def test_the_average_is_in_place_inside_the_context() -> None:
    module = layer(1.0)
    ema = average(module, EMAConfig())
    set_to(module, 5.0)
    with ema.swapped_in():
        assert torch.equal(module.weight, torch.full((1, 2), 1.0))


def test_the_trained_weights_return_bit_for_bit(tiny_wan) -> None:
    model = tiny_wan()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = average(model)
    ema.shadow = dict(average(tiny_wan(seed=1)).shadow)
    with ema.swapped_in():
        pass
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_trained_weights_return_after_an_error() -> None:
    module = layer(1.0)
    ema = average(module)
    set_to(module, 5.0)
    with pytest.raises(RuntimeError), ema.swapped_in():
        raise RuntimeError("sampling failed")
    assert torch.equal(module.weight, torch.full((1, 2), 5.0))


def test_of_several_networks_only_the_one_that_was_updated_moves_its_average() -> None:
    networks = nn.ModuleDict({"high": layer(1.0), "low": layer(1.0)})
    ema = EMA(dict(networks.named_parameters()), EMAConfig(decay=0.75))
    for network in (networks["high"], networks["low"]):
        assert isinstance(network, nn.Linear)
        set_to(network, 2.0)
    ema.update(step=0, prefix="low.")
    assert float(ema.shadow["high.weight"].mean()) == 1.0
    assert float(ema.shadow["low.weight"].mean()) == 1.25
