"""What every method in model/ owes its trainer; a new file is picked up by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.base import DistributionMatching, Method
from model.types import Batch, Conditioning
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.bidirectional import BidirectionalTrainingPipeline
from tests.gaussian import streams_of_step
from tests.methods import methods

WanFactory = Callable[..., WanTransformer]

SHAPE = (16, 3, 4, 4)
SIGMAS = [1.0, 0.625]


METHODS = pytest.mark.parametrize("cls", methods(), ids=lambda cls: cls.__name__)
MATCHING = pytest.mark.parametrize(
    "cls", methods(DistributionMatching), ids=lambda cls: cls.__name__
)


def build(cls: type[Method], tiny_wan: WanFactory) -> Method:
    """The method over miniature networks, each with weights of its own."""
    networks = {role: WanDiffusionWrapper(tiny_wan(seed=i)) for i, role in enumerate(cls.roles)}
    rollout = [BidirectionalTrainingPipeline(SIGMAS)]
    return cls(
        cls.config_class(), networks, *(rollout if issubclass(cls, DistributionMatching) else [])
    )


def batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    texts = [Conditioning(torch.randn(2, 12, 64, generator=rng)) for _ in range(2)]
    return Batch(*texts, SHAPE, x0=torch.randn((2, *SHAPE), generator=rng))


def moved(network: torch.nn.Module) -> list[bool]:
    """For each weight, whether a gradient other than zero reached it."""
    grads = [p.grad for p in network.parameters()]
    return [grad is not None and bool(grad.any()) for grad in grads]


@METHODS
def test_the_generators_loss_is_a_finite_scalar(cls: type[Method], tiny_wan: WanFactory) -> None:
    loss = build(cls, tiny_wan).generator_loss(batch(), streams_of_step(2)).loss
    assert loss.shape == ()
    assert loss.isfinite()


@METHODS
def test_the_generators_gradient_reaches_all_of_it(cls: type[Method], tiny_wan: WanFactory) -> None:
    method = build(cls, tiny_wan)
    method.generator_loss(batch(), streams_of_step(2)).loss.backward()
    assert all(moved(method.generator))


@METHODS
def test_the_generators_gradient_reaches_nothing_else(
    cls: type[Method], tiny_wan: WanFactory
) -> None:
    method = build(cls, tiny_wan)
    method.generator_loss(batch(), streams_of_step(2)).loss.backward()
    others = [role for role in cls.roles if role != "generator"]
    assert not any(any(moved(getattr(method, role))) for role in others)


@METHODS
def test_equal_randomness_gives_an_equal_loss(cls: type[Method], tiny_wan: WanFactory) -> None:
    method = build(cls, tiny_wan)
    losses = [method.generator_loss(batch(), streams_of_step(2)).loss for _ in range(2)]
    assert torch.equal(*losses)


@METHODS
def test_metrics_carry_no_gradient(cls: type[Method], tiny_wan: WanFactory) -> None:
    output = build(cls, tiny_wan).generator_loss(batch(), streams_of_step(2))
    assert not any(value.requires_grad for value in output.metrics.values())


@METHODS
def test_the_batch_is_left_as_it_was(cls: type[Method], tiny_wan: WanFactory) -> None:
    given, copy = batch(), batch()
    build(cls, tiny_wan).generator_loss(given, streams_of_step(2)).loss.backward()
    assert torch.equal(given.x0, copy.x0)
    assert torch.equal(given.conditioning.text, copy.conditioning.text)


@MATCHING
def test_the_critics_loss_is_a_finite_scalar(
    cls: type[DistributionMatching], tiny_wan: WanFactory
) -> None:
    loss = build(cls, tiny_wan).critic_loss(batch(), streams_of_step(2)).loss
    assert loss.shape == ()
    assert loss.isfinite()


@MATCHING
def test_the_critics_gradient_reaches_the_critic_alone(
    cls: type[DistributionMatching], tiny_wan: WanFactory
) -> None:
    method = build(cls, tiny_wan)
    method.critic_loss(batch(), streams_of_step(2)).loss.backward()
    assert all(moved(method.critic))
    assert not any(moved(method.generator) + moved(method.teacher))


@MATCHING
def test_the_generator_stays_where_critic_and_teacher_agree(
    cls: type[DistributionMatching], tiny_wan: WanFactory
) -> None:
    method = build(cls, tiny_wan)
    method.critic = method.teacher
    method.config = cls.config_class(cfg_scale=1.0)
    method.generator_loss(batch(), streams_of_step(2)).loss.backward()
    assert not any(moved(method.generator))
