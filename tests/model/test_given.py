"""Given first frames in every method: clean for all networks, and without any weight in losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.base import Parts
from model.consistency import Consistency, ConsistencyConfig
from model.diffusion import Diffusion, DiffusionConfig
from model.discriminator import Discriminator, DiscriminatorConfig, DiscriminatorHeads
from model.dmd import DMD, DMDConfig
from model.families.wan21.release import features_of
from model.given import OnGiven, begin_with, both_given, learnt, on_given
from model.ode import ODE, ODEConfig
from model.phased_dmd import PhasedDMD
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Prediction, Sample
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from tests.conftest import MINIATURE, random_value
from tests.gaussian import SHAPE, Called, Said, Watched, batch_of, saying, streams_of_step
from tests.model import test_method_contract as contract
from tests.model.test_method_contract import Case, parametrized
from utils.weights import fill_weights

WanFactory = Callable[..., WanTransformer]
FRAMES = contract.SHAPE[1]


def begins(case: Case) -> bool:
    """Whether its videos may begin with given frames: no model of two experts takes any."""
    return not issubclass(case.cls, PhasedDMD)


METHODS = parametrized(begins)
ALTERNATING = parametrized(lambda case: begins(case) and case.needs.trained != ("generator",))


class Probed(nn.Module):
    """A denoiser with a constant added to all that it says of a frame; it keeps what it saw."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.probe = nn.Parameter(torch.zeros(FRAMES))
        self.calls: list[Called] = []

    def forward(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *, context: Context
    ) -> Prediction:
        """What the network says, and the constants of its frames."""
        self.calls.append(Called(x, sigma, conditioning, context, torch.is_grad_enabled()))
        said = self.net(x, sigma, conditioning, context=context)
        index = torch.arange(x.shape[2]) if context.frame_index is None else context.frame_index
        constant = self.probe[index][None, None, :, None, None]
        return Prediction(said.x0 + constant, said.velocity + constant)


def build(case: Case, tiny_wan: WanFactory) -> Any:
    """A method whose networks take given frames."""
    networks: dict[str, nn.Module] = {
        role: Probed(WanDiffusionWrapper(tiny_wan(seed=i)))
        for i, role in enumerate(case.needs.networks)
    }
    if case.needs.heads:
        contract.give_heads(networks["generator"].get_submodule("net.model"), case.needs.heads)
    if case.needs.backbone is not None:
        heads = DiscriminatorHeads(features_of(MINIATURE), DiscriminatorConfig())
        fill_weights(heads, lambda name, shape: random_value(name, shape, seed=9))
        networks["discriminator"] = Discriminator(heads)
    parts = Parts(networks, contract.rollout(case), contract.SIGMAS, case.layout, takes_given=True)
    return case.cls(case.config, parts)


def batch(case: Case) -> Batch:
    """Two samples that begin with a frame, of their data where they have some."""
    made = contract.batch(case)
    clean = made.x0 if made.trajectory is None else made.trajectory[:, -1]
    given = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return replace(made, given=given if clean is None else clean[:, :, :1])


def gradients(loss: Tensor, method: Any, role: str) -> Tensor:
    (found,) = torch.autograd.grad(loss, method.parts.networks[role].probe)
    return found


@METHODS
def test_no_gradient_comes_from_given_frames(case: Case, tiny_wan: WanFactory) -> None:
    method = build(case, tiny_wan)
    loss = method.generator_loss(batch(case), streams_of_step(2)).loss
    found = gradients(loss, method, "generator")
    assert float(found[0]) == 0.0
    assert bool((found[1:] != 0.0).all())


@METHODS
def test_what_a_network_says_of_given_frames_changes_no_bit(
    case: Case, tiny_wan: WanFactory
) -> None:
    method = build(case, tiny_wan)
    before = method.generator_loss(batch(case), streams_of_step(2))
    for role in case.needs.networks:
        with torch.no_grad():
            method.parts.networks[role].probe[0] = 10.0
    after = method.generator_loss(batch(case), streams_of_step(2))
    assert torch.equal(before.loss, after.loss)
    assert all(torch.equal(before.metrics[name], after.metrics[name]) for name in before.metrics)


def seen_clean(call: Called, given: Tensor) -> bool:
    """Whether a pass saw the given frames as they are, wherever it saw the video's beginning."""
    index = call.context.frame_index
    index = torch.arange(call.x.shape[2]) if index is None else index
    first = (index == 0).nonzero()[:, 0]
    times = len(call.x) // len(given)
    frames = call.x[:, :, first]
    levels = call.sigma.expand(-1, len(index))[:, first]
    return torch.equal(frames, given.repeat(times, 1, len(first), 1, 1)) and not levels.any()


