"""The settings of what is trained on, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from model.causal import CausalLayout


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    path: str = MISSING  # a .txt file, a folder of .txt files, or a folder of LMDB shards
    buckets: bool = False  # train on every shape that the shards hold, one at a time
    negative_prompt: str = ""
    text_embeddings: str | None = None  # of scripts/precompute_prompts.py; no text encoder then
    # Share of the batches that begin with a first latent frame of their data (its latents, or its
    # image): of models that make clips with and without an image (TI2V), and of causal rollouts.
    # None = 1 with causal.given_first_frame, else 0. All samples of a batch begin alike.
    image_share: float | None = None
    max_damaged: int = (
        100  # records that cannot be read before a run stops; others take their place
    )

    def problems(self, layout: CausalLayout | None, frames: int) -> Iterator[str]:
        """What is impossible about these settings for videos of `frames` latent frames.

        layout: how they fall into blocks; None = they are made whole.
        """
        share = self.image_share
        if self.max_damaged < 0:
            yield f"data.max_damaged: must be at least 0, got {self.max_damaged}"
        if share is None:
            return
        if not 0.0 <= share <= 1.0:
            yield f"data.image_share: must lie in [0, 1], or be null, got {share}"
        elif share > 0.0 and frames == 1:
            yield "data.image_share: a video of one latent frame that is given leaves none to learn"
        elif share > 0.0 and layout is not None:
            try:
                layout.split(frames, 1)
            except ValueError as error:
                yield f"data.image_share: {error}; set causal.independent_first_frame=true"
