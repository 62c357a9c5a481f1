"""Many-step sampling, against the closed form of a Gaussian world."""

from __future__ import annotations

import itertools

import pytest
import torch

from model.flow import shift
from pipeline.blocks import CausalConfig
from pipeline.build import Sampling, few_step_sampler, many_step_sampler
from pipeline.protocol import sample
from pipeline.teacher import (
    SamplingConfig,
    TeacherInferencePipeline,
    integrate,
    trajectory,
)
from tests.gaussian import SHAPE, Exact, saying, streams

STD = 2.0  # of the data; noise has 1


def ratio(steps: int, solver: str = "euler", timestep_shift: float = 5.0) -> float:
    """The final deviation that sampling reaches, as a fraction of the data's."""
    config = SamplingConfig(steps, 1.0, timestep_shift, solver)  # type: ignore[arg-type]
    pipeline = TeacherInferencePipeline(Exact(STD), config)
    x0 = sample(pipeline, saying(0.0, 4), saying(0.0, 4), SHAPE, streams(4))
    noise = streams(4).randn(SHAPE)
    factors = x0 / noise  # every element is stretched alike: the field is linear
    assert float(factors.std()) < 1e-3 * STD
    return float(factors.mean()) / STD


def closed_form(steps: int, timestep_shift: float = 5.0) -> float:
    """The same as a product over Euler steps: x grows by 1 + (next - sigma) (1 - gain) / sigma."""
    levels = [shift(1.0 - i / steps, timestep_shift) for i in range(steps + 1)]
    product = 1.0
    for sigma, following in itertools.pairwise(levels):
        gain = (1.0 - sigma) * STD**2 / ((1.0 - sigma) ** 2 * STD**2 + sigma**2)
        product *= 1.0 + (following - sigma) * (1.0 - gain) / sigma
    return product / STD


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
@pytest.mark.parametrize("timestep_shift", [1.0, 5.0])
def test_euler_reaches_the_deviation_of_the_closed_form(steps: int, timestep_shift: float) -> None:
    expected = closed_form(steps, timestep_shift)
    assert ratio(steps, timestep_shift=timestep_shift) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("steps", "published"), [(4, 0.65), (8, 0.81), (50, 0.97)])
def test_few_euler_steps_lose_the_deviation_that_was_published(
    steps: int, published: float
) -> None:
    assert ratio(steps) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_the_second_order_solver_beats_euler_at_equal_steps(steps: int) -> None:
    assert abs(ratio(steps, "unipc") - 1.0) < 0.85 * abs(ratio(steps) - 1.0)


def test_the_second_order_solver_converges() -> None:
    assert ratio(50, "unipc") == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_evaluations_are_counted_right(solver: str, cfg_scale: float) -> None:
    net = Exact()
    pipeline = TeacherInferencePipeline(net, SamplingConfig(6, cfg_scale, 5.0, solver))  # type: ignore[arg-type]
    sample(pipeline, saying(1.0, 3), saying(0.0, 3), SHAPE, streams(3))
    assert pipeline.network_evaluations(SHAPE[1]) == sum(size for size, _ in net.calls) / 3


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_levels_fall_from_noise_along_the_shifted_schedule(solver: str) -> None:
    net = Exact()
    config = SamplingConfig(5, 1.0, 3.0, solver)  # type: ignore[arg-type]
    pipeline = TeacherInferencePipeline(net, config)
    sample(pipeline, saying(1.0, 1), saying(0.0, 1), SHAPE, streams(1))
    expected = [shift(1.0 - i / 5, 3.0) for i in range(5)]
    # UniPC of diffusers spreads its levels from 1 to 1/1000 before it shifts them.
    assert [sigma for _, sigma in net.calls] == pytest.approx(expected, abs=2e-3)


def test_the_mean_follows_the_prompt() -> None:
    pipeline = TeacherInferencePipeline(Exact(0.5), SamplingConfig(50, 1.0, 5.0, "euler"))
    x0 = sample(pipeline, saying(3.0, 64), saying(0.0, 64), SHAPE, streams(64))
    assert float(x0.mean()) == pytest.approx(3.0, abs=0.02)


def test_guidance_exaggerates_what_the_prompt_changes() -> None:
    pipeline = TeacherInferencePipeline(Exact(0.5), SamplingConfig(50, 2.0, 5.0, "euler"))
    x0 = sample(pipeline, saying(3.0, 64), saying(1.0, 64), SHAPE, streams(64))
    assert float(x0.mean()) == pytest.approx(1.0 + 2.0 * (3.0 - 1.0), abs=0.02)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    def alone_or_not(size: int) -> torch.Tensor:
        pipeline = TeacherInferencePipeline(Exact(), SamplingConfig(4, 2.0, 5.0, "unipc"))
        return sample(pipeline, saying(3.0, size), saying(0.0, size), SHAPE, streams(size))

    torch.testing.assert_close(alone_or_not(4)[:1], alone_or_not(1))


def test_progress_is_told_once_per_step_however_guided() -> None:
    told: list[tuple[int, int]] = []
    pipeline = TeacherInferencePipeline(Exact(), SamplingConfig(3, 2.0, 5.0, "euler"))
    sample(
        pipeline,
        saying(0.0, 1),
        saying(0.0, 1),
        SHAPE,
        streams(1),
        on_step=lambda *s: told.append(s),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert pipeline.steps(SHAPE[1]) == 3


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_trajectory_runs_from_its_noise_to_what_is_sampled(solver: str) -> None:
    config = SamplingConfig(5, 2.0, 5.0, solver)  # type: ignore[arg-type]
    noise, told = streams(2).randn(SHAPE), (saying(3.0, 2), saying(0.0, 2))
    states = list(trajectory(Exact(), noise, *told, config))
    assert len(states) == 6
    assert torch.equal(states[0], noise)
    assert torch.equal(states[-1], integrate(Exact(), noise, *told, config))


BLOCKS = CausalConfig(num_frame_per_block=2, independent_first_frame=True)


@pytest.mark.parametrize(
    ("causal", "few", "many"),
    [(None, 3, 14), (BLOCKS, (3 + 1) * 3 - 1, (7 + 1) * 2 * 3 - 2)],
    ids=["whole", "blocks"],
)
def test_a_students_run_is_served_in_few_steps_and_a_teachers_in_many(
    causal: CausalConfig | None, few: int, many: int
) -> None:
    student = few_step_sampler(Exact(), Sampling([1.0, 0.6, 0.3], causal))
    teacher = many_step_sampler(Exact(), Sampling(causal=causal, many_step=SamplingConfig(7, 2.0)))
    assert (student.network_evaluations(5), teacher.network_evaluations(5)) == (few, many)
