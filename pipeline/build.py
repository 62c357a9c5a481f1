"""Which pipeline serves a generator: many steps or few, the whole clip or block by block."""

from __future__ import annotations

from collections.abc import Sequence

from model.types import Denoiser
from pipeline.bidirectional import BidirectionalInferencePipeline
from pipeline.causal import (
    CausalConfig,
    CausalDiffusionInferencePipeline,
    CausalInferencePipeline,
)
from pipeline.protocol import InferencePipeline
from pipeline.teacher import SamplingConfig, TeacherInferencePipeline


def few_step_pipeline(
    net: Denoiser, sigmas: Sequence[float], causal: CausalConfig | None
) -> InferencePipeline:
    """For a distilled generator; causal None = bidirectional."""
    if causal is None:
        return BidirectionalInferencePipeline(net, sigmas)
    return CausalInferencePipeline(net, sigmas, causal)


def many_step_pipeline(
    net: Denoiser, sampling: SamplingConfig, causal: CausalConfig | None
) -> InferencePipeline:
    """For a model that follows its ODE; causal None = bidirectional."""
    if causal is None:
        return TeacherInferencePipeline(net, sampling)
    return CausalDiffusionInferencePipeline(net, sampling, causal)
