"""What a Wan2.1 transformer reads of images: CLIP states to tokens beside the text.

Letters as in model/types.py; n tokens of all images together, one image behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.wan.adapted import sequential
from model.wan.config import WanConfig


class ImageEmbedding(nn.Module):
    """CLIP states of the first frame, or of first and last, to tokens as wide as the text's."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.image_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        )
        self.emb_pos: nn.Parameter | None = None  # tells the images apart
        if config.image_count > 1:
            tokens = config.image_count * config.image_tokens
            self.emb_pos = nn.Parameter(torch.empty(1, tokens, width))

    def forward(self, clip: Tensor, adapters: Sequence[str] = ()) -> Tensor:
        """clip: [B, n, image_dim]. Returns [B, n, D]."""
        clip = clip.to(next(self.proj.parameters()).dtype)
        clip = clip if self.emb_pos is None else clip + self.emb_pos
        return sequential(self.proj, clip, adapters)


def check_images(config: WanConfig, text: Tensor, clip: Tensor | None) -> None:
    """Raise ValueError unless text [B, L, text_dim] and clip [B, n, image_dim] are of these sizes.

    The text must have all its rows, or a transformer that sees images could not tell them apart.
    """
    frames = "first frame's" if config.image_count == 1 else "first and last frame's"
    if clip is None:
        raise ValueError(f"an {config.model_type} model needs the {frames} CLIP states")
    expected = (config.image_count * config.image_tokens, config.image_dim)
    if tuple(clip.shape[1:]) != expected:
        raise ValueError(
            f"an {config.model_type} model needs the {frames} CLIP states "
            f"[B, {expected[0]}, {expected[1]}], got {list(clip.shape)}"
        )
    if text.shape[1] != config.text_len:
        raise ValueError(
            f"an {config.model_type} model needs text padded to {config.text_len} rows, "
            f"got {text.shape[1]}"
        )
