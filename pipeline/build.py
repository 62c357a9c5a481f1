"""Which inference pipeline serves a generator: many steps for a teacher, few for a student."""

from __future__ import annotations

from collections.abc import Sequence

from model.flow import step_sigmas
from model.types import Denoiser
from pipeline.bidirectional import BidirectionalInferencePipeline
from pipeline.protocol import InferencePipeline
from pipeline.teacher import SamplingConfig, TeacherInferencePipeline


def inference_pipeline(
    net: Denoiser,
    *,
    distilled: bool,
    denoising_step_list: Sequence[int],
    timestep_shift: float,
    sampling: SamplingConfig,
) -> InferencePipeline:
    """The pipeline that a run's own configuration asks for."""
    if distilled:
        return BidirectionalInferencePipeline(net, step_sigmas(denoising_step_list, timestep_shift))
    return TeacherInferencePipeline(net, sampling)