@METHODS
def test_every_network_sees_given_frames_clean(case: Case, tiny_wan: WanFactory) -> None:
    method, begun = build(case, tiny_wan), batch(case)
    assert begun.given is not None
    method.generator_loss(begun, streams_of_step(2))
    if hasattr(method, "critic_loss"):
        method.critic_loss(begun, streams_of_step(2))
    for role in case.needs.networks:
        calls = method.parts.networks[role].calls
        assert calls
        assert all(seen_clean(call, begun.given) for call in calls)


@ALTERNATING
def test_the_opponent_learns_nothing_about_given_frames(case: Case, tiny_wan: WanFactory) -> None:
    method = build(case, tiny_wan)
    before = method.critic_loss(batch(case), streams_of_step(2))
    if "critic" in case.needs.trained and case.needs.backbone != "critic":
        found = gradients(before.loss, method, "critic")
        assert float(found[0]) == 0.0
        assert bool((found[1:] != 0.0).all())
    for role in case.needs.networks:
        with torch.no_grad():
            method.parts.networks[role].probe[0] = 10.0
    after = method.critic_loss(batch(case), streams_of_step(2))
    assert torch.equal(before.loss, after.loss)


def test_models_that_do_not_take_given_frames_see_them_noised() -> None:
    """As causal students of text-to-video teachers are trained: no loss is on the frame."""
    sample = Sample(torch.ones(2, *SHAPE), given_frames=1)
    assert Parts({"generator": None}).clean_frames(sample) is None
    taken = Parts({"generator": None}, takes_given=True)
    assert taken.clean_frames(Sample(sample.x0)) is None
    found = taken.clean_frames(sample)
    assert found is not None
    assert torch.equal(found, sample.x0[:, :, :1])


def test_a_network_says_nothing_of_given_frames() -> None:
    given, x = torch.full((2, 2, 1, 4, 4), 7.0), torch.randn(4, *SHAPE)
    told = OnGiven(Said(3.0), given)(x, torch.full((4, 1), 0.5), saying(0.0, 4))
    assert torch.equal(told.velocity[:, :, :1], torch.zeros(4, 2, 1, 4, 4))
    assert torch.equal(told.x0[:, :, :1], given.repeat(2, 1, 1, 1, 1))
    assert torch.equal(told.velocity[:, :, 1:], torch.full((4, 2, 2, 4, 4), 3.0))
    assert torch.equal(told.x0[:, :, 1:], x[:, :, 1:] - 1.5)


def test_without_given_frames_nothing_is_wrapped() -> None:
    net, x = Said(), torch.randn(2, *SHAPE)
    assert on_given(net, None) is net
    assert begin_with(None, x) is x
    assert learnt(x, 0) is x
    assert both_given(x, None) is None


def test_real_and_generated_videos_begin_with_their_own_frames() -> None:
    real, given = torch.randn(2, *SHAPE), torch.randn(2, 2, 1, 4, 4)
    both = both_given(real, given)
    assert both is not None
    assert torch.equal(both, torch.cat([real[:, :, :1], given]))


SIZE = 600


def levels_of_given_frames(share: float) -> tuple[Tensor, Called, Tensor]:
    """Levels [B] at which a diffusion batch sees its given frames, the call, and the frames."""
    net = Watched(Said())
    x0 = torch.full((SIZE, *SHAPE), 3.0)
    method = Diffusion(DiffusionConfig(given_noise=share), Parts({"generator": net}))
    begun = replace(batch_of(SIZE), x0=x0, given=x0[:, :, :1])
    method.generator_loss(begun, streams_of_step(SIZE))
    (call,) = net.calls
    return call.sigma[:, 0], call, x0[:, :, :1]


def test_given_frames_are_noised_a_little_as_often_as_asked() -> None:
    levels, call, given = levels_of_given_frames(0.2)
    noised = levels > 0.0
    assert float(noised.float().mean()) == pytest.approx(0.2, abs=0.05)
    logs = levels[noised].log()
    assert float(logs.mean()) == pytest.approx(-3.5, abs=0.15)
    assert float(logs.std()) == pytest.approx(0.5, abs=0.1)
    frames = call.x[:, :, :1]
    assert torch.equal(frames[~noised], given[~noised])
    level = levels[noised].view(-1, 1, 1, 1, 1)
    noise = (frames[noised] - (1.0 - level) * given[noised]) / level
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)


