"""Quality of a set of tiny-world clips, as numbers with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.shapes_checker import Reading, read_clips
from utils.shapes_world import ATTRIBUTES, Caption

LATENT_COMPONENTS = 48  # principal components of real latents in which clips are compared


@dataclass(frozen=True, eq=False)
class Reference:
    """What real clips look like: the statistics that Frechet distances compare with."""

    features: Tensor  # [N, 5] checker features of real clips
    scale: Tensor  # [5] their standard deviations
    mean: Tensor  # [latent elements]
    components: Tensor  # [latent elements, LATENT_COMPONENTS]
    latents: Tensor  # [N, LATENT_COMPONENTS]

    @classmethod
    def of(cls, clips: Tensor, latents: Tensor) -> Reference:
        """Statistics of real clips [N, 3, P, S, S] in [0, 1] and their latents [N, C, F, H, W]."""
        features = read_clips(clips).features().double()
        rows = latents.flatten(1).double()
        mean = rows.mean(dim=0)
        _, vectors = torch.linalg.eigh(torch.cov(rows.T))
        components = vectors[:, -LATENT_COMPONENTS:]
        return cls(features, features.std(dim=0), mean, components, (rows - mean) @ components)


def quality(
    clips: Tensor, latents: Tensor, captions: Sequence[Caption], reference: Reference
) -> dict[str, float]:
    """All figures of clips [N, 3, P, S, S] in [0, 1] and latents [N, C, F, H, W].

    Shares lie in [0, 1]; `<name>_stderr` is the standard error over clips.
    """
    reading = read_clips(clips)
    matches = reading.matches(captions)
    adherent, valid = matches.all(dim=1), reading.valid()
    figures = {name: _share(matches[:, i]) for i, name in enumerate(ATTRIBUTES)}
    for name, hits in (("adherence", adherent), ("validity", valid), ("both", adherent & valid)):
        share = _share(hits)
        figures[name] = share
        figures[f"{name}_stderr"] = math.sqrt(share * (1.0 - share) / len(hits))
    for name, values in (("psnr_db", reading.psnr), ("contrast", reading.contrast)):
        figures[name] = float(values.mean())
        figures[f"{name}_stderr"] = float(values.std() / math.sqrt(len(values)))
    figures["diversity"] = float(reading.orthogonal_start().std())
    figures.update(_frechets(reading, latents, reference))
    return figures


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())


def _frechets(reading: Reading, latents: Tensor, reference: Reference) -> dict[str, float]:
    features = reading.features().double() / reference.scale
    rows = (latents.flatten(1).double() - reference.mean) @ reference.components
    return {
        "frechet_features": frechet_distance(features, reference.features / reference.scale),
        "frechet_latents": frechet_distance(rows, reference.latents),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to rows [N, K] and [M, K] (FID's formula)."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0.0).sqrt().sum()
    gap = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2.0 * cross)
