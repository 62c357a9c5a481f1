"""Prompts that change within a video that is made block by block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.types import Conditioning


@dataclass(frozen=True, eq=False)
class ChangingPrompts(Conditioning):
    """A conditioning whose text is another one from some frames on.

    A block follows the text of its first frame. What is kept of the past stays; the keys of the
    text are computed anew, and with `causal.pin` the first frame of the new one is kept.
    """

    changes: tuple[tuple[int, Tensor], ...] = ()  # frame, and text [B, L, text_dim]; ascending

    def frames(self, first: int, last: int) -> Conditioning:
        """See Conditioning."""
        text = self.text
        for frame, other in self.changes:
            if frame <= first:
                text = other
        return Conditioning(text, self.clip, self.first_frame).frames(first, last)
