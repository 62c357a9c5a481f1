"""The rollouts and samplers that methods ask for by name, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.encoders.vae import VideoVAE
from model.heads import OnPath
from model.types import Denoiser, Rollout, Walk
from pipeline.bidirectional import (
    BidirectionalInferencePipeline,
    BidirectionalTrainingPipeline,
    EulerInferencePipeline,
)
from pipeline.blocks import CausalConfig
from pipeline.causal import (
    CausalDiffusionInferencePipeline,
    CausalInferencePipeline,
)
from pipeline.data import DataRollout
from pipeline.phased import Phase, PhasedTrainingPipeline
from pipeline.protocol import InferencePipeline
from pipeline.self_forcing import SelfForcingTrainingPipeline
from pipeline.teacher import SamplingConfig, TeacherInferencePipeline


@dataclass(frozen=True, eq=False)
class Sampling:
    """What rollouts and samplers are made of."""

    sigmas: Sequence[float] = ()  # noise levels of the few steps
    causal: CausalConfig | None = None  # how videos fall into blocks; None = bidirectional
    many_step: SamplingConfig = field(
        default_factory=SamplingConfig
    )  # of models that follow their ODE
    vae: VideoVAE | None = None  # for rollouts longer than what is scored
    gate: float | None = None  # between the few steps of two experts; None = there is one network
    first_sigmas: Sequence[float] | None = None  # of a causal video's first block; None = as all
    shift: float = 5.0  # of the few steps


def simulation_rollout(sampling: Sampling, *, walk: Walk = "renoise") -> Rollout:
    """Samples that the generator makes as inference will."""
    if sampling.causal is None:
        return BidirectionalTrainingPipeline(sampling.sigmas, walk)
    assert walk == "renoise", "blocks are noised anew"
    return SelfForcingTrainingPipeline(
        sampling.sigmas, sampling.causal, sampling.vae, first_sigmas=sampling.first_sigmas
    )


def data_rollout(sampling: Sampling, *, teacher_forcing: bool) -> Rollout:
    """Samples predicted from noised real videos."""
    return DataRollout(
        sampling.sigmas,
        sampling.causal,
        teacher_forcing=teacher_forcing,
        first_sigmas=sampling.first_sigmas,
    )


def phased_rollout(sampling: Sampling, *, phase: Phase, walk: Walk) -> Rollout:
    """One expert's part of what the generator makes."""
    assert sampling.causal is None, "two experts make whole videos"
    return PhasedTrainingPipeline(sampling.sigmas, sampling.gate, phase, walk)


def few_step_sampler(net: Denoiser, sampling: Sampling) -> InferencePipeline:
    """For a distilled generator."""
    if sampling.causal is None:
        return BidirectionalInferencePipeline(net, sampling.sigmas)
    return CausalInferencePipeline(
        net, sampling.sigmas, sampling.causal, first_sigmas=sampling.first_sigmas
    )


def euler_sampler(net: Denoiser, sampling: Sampling) -> InferencePipeline:
    """For a distilled generator that walks without fresh noise."""
    assert sampling.causal is None, "blocks are noised anew"
    return EulerInferencePipeline(net, sampling.sigmas)


def path_sampler(net: Denoiser, sampling: Sampling) -> InferencePipeline:
    """For a generator with a head for each part of its path."""
    assert sampling.causal is None, "a path is that of a whole video"
    on_path = OnPath(net, sampling.sigmas, sampling.shift)
    return EulerInferencePipeline(on_path, sampling.sigmas)


def many_step_sampler(net: Denoiser, sampling: Sampling) -> InferencePipeline:
    """For a model that follows its ODE."""
    if sampling.causal is None:
        return TeacherInferencePipeline(net, sampling.many_step)
    return CausalDiffusionInferencePipeline(net, sampling.many_step, sampling.causal)


# By the names that `Needs` uses; a factory of rollouts takes `Needs.rollout_options` as keywords.
ROLLOUTS: dict[str, Callable[..., Rollout]] = {
    "simulation": simulation_rollout,
    "data": data_rollout,
    "phased": phased_rollout,
}
SAMPLERS: dict[str, Callable[[Denoiser, Sampling], InferencePipeline]] = {
    "few_step": few_step_sampler,
    "few_step_euler": euler_sampler,
    "path_euler": path_sampler,
    "many_step": many_step_sampler,
}
ADJUSTABLE = {"many_step"}  # samplers whose steps and guidance a request may choose
