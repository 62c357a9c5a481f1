"""Quality of a set of tiny-world clips, as numbers with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from utils.seeding import generator
from utils.tiny_world.checker import Reading, read_attributes
from utils.tiny_world.world import ATTRIBUTES, Caption, draw_captions, draw_scenes, render

REFERENCE_CLIPS = 1024
LATENT_COMPONENTS = 48  # principal components of real latents in which clips are compared


class Codec(Protocol):
    """What turns pixels in [-1, 1] into latents and back."""

    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """[B, 3, P, S, S] to [B, C, F, H, W]."""

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """And back."""


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
        features = read_attributes(clips).features().double()
        rows = latents.flatten(1).double()
        mean = rows.mean(dim=0)
        _, vectors = torch.linalg.eigh(torch.cov(rows.T))
        components = vectors[:, -LATENT_COMPONENTS:]
        return cls(features, features.std(dim=0), mean, components, (rows - mean) @ components)


@dataclass(frozen=True, eq=False)
class Exam:
    """The captions that samplers are judged on, and real clips to compare with."""

    captions: list[Caption]
    reference: Reference
    clips: Tensor  # [N, 3, P, S, S] a real clip per caption, through the codec, in [0, 1]
    latents: Tensor  # [N, C, F, H, W] its latents
    first: Tensor  # [N, 3, S, S] its first frame as it was before the codec, in [0, 1]

    @classmethod
    def draw(cls, count: int, seed: int, codec: Codec) -> Exam:
        """`count` captions and what belongs to them; the same for the same seed."""
        rng = generator(seed, "evaluation")
        captions = draw_captions(count, rng)
        real = render(draw_scenes([*captions, *draw_captions(REFERENCE_CLIPS, rng)], rng))
        latents = codec.encode_to_latent(2.0 * real - 1.0)
        decoded = 0.5 * codec.decode_to_pixel(latents[:count]) + 0.5
        reference = Reference.of(real[count:], latents[count:])
        return cls(
            captions, reference, decoded.clamp(0.0, 1.0), latents[:count], real[:count, :, 0]
        )

    def judge(self, clips: Tensor, latents: Tensor) -> dict[str, float]:
        """The figures of one clip per caption; see `quality`."""
        return quality(clips, latents, self.captions, self.reference)

    def judge_real(self) -> dict[str, float]:
        """The figures of real clips through the codec: the ceiling."""
        return self.judge(self.clips, self.latents)

    def first_frame_db(self, clips: Tensor) -> float:
        """How near clips begin to the frames that they were given: mean PSNR in dB."""
        error = (clips[:, :, 0] - self.first).square().mean(dim=(1, 2, 3))
        return float((-10.0 * error.clamp(min=1e-10).log10()).mean())


def quality(
    clips: Tensor, latents: Tensor, captions: Sequence[Caption], reference: Reference
) -> dict[str, float]:
    """All figures of clips [N, 3, P, S, S] in [0, 1] and latents [N, C, F, H, W].

    Shares lie in [0, 1]; `<name>_stderr` is the standard error over clips.
    """
    reading = read_attributes(clips)
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
