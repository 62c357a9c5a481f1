"""The seam of distribution matching's options: where each part of one enters, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.base import Needs, Parts
from model.causvid import CausVid, CausVidConfig
from model.discriminator import AdversarialConfig
from model.dmd import DMD, DMDConfig
from model.matching import Comparison, Effect, NoisedSample, Option, made_frames
from model.options.adversarial import AdversarialOption
from model.options.ida import IDA
from model.sid import SiD, SiDConfig
from model.types import Batch, LossOutput
from tests.gaussian import SHAPE, Exact, Samples, batch_of, fast_streams
from utils.seeding import StepRNG

SIZE = 4


class Doubles(Option):
    """Doubles the gradient, adds 3 to the generator's loss and 5 and 7 to the critic's."""

    @classmethod
    def asked(cls, config: DMDConfig) -> bool:
        return config.cfg_scale == 1.0

    @classmethod
    def needs(cls, config: DMDConfig, needs: Needs) -> Needs:
        del config
        return replace(needs, latents=True)

    def on_generator(self, at: Comparison) -> Effect:
        sample, _ = made_frames(at.sample, at.scores)
        return Effect(
            lambda gradient: 2.0 * gradient,
            LossOutput(0.0 * sample.x0.sum() + 3.0, {"doubles": torch.tensor(3.0)}),
        )

    def on_critic(self, fake: NoisedSample, batch: Batch, rng: StepRNG) -> Iterator[LossOutput]:
        del batch, rng
        yield LossOutput(0.0 * fake.x0.sum() + 5.0, {"five": torch.tensor(5.0)})
        yield LossOutput(torch.tensor(7.0))

    def after_update(self, role: str) -> None:
        self.parts.networks[role].x0.data.fill_(1.0)


class AddsOne(Option):
    """Adds one to the gradient."""

    @classmethod
    def asked(cls, config: DMDConfig) -> bool:
        del config
        return True

    def on_generator(self, at: Comparison) -> Effect:
        del at
        return Effect(lambda gradient: gradient + 1.0)


class Doubled(DMD):
    """DMD with one option."""

    takes = (Doubles,)


class DoubledThenRaised(DMD):
    """DMD with two."""

    takes = (Doubles, AddsOne)


def networks() -> dict[str, object]:
    samples = Samples(fast_streams(SIZE, "samples").samples.randn(SHAPE))
    return {"generator": samples, "critic": Exact(2.0), "teacher": Exact(1.0)}


def build(cls: type[DMD], config: DMDConfig) -> DMD:
    roles = networks()
    return cls(config, Parts(roles, roles["generator"].rollout))  # type: ignore[attr-defined]


def gradient(method: DMD) -> tuple[Tensor, LossOutput]:
    """Of the generator's loss in its samples, in units of DMD's gradient; and the loss."""
    output = method.generator_loss(batch_of(SIZE), fast_streams(SIZE, "loss"))
    found = torch.autograd.grad(output.loss, method.generator.x0)[0]
    return found * found.numel(), output


ON, OFF = DMDConfig(cfg_scale=1.0), DMDConfig(cfg_scale=2.0)


def test_an_option_adjusts_the_gradient_and_adds_its_term_and_its_metrics() -> None:
    (plain, output), (doubled, other) = (gradient(build(cls, ON)) for cls in (DMD, Doubled))
    torch.testing.assert_close(doubled, 2.0 * plain)
    assert float(other.loss.detach()) == pytest.approx(4.0 * float(output.loss.detach()) + 3.0)
    assert list(other.metrics) == [*output.metrics, "doubles"]


def test_options_act_in_the_order_in_which_they_are_taken() -> None:
    (plain, _), (both, _) = (gradient(build(cls, ON)) for cls in (DMD, DoubledThenRaised))
    torch.testing.assert_close(both, 2.0 * plain + 1.0)


def test_an_option_adds_terms_to_the_critics_loss_whose_own_part_is_then_shown() -> None:
    plain, other = (
        build(cls, ON).critic_loss(batch_of(SIZE), fast_streams(SIZE, "loss"))
        for cls in (DMD, Doubled)
    )
    assert float(other.loss) == pytest.approx(float(plain.loss) + 12.0)
    assert not plain.metrics
    assert float(other.metrics["denoising"]) == float(plain.loss)
    assert set(other.metrics) == {"five", "denoising"}


def test_an_option_says_what_it_needs_and_acts_after_updates() -> None:
    assert Doubled.needs(ON) == replace(DMD.needs(ON), latents=True)
    method = build(Doubled, ON)
    method.after_update("generator")
    assert bool((method.generator.x0 == 1.0).all())


def test_an_option_that_is_not_asked_for_does_nothing() -> None:
    assert Doubled.needs(OFF) == DMD.needs(OFF)
    left, right = (gradient(build(cls, OFF)) for cls in (DMD, Doubled))
    assert torch.equal(left[0], right[0])
    assert torch.equal(left[1].loss, right[1].loss)


@pytest.mark.parametrize("cls", [DMD, CausVid])
def test_no_option_is_on_by_default(cls: type[DMD]) -> None:
    assert not [option for option in cls.takes if option.asked(cls.config_class())]


@pytest.mark.parametrize(("settings", "asked"), [
    ({"gan_weight": 0.1}, [AdversarialOption]),
    ({"divergence": "jeffreys"}, [AdversarialOption]),
    ({"adversarial": AdversarialConfig(relativistic=True)}, []),
    ({"critic_pull": 0.1}, [IDA]),
    ({"critic_pull": 0.1, "gan_weight": 0.1}, [AdversarialOption, IDA]),
])  # fmt: skip
def test_each_setting_turns_on_its_option(
    settings: dict[str, object], asked: list[type[Option]]
) -> None:
    for cls in (DMD, CausVid):
        config = cls.config_class(**settings)
        assert [option for option in cls.takes if option.asked(config)] == asked


def test_causvid_takes_the_options_of_dmd() -> None:
    assert CausVid.takes == DMD.takes
    needs = CausVid.needs(CausVidConfig(gan_weight=0.1, critic_pull=0.1))
    assert (needs.backbone, needs.same_architecture) == ("teacher", ("generator", "critic"))


def test_a_loss_whose_gradient_is_autograds_own_cannot_be_adjusted() -> None:
    class Adjusted(SiD):
        takes = (AddsOne,)

    roles = networks()
    method = Adjusted(SiDConfig(), Parts(roles, roles["generator"].rollout))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="no option can adjust it"):
        method.generator_loss(batch_of(SIZE), fast_streams(SIZE, "loss"))


def test_the_critics_own_parameters_are_pulled_after_the_generator_alone() -> None:
    own = {"generator": [nn.Parameter(torch.ones(3))], "critic": [nn.Parameter(torch.zeros(3))]}
    ida = IDA(DMDConfig(critic_pull=0.25), Parts({}, parameters=own))
    ida.after_update("generator")
    assert own["critic"][0].tolist() == [0.25] * 3
    assert own["generator"][0].tolist() == [1.0] * 3
    ida.after_update("critic")
    assert own["critic"][0].tolist() == [0.25] * 3


def test_roles_whose_parameters_differ_in_number_cannot_be_pulled() -> None:
    own = {"generator": [nn.Parameter(torch.ones(3))], "critic": []}
    with pytest.raises(ValueError, match="zip"):
        IDA(DMDConfig(critic_pull=0.25), Parts({}, parameters=own)).after_update("generator")
