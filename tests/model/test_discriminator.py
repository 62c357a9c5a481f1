"""Heads on a network's features: their sizes, their losses, their penalties, their mean weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from model.base import Parts
from model.discriminator import (
    AdversarialConfig,
    Discriminator,
    DiscriminatorConfig,
    DiscriminatorHeads,
    DiscriminatorLoss,
    DiscriminatorOutput,
    Pair,
    adversarial_loss,
    discriminate,
    discrimination_loss,
    tapped_layers,
)
from model.dmd import DMD, DMDConfig
from model.families.wan21.release import features_of
from model.options.f_divergence import divergence_weight
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Denoiser, Prediction
from model.wan.config import PRESETS, WanConfig
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from tests.gaussian import Exact, Samples, batch_of, fast_streams, saying

WanFactory = Callable[..., WanTransformer]

SHAPE, SIZE = (4, 1, 1, 2), 20_000  # for toys
DIRECTION = torch.tensor([0.5, -1.0, 0.25, 2.0, -0.5, 0.0, 1.5, -0.75])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- sizes ----


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(1, [0]), (2, [0, 1]), (4, [1, 2, 3]), (30, [13, 21, 29]), (40, [18, 28, 39])],
)
def test_three_layers_are_tapped_where_the_reference_does(
    tiny_config: WanConfig, num_layers: int, layers: list[int]
) -> None:
    config = replace(tiny_config, num_layers=num_layers)
    assert tapped_layers(features_of(config), DiscriminatorConfig()) == layers


def test_layers_can_be_named(tiny_config: WanConfig) -> None:
    config = replace(tiny_config, num_layers=6)
    assert tapped_layers(features_of(config), DiscriminatorConfig(layers=[5, 2])) == [2, 5]


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0], [0, 7]])
def test_layers_that_do_not_exist_are_refused(tiny_config: WanConfig, layers: list[int]) -> None:
    with pytest.raises(ValueError) as caught:
        tapped_layers(features_of(tiny_config), DiscriminatorConfig(layers=layers))
    assert str(caught.value) == (
        f"discriminator.layers: must be different blocks of 0 .. 1, got {layers}"
    )


@pytest.mark.parametrize(("dim", "num_heads", "num_layers"), [(32, 2, 2), (48, 3, 5), (24, 1, 1)])
def test_heads_fit_a_network_of_any_width_and_depth(
    tiny_wan: WanFactory, tiny_config: WanConfig, dim: int, num_heads: int, num_layers: int
) -> None:
    config = replace(tiny_config, dim=dim, num_heads=num_heads, num_layers=num_layers)
    output = output_of(tiny_wan(config), config)
    assert output.logits.shape == (3,)
    assert output.mean_weight.tolist() == [1.0, 1.0, 1.0]


def test_heads_for_the_largest_preset_are_as_wide_as_it() -> None:
    with torch.device("meta"):
        heads = DiscriminatorHeads(features_of(PRESETS["Wan2.1-T2V-14B"]), DiscriminatorConfig())
    assert heads.layers == [18, 28, 39]
    assert heads.hidden.in_features == 3 * 5120
    assert heads.blocks[0].ffn[0].out_features == 4 * 5120  # type: ignore[union-attr, index]


def output_of(
    model: WanTransformer, config: WanConfig, x: Tensor | None = None
) -> DiscriminatorOutput:
    heads = DiscriminatorHeads(features_of(config), DiscriminatorConfig())
    torch.manual_seed(0)
    for p in heads.parameters():
        if p.shape != (10,):
            torch.nn.init.normal_(p, std=0.2)
    x = random(3, 16, 2, 4, 4) if x is None else x
    text = Conditioning(random(len(x), 12, 64, seed=1))
    return Discriminator(heads)(WanDiffusionWrapper(model), x, torch.full((len(x), 1), 0.5), text)


def test_gradients_pass_through_the_network_to_the_samples(
    tiny_wan: WanFactory, tiny_config: WanConfig
) -> None:
    x = random(3, 16, 2, 4, 4).requires_grad_()
    output_of(tiny_wan(), tiny_config, x).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amax(dim=(1, 2, 3, 4)).min() > 0.0


def test_a_samples_logit_does_not_depend_on_its_batch(
    tiny_wan: WanFactory, tiny_config: WanConfig
) -> None:
    x = random(3, 16, 2, 4, 4)
    model = tiny_wan()
    text = Conditioning(random(3, 12, 64, seed=1))
    heads = Discriminator(DiscriminatorHeads(features_of(tiny_config), DiscriminatorConfig()))
    for i, p in enumerate(heads.parameters()):
        p.data.copy_(0.2 * random(*p.shape, seed=i))
    net, sigma = WanDiffusionWrapper(model), torch.full((3, 1), 0.5)
    whole = heads(net, x, sigma, text).logits
    alone = heads(net, x[:1], sigma[:1], Conditioning(text.text[:1])).logits
    torch.testing.assert_close(whole[:1], alone, atol=1e-5, rtol=0.0)
    assert whole.std() > 1e-3


# ---- losses ----


def test_a_generator_wants_a_positive_logit() -> None:
    fake = torch.tensor([0.3, -2.0])
    torch.testing.assert_close(adversarial_loss(fake, None), softplus(-fake).mean())


def test_a_relativistic_generator_wants_more_than_the_real_logit() -> None:
    fake, real = torch.tensor([0.3, -2.0]), torch.tensor([1.0, -3.0])
    expected = softplus(-(fake - real)).mean()
    torch.testing.assert_close(adversarial_loss(fake, real), expected)


def test_a_discriminator_parts_real_from_fake() -> None:
    fake, real = torch.tensor([0.3, -2.0]), torch.tensor([1.0, -3.0])
    expected = softplus(-real).mean() + softplus(fake).mean()
    torch.testing.assert_close(discrimination_loss(fake, real, relativistic=False), expected)
    gap = softplus(-(real - fake)).mean()
    torch.testing.assert_close(discrimination_loss(fake, real, relativistic=True), gap)


# ---- penalties ----


@dataclass(frozen=True, eq=False)
class Toy:
    """A logit that is a function of x [B, D]."""

    logit: Callable[[Tensor], Tensor]

    def __call__(
        self, net: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> DiscriminatorOutput:
        del net, conditioning
        return DiscriminatorOutput(self.logit(x.flatten(1)), torch.ones(len(sigma)))


def linear(x: Tensor) -> Tensor:
    return x @ DIRECTION


def curved(x: Tensor) -> Tensor:
    return (x * DIRECTION).sin().sum(1)


def discriminated(
    logit: Callable[[Tensor], Tensor], config: AdversarialConfig
) -> DiscriminatorLoss:
    pair = Pair(
        random(SIZE, *SHAPE), 1.0 + random(SIZE, *SHAPE, seed=1), torch.ones(SIZE, 1),
        saying(0.0, SIZE),
    )  # fmt: skip
    rng = fast_streams(SIZE, "penalty").samples
    return discriminate(Toy(logit), Exact(), pair, config, rng)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [1.0, 0.01])
def test_of_a_linear_logit_the_penalties_are_the_squared_slope(sigma: float) -> None:
    """In expectation over 20 000 draws, to 3 %, at any size of the step."""
    config = AdversarialConfig(r1_weight=1.0, r2_weight=1.0, r1_sigma=sigma, r2_sigma=sigma)
    metrics = discriminated(linear, config).metrics
    slope = float(DIRECTION.square().sum())
    assert float(metrics["r1"]) == pytest.approx(slope, rel=0.03)
    assert float(metrics["r2"]) == pytest.approx(slope, rel=0.03)


@pytest.mark.parametrize(("name", "offset"), [("r1", 0.0), ("r2", 1.0)])
def test_of_a_curved_logit_they_converge_to_the_gradient_penalty(name: str, offset: float) -> None:
    """To 3 % with a step of 0.01; one of 2 is more than 10 % off."""
    x = (offset + random(SIZE, *SHAPE, seed=int(offset))).flatten(1)
    exact = float(((x * DIRECTION).cos() * DIRECTION).square().sum(1).mean())
    near, far = (
        float(discriminated(curved, AdversarialConfig(False, 1.0, 1.0, s, s)).metrics[name])
        for s in (0.01, 2.0)
    )
    assert near == pytest.approx(exact, rel=0.03)
    assert abs(far / exact - 1.0) > 0.1


def test_the_loss_adds_half_of_each_weighted_penalty() -> None:
    plain = float(discriminated(curved, AdversarialConfig()).loss)
    both = discriminated(curved, AdversarialConfig(r1_weight=3.0, r2_weight=0.5))
    added = 0.5 * (3.0 * float(both.metrics["r1"]) + 0.5 * float(both.metrics["r2"]))
    assert float(both.loss) == pytest.approx(plain + added, rel=1e-5)


def test_without_weights_there_is_no_second_pass() -> None:
    calls = []
    discriminated(lambda x: calls.append(len(x)) or linear(x), AdversarialConfig())  # type: ignore[func-returns-value]
    assert calls == [2 * SIZE]


def test_the_accuracy_counts_both_kinds() -> None:
    found = discriminated(lambda x: 0.0 * linear(x) + 1.0, AdversarialConfig())
    assert float(found.metrics["accuracy"]) == 0.5


# ---- the mean weight of a divergence ----


@dataclass(frozen=True, eq=False)
class Features:
    """A network whose tokens are its input, one of their elements raised by the noise level."""

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        if context.taps is not None:
            raised = 4.0 * sigma[:, :, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
            context.taps.tokens.append(x.flatten(2).transpose(1, 2) + raised)
        return Exact()(x, sigma, conditioning)


def toy_heads() -> Discriminator:
    """One head over tokens of width 4, which gives logits between about -2 and 2."""
    config = WanConfig(dim=4, ffn_dim=8, num_heads=1, num_layers=1, out_dim=4, in_dim=4)
    heads = DiscriminatorHeads(features_of(config), DiscriminatorConfig())
    for i, p in enumerate(heads.parameters()):
        if p.ndim > 1:
            p.data.copy_(random(*p.shape, seed=i))
    torch.nn.init.ones_(heads.logit.weight)
    return Discriminator(heads)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "jeffreys"])
def test_the_mean_weight_becomes_the_mean_of_the_weight_at_each_noise_level(
    divergence: str,
) -> None:
    """Per tenth of the noise range, to 5 %, by AdamW at the heads' small default rate."""
    size, discriminator = 512, toy_heads()
    config = DMDConfig(1.0, 0.0001, 1.0, cfg_scale=1.0, divergence=divergence)  # type: ignore[arg-type]
    samples = Samples(random(size, *SHAPE))
    networks = {"generator": samples, "critic": Exact(), "teacher": Features()}
    networks["discriminator"] = discriminator  # type: ignore[assignment]
    method = DMD(config, Parts(networks, samples.rollout))
    batch = replace(batch_of(size), x0=random(size, *SHAPE, seed=1))
    total, count = torch.zeros(10), torch.zeros(10)
    heads = discriminator.model
    rate = DiscriminatorConfig().lr
    adam = torch.optim.AdamW([heads.mean_weight_bias], lr=rate, weight_decay=0.0)
    for step in range(200):
        rng = fast_streams(size, "mean", step)
        loss = method.critic_loss(batch, rng).loss
        (heads.mean_weight_bias.grad,) = torch.autograd.grad(loss, heads.mean_weight_bias)
        adam.param_groups[0]["lr"] = rate * (1.0 - step / 200)
        adam.step()
        fake = method.noised_sample(batch, fast_streams(size, "mean", step))
        logits = discriminator(Features(), fake.x, fake.sigma, batch.conditioning).logits
        bins = (10.0 * fake.sigma[:, 0]).long().clamp(max=9)
        h = divergence_weight(divergence, logits.detach())  # type: ignore[arg-type]
        total.index_add_(0, bins, h)
        count.index_add_(0, bins, torch.ones(size))
    expected = total / count
    found = 1.0 + heads.mean_weight_scale * heads.mean_weight_bias.detach()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.0)
    assert expected.std() > 0.01


