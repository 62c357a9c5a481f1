"""Distribution matching distillation (DMD, arXiv:2311.18828)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.matching import (
    Adjust,
    DistributionMatching,
    DistributionMatchingConfig,
    Scores,
    error_size,
)
from model.options.adversarial import AdversarialOption, AdversarialOptionConfig
from model.options.ida import IDA, IDAConfig
from model.options.projection import Projection, ProjectionConfig
from model.types import LossOutput, Sample


@dataclass(frozen=True)
class DMDConfig(ProjectionConfig, IDAConfig, AdversarialOptionConfig, DistributionMatchingConfig):
    """DMD has no settings of its own; those of its options are all off by default."""


class DMD(DistributionMatching):
    """The gradient in x0 is (x0_critic - x0_teacher) / mean |x0 - x0_teacher|; DMD eq. 7 and 8.

    Beside it the critic learns the velocity of the generator's samples; its options are in
    model/options/.
    """

    config_class = DMDConfig
    takes = (Projection, AdversarialOption, IDA)
    config: DMDConfig

    def objective(
        self, sample: Sample, scores: Scores, adjusts: Sequence[Adjust] = ()
    ) -> LossOutput:
        """Half the mean squared distance to a target that is one such gradient away."""
        with torch.no_grad():
            gradient = (scores.x0_critic - scores.x0_teacher) / error_size(sample.x0, scores)
            for adjust in adjusts:
                gradient = adjust(gradient)
            target = sample.x0 - gradient  # the stop-gradient of eq. 7
        loss = 0.5 * F.mse_loss(sample.x0, target)
        return LossOutput(loss, {"dmd_gradient": gradient.abs().mean()})
