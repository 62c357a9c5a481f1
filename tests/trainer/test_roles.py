"""Roles that own part of a network, a whole one, or several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.types import Conditioning, Prediction
from tests.conftest import build_wan
from trainer.roles import Role, build_role, build_roles, parameters_of
from utils.ema import EMA, EMAConfig
from utils.optim import OptimizerConfig

CONFIG = OptimizerConfig(lr=0.1, max_grad_norm=1.0, muon_lr=0.05)


class TwoLevels(nn.Module):
    """A denoiser of two networks, one for high noise levels and one for low ones."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"high": build_wan(seed=1), "low": build_wan(seed=2)})

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Prediction:
        """The network of the noise level predicts."""
        net = self.model["high" if float(sigma[0, 0]) > 0.5 else "low"]
        velocity = net(x, 1000.0 * sigma, conditioning.text)
        return Prediction(x - sigma[:, None, :, None, None] * velocity, velocity)


class Shared(nn.Module):
    """A handle on a network that several roles share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def conditioning() -> Conditioning:
    return Conditioning(torch.ones(1, 12, 64))


def noisy() -> Tensor:
    return torch.linspace(-1.0, 1.0, 16 * 3 * 4 * 4).view(1, 16, 3, 4, 4)


def step(role: Role, sigma: float) -> None:
    """One update toward a velocity of zero."""
    net = role.network
    if isinstance(net, TwoLevels):
        loss = net(noisy(), torch.tensor([[sigma]]), conditioning()).velocity.square().mean()
    else:
        loss = role.module(noisy(), torch.tensor([[1000.0 * sigma]]), conditioning().text)
        loss = loss.square().mean()
    loss.backward()
    role.clip()
    role.step(0, 10)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_a_role_moves_averages_and_saves_only_what_is_its_own() -> None:
    base = build_wan()
    own = [name for name, _ in base.named_parameters() if "self_attn.q" in name]
    base.requires_grad_(False)
    for name in own:
        base.get_parameter(name).requires_grad_(True)
    role = build_role("student", Shared(base), CONFIG, own)
    average, before = EMA(role.parameters, EMAConfig()), copies(base)
    step(role, 0.7)
    average.update(step=0)
    assert changed(before, base) == set(own)
    assert set(role.weights()) == set(own) == set(average.shadow)
    assert set(role.optimizer_state()["state"]) == set(own)


def test_two_roles_on_one_base_do_not_disturb_each_other() -> None:
    base = build_wan()
    names = [name for name, _ in base.named_parameters()]
    queries = [name for name in names if "self_attn.q" in name]
    keys = [name for name in names if "self_attn.k" in name]
    base.requires_grad_(False)
    for name in (*queries, *keys):
        base.get_parameter(name).requires_grad_(True)
    student, critic = (
        build_role(name, Shared(base), CONFIG, own)
        for name, own in (("student", queries), ("critic", keys))
    )
    before = copies(base)
    critic.requires_grad_(False)
    step(student, 0.7)
    critic.requires_grad_(True)
    assert changed(before, base) == set(queries)
    assert all(base.get_parameter(name).grad is None for name in keys)
    student.requires_grad_(False)
    step(critic, 0.7)
    assert changed(before, base) == {*queries, *keys}


@pytest.mark.parametrize("sigma", [0.9, 0.1])
def test_a_role_of_two_networks_trains_the_one_that_was_called(sigma: float) -> None:
    role = build_role("generator", TwoLevels(), CONFIG)
    before = copies(role.module)
    step(role, sigma)
    moved = {name.partition(".")[0] for name in changed(before, role.module)}
    assert moved == {"high" if sigma > 0.5 else "low"}
    assert {name.partition(".")[0] for name in role.weights()} == {"high", "low"}


@pytest.mark.parametrize("kind", ["part", "two"])
def test_a_role_of_any_shape_continues_from_what_it_saved_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    def build() -> Role:
        if kind == "two":
            return build_role("generator", TwoLevels(), CONFIG)
        base = build_wan()
        own = [name for name, _ in base.named_parameters() if "ffn" in name]
        base.requires_grad_(False)
        for name in own:
            base.get_parameter(name).requires_grad_(True)
        return build_role("generator", Shared(base), CONFIG, own)

    straight, first = build(), build()
    for role in (straight, first):
        step(role, 0.9)
    torch.save((first.weights(), first.optimizer_state()), tmp_path / "saved.pt")
    resumed = build()
    resumed.load(*torch.load(tmp_path / "saved.pt", weights_only=False))
    for role in (straight, resumed):
        step(role, 0.1)
        step(role, 0.9)
    assert changed(copies(straight.module), resumed.module) == set()


def test_each_of_two_experts_has_a_role_of_its_own_under_plain_names() -> None:
    network = TwoLevels()
    roles = build_roles("generator", network, CONFIG)
    assert list(roles) == ["generator.high", "generator.low"]
    plain = [name for name, _ in build_wan().named_parameters()]
    assert all(list(role.parameters) == plain for role in roles.values())
    assert all(role.network is network for role in roles.values())
    assert list(parameters_of(roles, "generator")) == [
        n for n, _ in network.model.named_parameters()
    ]
    assert list(build_roles("generator", Shared(build_wan()), CONFIG)) == ["generator"]


@pytest.mark.parametrize("sigma", [0.9, 0.1])
def test_an_expert_that_a_loss_has_not_reached_has_learnt_nothing(sigma: float) -> None:
    network = TwoLevels()
    roles = build_roles("generator", network, CONFIG)
    loss = network(noisy(), torch.tensor([[sigma]]), conditioning()).velocity.square().mean()
    loss.backward()
    reached = ["generator.high" if sigma > 0.5 else "generator.low"]
    assert [name for name, role in roles.items() if role.learnt] == reached
    roles[reached[0]].step(0, 10)
    assert not any(role.learnt for role in roles.values())


def test_of_two_experts_one_alone_may_be_trained() -> None:
    assert list(build_roles("generator", TwoLevels(), CONFIG, sides=("low",))) == ["generator.low"]


def test_experts_own_what_is_named_below_them_and_learn_at_its_rates() -> None:
    network = TwoLevels()
    own = [name for name, _ in network.model.named_parameters() if "self_attn.q" in name]
    roles = build_roles("generator", network, OptimizerConfig(lr=0.1), own, dict.fromkeys(own, 3.0))
    assert list(parameters_of(roles, "generator")) == own
    for role in roles.values():
        role.step(0, 10)
        rates = [group["lr"] for one in role.optimizers for group in one.param_groups]
        assert rates == [pytest.approx(0.3)] * len(rates)