def test_the_level_one_belongs_to_the_last_bin() -> None:
    heads = toy_heads()
    with torch.no_grad():
        heads.model.mean_weight_bias.copy_(torch.arange(10.0) / heads.model.mean_weight_scale)
    sigma = torch.tensor([[0.0], [0.0999], [0.1001], [0.95], [1.0]])
    found = heads(Features(), random(5, *SHAPE), sigma, saying(0.0, 5)).mean_weight
    assert found.tolist() == pytest.approx([1.0, 1.0, 2.0, 10.0, 10.0])


def test_the_mean_weight_learns_nothing_from_the_generators_loss() -> None:
    discriminator = toy_heads()
    samples = Samples(random(8, *SHAPE))
    networks = {"generator": samples, "critic": Exact(), "teacher": Features()}
    networks["discriminator"] = discriminator  # type: ignore[assignment]
    config = DMDConfig(cfg_scale=1.0, divergence="jeffreys")
    method = DMD(config, Parts(networks, samples.rollout))
    batch = Batch(saying(0.0, 8), saying(0.0, 8), SHAPE, x0=random(8, *SHAPE, seed=1))
    method.generator_loss(batch, fast_streams(8, "loss")).loss.backward()
    assert discriminator.model.mean_weight_bias.grad is None
    assert samples.x0.grad is not None
