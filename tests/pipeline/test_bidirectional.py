"""The training rollout and its inference twin."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from model.causvid import CausVidConfig
from model.dmd import DMDConfig
from model.flow import step_sigmas
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction, Walk
from pipeline.bidirectional import BidirectionalInferencePipeline, BidirectionalTrainingPipeline
from pipeline.build import ROLLOUTS, SAMPLERS, Sampling
from pipeline.protocol import sample
from tests.gaussian import (
    CPU,
    SHAPE,
    Affine,
    Exact,
    batch_of,
    fast_streams,
    saying,
    streams,
    streams_of_step,
)
from tests.gaussian import Watched as Called
from utils.seeding import step_rng

SIGMAS = step_sigmas([1000, 750, 500, 250], 5.0)


@dataclass(eq=False)
class Watched:
    """A denoiser that notes at which level, and whether under autograd, it was called."""

    net: Denoiser
    calls: list[tuple[float, bool]] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        self.calls.append((float(sigma[0, 0]), torch.is_grad_enabled()))
        return self.net(x, sigma, conditioning, context=context)


def rollout(net: Denoiser, step: int, *, grad: bool = True, size: int = 2) -> Tensor:
    pipeline = BidirectionalTrainingPipeline(SIGMAS)
    return pipeline(net, batch_of(size, mean=2.0), streams_of_step(size, step), grad=grad).x0


def exit_of(step: int) -> int:
    """At which of the four noise levels the rollout of `step` ends."""
    net = Exact()
    rollout(net, step)
    return len(net.calls) - 1


def step_with(exit_step: int) -> int:
    return next(step for step in range(100) if exit_of(step) == exit_step)


@pytest.mark.parametrize("exit_step", range(4))
def test_a_rollout_runs_through_the_listed_levels_up_to_its_exit(exit_step: int) -> None:
    net = Exact()
    rollout(net, step_with(exit_step))
    assert [sigma for _, sigma in net.calls] == pytest.approx(SIGMAS[: exit_step + 1])


def test_all_exits_are_equally_frequent() -> None:
    exits = [exit_of(step) for step in range(400)]
    assert all(70 <= exits.count(exit_step) <= 130 for exit_step in range(4))


def test_ranks_exit_together_whatever_their_samples() -> None:
    for step in range(20):
        lengths = set()
        for indices in ([0, 1], [2, 3]):
            net = Exact()
            rng = step_rng(0, "generator", step=step, first=4 * step, indices=indices, device=CPU)
            BidirectionalTrainingPipeline(SIGMAS)(net, batch_of(2), rng, grad=True)
            lengths.add(len(net.calls))
        assert len(lengths) == 1


@pytest.mark.parametrize("exit_step", range(4))
def test_only_the_exit_forward_runs_under_autograd(exit_step: int) -> None:
    net = Watched(Affine())
    x0 = rollout(net, step_with(exit_step))
    assert [grad for _, grad in net.calls] == [False] * exit_step + [True]
    assert x0.requires_grad


def test_without_gradient_nothing_runs_under_autograd() -> None:
    net = Watched(Affine())
    x0 = rollout(net, step_with(2), grad=False)
    assert not any(grad for _, grad in net.calls)
    assert not x0.requires_grad


def test_the_rollouts_of_both_phases_make_the_same_samples() -> None:
    step = step_with(3)
    assert torch.equal(rollout(Affine(), step, grad=True), rollout(Affine(), step, grad=False))


def test_a_rollout_that_exits_last_makes_what_inference_makes() -> None:
    step = step_with(3)
    inferred = sample(
        BidirectionalInferencePipeline(Exact(), SIGMAS),
        saying(2.0, 2),
        saying(0.0, 2),
        SHAPE,
        streams_of_step(2, step).samples,
    )
    assert torch.equal(rollout(Exact(), step), inferred)


def test_inference_calls_the_generator_four_times_at_the_listed_levels() -> None:
    net = Exact()
    pipeline = BidirectionalInferencePipeline(net, SIGMAS)
    sample(pipeline, saying(2.0, 3), saying(0.0, 3), SHAPE, streams(3))
    assert [sigma for _, sigma in net.calls] == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])


def test_inference_counts_its_evaluations_right() -> None:
    net = Exact()
    pipeline = BidirectionalInferencePipeline(net, SIGMAS)
    sample(pipeline, saying(2.0, 3), saying(0.0, 3), SHAPE, streams(3))
    assert pipeline.network_evaluations(SHAPE[1]) == sum(size for size, _ in net.calls) / 3


def test_inference_runs_without_autograd() -> None:
    net = Watched(Affine())
    pipeline = BidirectionalInferencePipeline(net, SIGMAS)
    x0 = sample(pipeline, saying(2.0, 1), saying(0.0, 1), SHAPE, streams(1))
    assert not x0.requires_grad
    assert not any(grad for _, grad in net.calls)


def test_inference_follows_the_prompt_and_not_the_negative_one() -> None:
    pipeline = BidirectionalInferencePipeline(Exact(std=0.1), SIGMAS)
    x0 = sample(pipeline, saying(2.0, 8), saying(-50.0, 8), SHAPE, streams(8))
    assert float(x0.mean()) == pytest.approx(2.0, abs=0.02)


def test_inference_tells_its_progress_once_per_step() -> None:
    told: list[tuple[int, int]] = []
    pipeline = BidirectionalInferencePipeline(Exact(), SIGMAS)
    sample(
        pipeline,
        saying(2.0, 1),
        saying(0.0, 1),
        SHAPE,
        streams(1),
        on_step=lambda *s: told.append(s),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert pipeline.steps(SHAPE[1]) == 4


# ---- along the velocity


@pytest.mark.parametrize("walk", ["renoise", "euler"])
@pytest.mark.parametrize("exit_step", range(4))
def test_a_rollouts_exit_step_begins_with_what_its_sampler_holds_there(
    walk: Walk, exit_step: int
) -> None:
    step = step_with(exit_step)
    trained, served = Called(Exact(0.5)), Called(Exact(0.5))
    rollout_ = ROLLOUTS["simulation"](Sampling(SIGMAS), walk=walk)
    rollout_(trained, batch_of(2, mean=2.0), streams_of_step(2, step), grad=True)
    sampler = SAMPLERS["few_step_euler" if walk == "euler" else "few_step"]
    rng = streams_of_step(2, step).samples
    sample(sampler(served, Sampling(SIGMAS)), saying(2.0, 2), saying(0.0, 2), SHAPE, rng)
    assert len(trained.calls) == exit_step + 1
    assert torch.equal(trained.calls[-1].x, served.calls[exit_step].x)


def test_a_clip_of_eulers_steps_is_fixed_by_its_first_noise() -> None:
    """Its spread is that of 40 steps of the teacher's ODE, .4469, and nothing else is drawn."""
    sigmas = step_sigmas([1000 - 25 * i for i in range(40)], 5.0)
    sampler = SAMPLERS["few_step_euler"](Exact(0.5), Sampling(sigmas))
    rng = fast_streams(20_000, "euler").samples
    made = sample(sampler, saying(0.7, 20_000), saying(0.0, 20_000), (1, 1, 1, 1), rng).flatten()
    assert float(made.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(made.std()) == pytest.approx(0.4469, abs=0.01)
    again = fast_streams(20_000, "euler").samples.randn((1, 1, 1, 1)).flatten()
    assert torch.corrcoef(torch.stack([made, again]))[0, 1] > 0.9999


@pytest.mark.parametrize(
    ("config", "causal", "message"),
    [
        (DMDConfig(walk="euler"), True, "loss.walk: 'euler' is for generator_type: bidirectional"),
        (CausVidConfig(walk="euler"), False, "loss.walk: 'euler' has no meaning with causvid"),
    ],
)
def test_where_there_is_no_such_path_it_is_refused(
    config: DMDConfig, causal: bool, message: str
) -> None:
    (found,) = [*config.problems(), *config.run_problems(steps=10, causal=causal)]
    assert found.startswith(message)