def test_given_frames_are_clean_unless_asked() -> None:
    levels, call, given = levels_of_given_frames(0.0)
    assert not levels.any()
    assert torch.equal(call.x[:, :, :1], given)


def test_the_option_moves_no_other_draw() -> None:
    (_, without, _), (_, with_, _) = (levels_of_given_frames(share) for share in (0.0, 0.2))
    assert torch.equal(without.x[:, :, 1:], with_.x[:, :, 1:])
    assert torch.equal(without.sigma[:, 1:], with_.sigma[:, 1:])


def test_positions_and_caches_pass_through() -> None:
    net = Watched(Said())
    context = replace(FULL_ATTENTION, frame_index=torch.arange(3), level=0.5)
    x = torch.randn(1, *SHAPE)
    OnGiven(net, x[:, :, :1])(x, torch.full((1, 1), 0.5), saying(0.0, 1), context=context)
    (call,) = net.calls
    assert call.context.frame_index is context.frame_index
    assert call.context.level is None  # there is no level of all frames


def constant_batch(value: float) -> Batch:
    """Videos of one value, that begin with a frame of their own, and straight paths to them."""
    x0 = torch.full((SIZE, *SHAPE), value)
    states = torch.stack([torch.zeros_like(x0), torch.zeros_like(x0), x0], dim=1)
    return replace(batch_of(SIZE), x0=x0, given=x0[:, :, :1], trajectory=states)


def test_given_frames_do_not_thin_out_the_loss_of_diffusion() -> None:
    """The mean of (2 - (noise - x0))^2 over the other frames is 1 + 5^2."""
    method = Diffusion(DiffusionConfig(), Parts({"generator": Said(2.0)}))
    loss = method.generator_loss(constant_batch(3.0), streams_of_step(SIZE)).loss
    assert float(loss.detach()) == pytest.approx(26.0, rel=0.02)


def test_given_frames_do_not_thin_out_the_loss_of_trajectories() -> None:
    """Everything but the given frame is predicted as 0."""
    method = ODE(ODEConfig(), Parts({"generator": Said()}, sigmas=[1.0, 0.5]))
    loss = method.generator_loss(constant_batch(3.0), streams_of_step(SIZE)).loss
    assert float(loss.detach()) == pytest.approx(9.0)


def test_given_frames_do_not_thin_out_the_loss_of_consistency() -> None:
    """Of a network that says velocity 1, x0 is x - sigma, and the target a step further along."""
    config = ConsistencyConfig(cfg_scale=1.0, grid=1, timestep_shift=1.0)
    parts = Parts({"generator": Said(1.0), "teacher": Said(3.0)})
    loss = (
        Consistency(config, parts).generator_loss(constant_batch(3.0), streams_of_step(SIZE)).loss
    )
    # From level 1 to level 0 in one step of the teacher: x - 3, where the student said x - 1.
    assert float(loss.detach()) == pytest.approx(4.0, rel=1e-5)


def test_given_frames_do_not_thin_out_the_critics_loss_nor_the_normaliser() -> None:
    def rollout(*_: object, **__: object) -> Sample:
        x0 = torch.full((SIZE, *SHAPE), 3.0, requires_grad=True)
        return Sample(x0, given_frames=1)

    networks = {"generator": Said(), "critic": Said(2.0), "teacher": Said(1.0)}
    config = DMDConfig(cfg_scale=1.0, timestep_shift=1.0, min_sigma=0.5, max_sigma=0.5)
    method = DMD(config, Parts(networks, rollout, takes_given=True))
    critic = method.critic_loss(batch_of(SIZE), streams_of_step(SIZE))
    assert float(critic.loss.detach()) == pytest.approx(26.0, rel=0.02)
    output = method.generator_loss(batch_of(SIZE), streams_of_step(SIZE))
    # Critic and teacher differ by sigma = 0.5 in every frame that was made; mean |x0 - teacher| of
    # those frames is |0.5 (x0 - noise) + 0.5| = mean |2 - 0.5 n| = 2.0 and a little.
    expected = 0.5 / torch.randn(10**6).mul(0.5).sub(2.0).abs().mean()
    assert float(output.metrics["dmd_gradient"]) == pytest.approx(float(expected), rel=0.02)
