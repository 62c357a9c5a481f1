"""Projected DMD: the part of the gradient that a lagging critic makes is taken out of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.base import MethodConfig
from model.given import learnt
from model.matching import Comparison, Effect, Option

LEAST_SQUARE = 1e-8  # of the critic's error: one without any leaves the gradient as it is


@dataclass(frozen=True)
class ProjectionConfig(MethodConfig):
    """Whether it is taken out."""

    project: bool = False  # PDMD: without what lies along the critic's error on its own sample


class Projection(Option):
    """The gradient without its component along the critic's error (PDMD, arXiv:2609.35768).

    The error on the very sample that the critic is asked about is an unbiased view of how far it
    is behind the generator, and where it is behind, critic - teacher points along it.
    """

    config: ProjectionConfig

    @classmethod
    def asked(cls, config: ProjectionConfig) -> bool:
        """See Option."""
        return config.project

    def on_generator(self, at: Comparison) -> Effect:
        """See the class. Where frames were given, the others alone count."""
        error = learnt(at.scores.x0_critic - at.target, at.sample.given_frames)
        return Effect(lambda gradient: without(gradient, error))


def without(difference: Tensor, error: Tensor) -> Tensor:
    """d - (<d, p> / <p, p>) p per sample, fp32; d and p: [B, C, F, H, W]."""
    d, p = difference.float(), error.float()
    dims = tuple(range(1, d.ndim))
    along = (d * p).sum(dims, keepdim=True) / (p.square().sum(dims, keepdim=True) + LEAST_SQUARE)
    return d - along * p
