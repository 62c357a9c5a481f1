"""How ranks that share the tokens of one sample divide them, as the transformer sees it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """Each rank holds some tokens of every frame, and in self-attention some heads of all tokens.

    So masks, modulation by frames and caches stay statements about frames. What a rank is depends
    on who sets the exchange, from outside (utils/parallel.py); the model knows no ranks.
    """

    def cut(self, x: Tensor, frames: int) -> Tensor:
        """This rank's tokens of every frame. x: [B, N, ...], the frames one behind the other."""

    def join(self, x: Tensor, frames: int) -> Tensor:
        """All tokens again, from every rank's."""

    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """[B, own tokens, all heads, head_dim] to [B, all tokens, own heads, head_dim]."""

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """[B, all tokens, own heads, head_dim] to [B, own tokens, all heads, head_dim]."""


class Alone:
    """The exchange of a rank that has all tokens and all heads."""

    def cut(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange."""
        del frames
        return x

    def join(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange."""
        del frames
        return x

    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange."""
        del frames
        return x

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange."""
        del frames
        return x
