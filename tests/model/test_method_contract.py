"""What every method in model/ owes its trainer; a new file is picked up by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from model.base import Method, MethodConfig, Needs, Parts
from model.causvid import CausVidConfig
from model.discriminator import (
    AdversarialConfig,
    Discriminator,
    DiscriminatorConfig,
    DiscriminatorHeads,
)
from model.dmd import DMDConfig
from model.families.wan21.release import features_of
from model.gan import GANConfig
from model.matching import DistributionMatching
from model.pdd import PDDConfig
from model.types import Batch, Conditioning, Rollout
from model.wan.heads import BIAS, WEIGHT, declare_heads
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.blocks import CausalConfig
from pipeline.build import ROLLOUTS, Sampling
from tests.conftest import MINIATURE, random_value
from tests.gaussian import streams_of_step
from tests.methods import methods
from utils.weights import fill_weights

WanFactory = Callable[..., WanTransformer]

SHAPE = (16, 3, 4, 4)
SIGMAS = [1.0, 0.625]
BLOCKS = CausalConfig(num_frame_per_block=2, independent_first_frame=True)

# Settings under which a method needs or does something else than by default, by its file.
RIVALS = AdversarialConfig(relativistic=True, r1_weight=1.0, r2_weight=1.0)
VARIANTS: dict[str, dict[str, MethodConfig]] = {
    "dmd": {
        "gan": DMDConfig(gan_weight=0.5, adversarial=RIVALS),
        "forward_kl": DMDConfig(divergence="forward_kl"),
    },
    "causvid": {"gan": CausVidConfig(gan_weight=0.5, teacher_forcing=True)},
    "pdd": {
        "midpoint": PDDConfig(grid=12, solver="midpoint", calls=[3], uncond_skips=[1]),
        "one": PDDConfig(grid=8, learn="one"),
    },
    "gan": {
        "relativistic": GANConfig(adversarial=RIVALS),
        "teacher": GANConfig(backbone="teacher"),
    },
}


@dataclass(frozen=True)
class Case:
    """A method, its settings, and how its generator sees a video."""

    cls: type[Method]
    config: MethodConfig
    layout: CausalConfig | None
    title: str

    @property
    def needs(self) -> Needs:
        return self.cls.needs(self.config)

    @property
    def passes_through_others(self) -> bool:
        """Whether the generator's gradient comes through the networks of other roles."""
        matching = issubclass(self.cls, DistributionMatching) and self.cls.scores_need_grad
        return matching or self.needs.backbone is not None


def cases() -> Iterator[Case]:
    """Every method, as it is and in its variants, bidirectional and causal."""
    for cls in methods():
        name = cls.__module__.removeprefix("model.")
        configs = {"": cls.config_class(), **VARIANTS.get(name, {})}
        for variant, config in configs.items():
            whole_alone = any(config.run_problems(steps=1000, causal=True))
            for layout in (None,) if whole_alone else (None, BLOCKS):
                kind = "whole" if layout is None else "blocks"
                yield Case(cls, config, layout, "-".join(filter(None, (name, variant, kind))))


def parametrized(wanted: Callable[[Case], bool]) -> pytest.MarkDecorator:
    found = [case for case in cases() if wanted(case)]
    return pytest.mark.parametrize("case", found, ids=[case.title for case in found])


METHODS = parametrized(lambda _: True)
DIRECT = parametrized(lambda case: not case.passes_through_others)
MATCHING = parametrized(
    lambda case: issubclass(case.cls, DistributionMatching) and case.needs.backbone is None
)
ALTERNATING = parametrized(lambda case: case.needs.trained != ("generator",))


def build(case: Case, tiny_wan: WanFactory) -> Any:
    """The method over miniature networks, each with weights of its own, and what else it needs."""
    networks: dict[str, torch.nn.Module] = {
        role: WanDiffusionWrapper(tiny_wan(seed=i)) for i, role in enumerate(case.needs.networks)
    }
    if case.needs.heads:
        give_heads(networks["generator"].get_submodule("model"), case.needs.heads)
    if case.needs.backbone is not None:
        heads = DiscriminatorHeads(features_of(MINIATURE), DiscriminatorConfig())
        fill_weights(heads, lambda name, shape: random_value(name, shape, seed=9))
        networks["discriminator"] = Discriminator(heads)
    return case.cls(case.config, Parts(networks, rollout(case), SIGMAS, case.layout))


def give_heads(model: torch.nn.Module, heads: int) -> None:
    declare_heads(model, heads, plain=False)
    fill_weights(model, lambda name, shape: random_value(name, shape, seed=3), [WEIGHT, BIAS])


def rollout(case: Case) -> Rollout | None:
    if case.needs.rollout is None:
        return None
    sampling = Sampling(SIGMAS, case.layout)
    return ROLLOUTS[case.needs.rollout](sampling, **case.needs.rollout_options)


def batch(case: Case) -> Batch:
    """Two samples with what the method asks for, and nothing else."""
    rng = torch.Generator().manual_seed(0)
    texts = [Conditioning(torch.randn(2, 12, 64, generator=rng)) for _ in range(2)]
    states = torch.randn((2, len(SIGMAS) + 1, *SHAPE), generator=rng)
    return Batch(
        *texts,
        SHAPE,
        x0=states[:, -1] if case.needs.latents else None,
        trajectory=states if case.needs.trajectories else None,
    )


