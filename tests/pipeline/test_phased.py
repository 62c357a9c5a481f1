"""Few steps along the student's own path, and rollouts of one expert's part of a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.flow import step_sigmas
from model.types import Sample
from pipeline.build import ROLLOUTS, SAMPLERS, Sampling
from pipeline.few_step import euler_steps
from pipeline.phased import PhasedTrainingPipeline
from pipeline.protocol import sample
from pipeline.teacher import SamplingConfig, build_scheduler, trajectory
from tests.gaussian import SHAPE, Affine, Exact, Watched, batch_of, saying, streams, streams_of_step
from tests.pairs import paired

SIGMAS = step_sigmas([1000, 750, 500, 250], 7.0)
GATE = (SIGMAS[1] + SIGMAS[2]) / 2


def test_steps_follow_diffusers_euler_to_any_level() -> None:
    config = SamplingConfig(6, 1.0, 5.0, "euler")
    noise, told = streams(3).randn(SHAPE), saying(2.0, 3)
    states = list(trajectory(Exact(0.5), noise, told, told, config))
    levels = build_scheduler(config).sigmas.tolist()
    for steps in (1, 3, 6):
        found = euler_steps(Exact(0.5), noise, told, levels[:steps], end=levels[steps])
        torch.testing.assert_close(found, states[steps], rtol=0.0, atol=2e-6)


def rolled(phase: Any, walk: Any, step: int, grad: bool = True) -> tuple[Sample, Watched]:
    net = Watched(Exact(0.5))
    rollout = PhasedTrainingPipeline(SIGMAS, GATE, phase, walk)
    return rollout(net, batch_of(3, mean=1.0), streams_of_step(3, step), grad=grad), net


def last(net: Watched) -> tuple[float, Tensor]:
    return float(net.calls[-1].sigma[0, 0]), net.calls[-1].x


@pytest.mark.parametrize("walk", ["euler", "renoise"])
def test_the_high_part_ends_at_the_low_experts_first_level(walk: Any) -> None:
    exits = set()
    for step in range(8):
        found, net = rolled("high", walk, step)
        sigma, x = last(net)
        exits.add(len(net.calls))
        assert found.level == SIGMAS[2] == pytest.approx(0.875)
        prediction = Exact(0.5)(x, net.calls[-1].sigma, saying(1.0, 3))
        torch.testing.assert_close(found.x0, prediction.x0)
        if walk == "renoise":
            assert found.anchor is None
        else:
            expected = x + (found.level - sigma) * prediction.velocity
            torch.testing.assert_close(found.anchor, expected)
    assert exits == {1, 2}


def test_the_low_part_begins_behind_the_whole_high_one_and_ends_clean() -> None:
    exits = set()
    for step in range(8):
        found, net = rolled("low", "euler", step)
        assert (found.level, found.anchor) == (0.0, None)
        assert [call.grad for call in net.calls] == [False] * (len(net.calls) - 1) + [True]
        exits.add(len(net.calls))
    assert exits == {3, 4}


def test_a_last_step_without_fresh_noise_is_that_of_the_sampler() -> None:
    for step in range(8):
        found, net = rolled("low", "euler", step)
        if len(net.calls) == 4:
            noise = net.calls[0].x
            torch.testing.assert_close(
                found.x0, euler_steps(Exact(0.5), noise, saying(1.0, 3), SIGMAS)
            )


def test_without_a_gradient_nothing_is_recorded() -> None:
    net = Affine()
    rollout = PhasedTrainingPipeline(SIGMAS, GATE, "high", "euler")
    for grad in (True, False):
        found = rollout(net, batch_of(2), streams_of_step(2), grad=grad)
        assert found.x0.requires_grad == grad
        assert found.anchor is not None
        assert not found.anchor.requires_grad


def test_either_part_is_drawn_where_both_learn() -> None:
    levels = {rolled("both", "euler", step)[0].level for step in range(16)}
    assert levels == {0.0, SIGMAS[2]}


def test_clips_are_made_as_the_student_was_trained() -> None:
    above, below = Exact(0.5), Exact(0.5)
    pair = paired(above, below, GATE)
    sampler = SAMPLERS["few_step_euler"](pair, Sampling(SIGMAS))
    made = sample(sampler, saying(1.0, 2), saying(0.0, 2), SHAPE, streams(2))
    noise = streams(2).randn(SHAPE)
    torch.testing.assert_close(made, euler_steps(Exact(0.5), noise, saying(1.0, 2), SIGMAS))
    assert [level for _, level in above.calls] == pytest.approx(SIGMAS[:2])
    assert [level for _, level in below.calls] == pytest.approx(SIGMAS[2:])


def test_one_network_has_one_phase() -> None:
    rollout = ROLLOUTS["phased"](Sampling(SIGMAS), phase="high", walk="euler")
    found = rollout(Exact(), batch_of(2), streams_of_step(2), grad=False)
    assert (found.level, found.anchor) == (0.0, None)
