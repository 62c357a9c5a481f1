"""Roles as adapters on one frozen network: the same losses, projected gradients, whole resumption."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.adapters import OnAdapters, pairs
from tests.runs import (
    CONFIGS,
    assert_same_end,
    built,
    cut_after,
    read_state,
    refusal,
    run,
    step_folder,
)
from trainer.base import Trainer

BOTH = ("generator.adapter.rank=3", "critic.adapter.rank=2")
ALL_LAYERS = ("generator.adapter.targets=blocks+embeddings",)
Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]  # role -> layer -> a, b

RELATIVE = 1e-6  # of a loss
GRADIENT = 2e-6  # of a role's gradients as one vector: fp32 through four layers


def overrides(method: str) -> tuple[str, ...]:
    """What makes adapters of all that a method trains."""
    has_critic = "score_distillation" in CONFIGS[method]
    words = BOTH if has_critic else BOTH[:1]
    return (*words, "loss.critic_pull=0") if method == "dmd_fdistill" else words


def give_values(trainer: Trainer) -> None:
    """Values to all adapters, of a size that matters."""
    for role in trainer.roles:
        for layer, name, pair in pairs(trainer.roles[role].module):
            rng = torch.Generator().manual_seed(len(layer) + 100 * len(name))
            for factor in (pair.a, pair.b):
                factor.data = 0.2 * torch.randn(factor.shape, generator=rng)


def deltas(trainer: Trainer) -> Factors:
    """Each role's factors by layer."""
    return {
        role: {
            layer: (pair.a.detach().clone(), pair.b.detach().clone())
            for layer, name, pair in pairs(held.module)
            if name == role
        }
        for role, held in trainer.roles.items()
    }


def step_gradients(trainer: Trainer) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """For each phase of step 2, at which all move: role, loss, gradients by name."""
    for phase in trainer.phases(2):
        with trainer.only_trainable(phase.roles):
            trainer.accumulate(phase)
        for role in phase.roles:
            held = trainer.roles[role].parameters
            grads = {n: p.grad.clone() for n, p in held.items() if p.grad is not None}
            for parameter in held.values():
                parameter.grad = None
            loss = trainer.metrics.read()[f"{phase.name}/loss"]
            trainer.metrics.count_step()
            yield f"{phase.name} {role}", loss, grads
            break  # of a phase's roles the others are discriminators


def gradients(
    config: Path, logdir: Path, words: tuple[str, ...], factors: Factors
) -> list[tuple[str, float, dict[str, Tensor]]]:
    """Of a run with adapters, whose `factors` are noted; or of whole networks that have them."""
    with built(config, logdir, *words) as trainer:
        if words:
            give_values(trainer)
            factors.update(deltas(trainer))
        else:
            merge(trainer, factors)
        return list(step_gradients(trainer))


def merge(trainer: Trainer, factors: Factors) -> None:
    """Add what adapters add to the weights of each role's own network."""
    for role, layers in factors.items():
        for layer, (a, b) in layers.items():
            trainer.roles[role].module.get_parameter(f"{layer}.weight").data += b @ a


@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "dmd_fdistill"])
def test_gradients_of_adapters_are_those_of_whole_weights_projected(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    """Three roles on one base against three networks into which their adapters are merged."""
    factors: Factors = {}
    found = gradients(configs[method], tmp_path / "adapters", overrides(method), factors)
    gc.collect()  # LMDB opens a folder once
    expected = gradients(configs[method], tmp_path / "merged", (), factors)
    assert [phase for phase, _, _ in found] == [phase for phase, _, _ in expected]
    for (phase, loss, ours), (_, merged_loss, whole) in zip(found, expected, strict=True):
        assert loss == pytest.approx(merged_loss, rel=RELATIVE), phase
        role = phase.split()[1]
        if role not in factors or not factors[role]:
            continue  # a discriminator
        projected = {}
        for layer, (a, b) in factors[role].items():
            gradient = whole[f"{layer}.weight"]
            projected[f"{layer}.adapters.{role}.a"] = b.T @ gradient
            projected[f"{layer}.adapters.{role}.b"] = gradient @ a.T
        assert ours.keys() == projected.keys()
        difference = sum((ours[n] - projected[n]).square().sum() for n in ours) ** 0.5
        size = sum(value.square().sum() for value in projected.values()) ** 0.5
        assert difference < GRADIENT * size, phase