def unmoved(network: torch.nn.Module) -> list[str]:
    """The weights that no gradient other than zero reached."""
    return [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def untouched(network: torch.nn.Module) -> bool:
    """Whether no gradient other than zero reached any weight."""
    return len(unmoved(network)) == len(list(network.parameters()))


@METHODS
def test_the_generator_is_trained_and_whatever_else_is_trained_is_there(case: Case) -> None:
    needs = case.needs
    assert needs.trained[0] == needs.networks[0] == "generator"
    assert set(needs.trained) <= set(needs.roles)
    assert needs.backbone is None or needs.backbone in needs.networks


@METHODS
def test_the_generators_loss_is_a_finite_scalar(case: Case, tiny_wan: WanFactory) -> None:
    loss = build(case, tiny_wan).generator_loss(batch(case), streams_of_step(2)).loss
    assert loss.shape == ()
    assert loss.isfinite()


@METHODS
def test_the_generators_gradient_reaches_all_of_it(case: Case, tiny_wan: WanFactory) -> None:
    method = build(case, tiny_wan)
    method.generator_loss(batch(case), streams_of_step(2)).loss.backward()
    assert unmoved(method.generator) == []


@METHODS
def test_the_generators_gradient_does_not_need_those_of_other_roles(
    case: Case, tiny_wan: WanFactory
) -> None:
    """The trainer freezes them in this phase."""
    free, frozen = build(case, tiny_wan), build(case, tiny_wan)
    for role, network in frozen.parts.networks.items():
        network.requires_grad_(role == "generator")
    for method in (free, frozen):
        method.generator_loss(batch(case), streams_of_step(2)).loss.backward()
    pairs = zip(free.generator.parameters(), frozen.generator.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad)
    others = [net for role, net in frozen.parts.networks.items() if role != "generator"]
    assert all(p.grad is None for network in others for p in network.parameters())


@DIRECT
def test_the_generators_gradient_reaches_nothing_else(case: Case, tiny_wan: WanFactory) -> None:
    method = build(case, tiny_wan)
    method.generator_loss(batch(case), streams_of_step(2)).loss.backward()
    others = [net for role, net in method.parts.networks.items() if role != "generator"]
    assert all(untouched(network) for network in others)


@METHODS
def test_equal_randomness_gives_an_equal_loss(case: Case, tiny_wan: WanFactory) -> None:
    method = build(case, tiny_wan)
    losses = [method.generator_loss(batch(case), streams_of_step(2)).loss for _ in range(2)]
    assert torch.equal(*losses)


@METHODS
def test_metrics_carry_no_gradient(case: Case, tiny_wan: WanFactory) -> None:
    output = build(case, tiny_wan).generator_loss(batch(case), streams_of_step(2))
    assert not any(value.requires_grad for value in output.metrics.values())


@METHODS
def test_the_batch_is_left_as_it_was(case: Case, tiny_wan: WanFactory) -> None:
    given, copy = batch(case), batch(case)
    build(case, tiny_wan).generator_loss(given, streams_of_step(2)).loss.backward()
    for name in ("x0", "trajectory"):
        left, right = getattr(given, name), getattr(copy, name)
        assert left is right is None or torch.equal(left, right)
    assert torch.equal(given.conditioning.text, copy.conditioning.text)
    assert torch.equal(given.unconditional.text, copy.unconditional.text)


@ALTERNATING
def test_the_opponents_loss_is_a_finite_scalar(case: Case, tiny_wan: WanFactory) -> None:
    output = build(case, tiny_wan).critic_loss(batch(case), streams_of_step(2))
    assert output.loss.shape == ()
    assert output.loss.isfinite()
    assert not any(value.requires_grad for value in output.metrics.values())


def idle(case: Case) -> set[str]:
    """The opponents' weights that their loss need not move."""
    found = set()
    if case.needs.backbone is not None and case.config.adversarial.relativistic:  # type: ignore[attr-defined]
        found.add("discriminator.model.logit.bias")  # only differences of logits matter
    if isinstance(case.config, GANConfig):  # no divergence is weighed, no velocity is read
        found |= {"discriminator.model.mean_weight_bias", "critic.model.head.modulation"}
        found |= {"critic.model.head.head.weight", "critic.model.head.head.bias"}
    return found


@ALTERNATING
def test_the_opponents_gradient_reaches_all_of_them_and_the_generator_not_at_all(
    case: Case, tiny_wan: WanFactory
) -> None:
    method = build(case, tiny_wan)
    for role, network in method.parts.networks.items():
        network.requires_grad_(role in case.needs.trained)
    method.critic_loss(batch(case), streams_of_step(2)).loss.backward()
    opponents = [role for role in case.needs.trained if role != "generator"]
    found = {f"{role}.{n}" for role in opponents for n in unmoved(method.parts.networks[role])}
    assert found <= idle(case)
    others = [net for role, net in method.parts.networks.items() if role not in opponents]
    assert all(p.grad is None for network in others for p in network.parameters())


def size(network: torch.nn.Module) -> float:
    """The norm of a network's whole gradient."""
    grads = [p.grad for p in network.parameters()]
    return float(torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None]))


@MATCHING
def test_the_generator_stays_where_critic_and_teacher_agree(
    case: Case, tiny_wan: WanFactory
) -> None:
    unguided = replace(case, config=case.cls.config_class(cfg_scale=1.0))
    agreed, other = build(unguided, tiny_wan), build(unguided, tiny_wan)
    agreed.critic = agreed.teacher
    for method in (agreed, other):
        method.generator_loss(batch(case), streams_of_step(2)).loss.backward()
    assert size(agreed.generator) < 1e-5 * size(other.generator)
