"""Score identity distillation (SiD, arXiv:2404.04057): a Fisher divergence, through both scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.matching import (
    Adjust,
    DistributionMatching,
    DistributionMatchingConfig,
    Scores,
    error_size,
)
from model.types import LossOutput, Sample


@dataclass(frozen=True)
class SiDConfig(DistributionMatchingConfig):
    """SiD's own option."""

    alpha: float = 1.0  # weight of the squared gap, whose naive estimate alone would be biased

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        if not math.isfinite(self.alpha):
            yield f"loss.alpha: must be finite, got {self.alpha}"


class SiD(DistributionMatching):
    """mean(gap (x0_teacher - x0 - alpha gap)) / mean |x0 - x0_teacher|, gap = teacher - critic.

    The gradient flows into x0 itself and through both networks; only the size has none.
    """

    config_class = SiDConfig
    config: SiDConfig
    scores_need_grad = True

    def objective(
        self, sample: Sample, scores: Scores, adjusts: Sequence[Adjust] = ()
    ) -> LossOutput:
        """See the class."""
        assert not adjusts, "SiD's gradient is autograd's own: no option can adjust it"
        gap = scores.x0_teacher - scores.x0_critic
        error = scores.x0_teacher - sample.x0
        size = error_size(sample.x0, scores)
        loss = (gap * (error - self.config.alpha * gap) / size).mean()
        return LossOutput(loss, {"score_gap": gap.detach().abs().mean()})
