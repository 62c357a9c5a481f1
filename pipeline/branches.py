"""Guidance on two groups of ranks: one predicts for the prompts, one for the negative prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor

from model.flow import velocity_to_x0
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction

BRANCHES = 2


@dataclass(frozen=True, eq=False)
class GuidanceBranch:
    """A Denoiser of guided batches, prompts first and negative prompts behind, that runs one half.

    So all its calls must be guided, those that put frames into a cache included: the cache holds
    the past of this half alone.
    """

    net: Denoiser
    branch: int  # 0 = the prompts, 1 = the negative prompts
    join: Callable[[Tensor], Tensor]  # the rows of both branches, in order. Collective

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [2 B, C, F, H, W]; sigma: [2 B, 1] or [2 B, F]."""
        own = self.net(self.half(x), self.half(sigma), self.half_of(conditioning), context=context)
        velocity = self.join(own.velocity)
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)

    def half(self, rows: Tensor) -> Tensor:
        """This branch's rows of [2 B, ...]."""
        assert len(rows) % BRANCHES == 0, "a guided batch has two halves"
        return rows.chunk(BRANCHES)[self.branch]

    def half_of(self, conditioning: Conditioning) -> Conditioning:
        """This branch's rows of all parts."""
        names = [field.name for field in fields(Conditioning)]
        parts = {name: getattr(conditioning, name) for name in names}
        halves = {name: self.half(part) for name, part in parts.items() if part is not None}
        return replace(conditioning, **halves)
