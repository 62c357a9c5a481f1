"""Distribution matching distillation: reverse KL through two scores (DMD, arXiv:2311.18828)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import DistributionMatching, DistributionMatchingConfig
from model.types import LossOutput, Sample

MIN_SIZE = 1e-6  # a sample that the teacher leaves exactly as it is would divide by zero


@dataclass(frozen=True)
class DMDConfig(DistributionMatchingConfig):
    """DMD adds no setting of its own."""


class DMD(DistributionMatching):
    """The gradient in x0 is (x0_critic - x0_teacher) / mean |x0 - x0_teacher|; DMD eq. 7 and 8."""

    config_class = DMDConfig

    def objective(self, sample: Sample, x0_teacher: Tensor, x0_critic: Tensor) -> LossOutput:
        """Half the mean squared distance to a target that is one such gradient away."""
        with torch.no_grad():
            x0 = sample.x0
            size = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            gradient = (x0_critic - x0_teacher) / size.clamp(min=MIN_SIZE)
            target = x0 - gradient  # the stop-gradient of eq. 7
        loss = 0.5 * F.mse_loss(sample.x0, target)
        return LossOutput(loss, {"dmd_gradient": gradient.abs().mean()})
