"""A transformer block as a graph: tensors and constants in, tensors out; and the head after them.

Letters as in model/types.py; T = 1 (one noise level per sample) or F (one per frame). A block
knows no layer number, no cache and no object of the pass, so that it can run again in the backward
pass, be sharded and be compiled, all from outside. Its constants are the mask and two flags.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.wan.adapted import linear, sequential
from model.wan.attention import Attend, Mask, attend, attend_past
from model.wan.cache import KeyValue, TextKeys
from model.wan.config import WanConfig
from model.wan.exchange import Alone, Exchange
from model.wan.heads import Spans
from model.wan.rope import rotate


class LayerPast(NamedTuple):
    """Clean frames that one layer attends to beside its own tokens."""

    pieces: Sequence[KeyValue]  # in order
    table: Tensor | None  # rotary, [1, M, ...] of all pieces' tokens; None = they are rotated
    # More of them, and behind those a place for this call's own keys and values, which are written
    # there: so nothing is joined, or copied. None under autograd.
    room: KeyValue | None = None


Wanted = Literal["nothing", "rotated", "unrotated"]  # of the keys that a call computes


class BlockOutput(NamedTuple):
    """What leaves a block."""

    tokens: Tensor  # [B, N, D]
    keys: KeyValue | None  # of the self-attention; None unless wanted
    text: TextKeys | None  # what the text was read by; None under autograd


class Call(NamedTuple):
    """The constants of a forward pass, the same for all blocks."""

    frames: int
    mask: Mask | None = None
    wanted: Wanted = "nothing"
    adapters: tuple[str, ...] = ()  # those that are on


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated by the noise level."""

    grows: ClassVar[tuple[int, ...]] = (4,)  # the past: see utils.compiling.compile_blocks

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | TextKeys,
        table: Tensor,
        past: LayerPast | None,
        call: Call,
        *,
        recomputed: bool = False,
    ) -> BlockOutput:
        """x: [B, N, D]; modulation: [B, T, 6, D] fp32; text: memory [B, L, D], or keys of it.

        table: rotary, of x's tokens. recomputed: whether the backward pass runs this once more.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation.float() + modulation
        ).unbind(2)
        h = modulate(self.norm1, x, shift1, scale1)
        h, keys = self.self_attn(h, table, past, call, recomputed=recomputed)
        x = add_gated(x, h, gate1)
        on = call.adapters
        read = self.cross_attn.keys_and_values(text, on) if isinstance(text, Tensor) else text
        x = x + self.cross_attn(self.norm3(x), read, on)
        h = sequential(self.ffn, modulate(self.norm2, x, shift2, scale2), on)
        x = add_gated(x, h, gate2)
        learns = torch.is_grad_enabled()
        if keys is not None and learns:  # copies: FSDP2 warns of views that leave a block then
            keys = (keys[0].clone(), keys[1].clone())
        return BlockOutput(x, keys, None if learns else read)


class SelfAttention(nn.Module):
    """Attention among video tokens, with rotary positions and RMS-normalised queries and keys."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.attend: Attend = attend
        self.exchange: Exchange = Alone()

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        past: LayerPast | None,
        call: Call,
        *,
        recomputed: bool,
    ) -> tuple[Tensor, KeyValue | None]:
        """x: [B, N, D]. Returns [B, N, D], and this call's keys and values if wanted."""
        heads, on = (self.num_heads, -1), call.adapters
        q = self.norm_q(linear(self.q, x, on)).unflatten(-1, heads)
        k = self.norm_k(linear(self.k, x, on)).unflatten(-1, heads)
        v = linear(self.v, x, on).unflatten(-1, heads)
        spread = functools.partial(self.exchange.to_heads, frames=call.frames)
        q, v, own = spread(rotate(q, table)), spread(v), spread(rotate(k, table))
        if past is None:
            out = self.attend(q, own, v, mask=call.mask)
        else:
            out = self.attend_to_past(past, q, (own, v), recomputed=recomputed)
        out = linear(self.o, self.exchange.to_tokens(out, call.frames).flatten(2), on)
        if call.wanted == "nothing":
            return out, None
        return out, (own if call.wanted == "rotated" else spread(k), v)

    def attend_to_past(
        self, past: LayerPast, q: Tensor, own: KeyValue, *, recomputed: bool
    ) -> Tensor:
        """Attention to the past and to this call's `own` keys and values."""
        pieces = list(past.pieces)
        if past.room is None:
            pieces.append(own)
        else:
            for place, new in zip(past.room, own, strict=True):
                place[:, -new.shape[1] :] = new
            pieces.append(past.room)

        def keys() -> Tensor:
            if past.table is None:
                return joined([k for k, _ in pieces])
            old = joined([k for k, _ in past.pieces])
            return torch.cat([rotate(old, past.table), own[0]], dim=1)

        def values() -> Tensor:
            return joined([v for _, v in pieces])

        # What is recomputed keeps nothing, and a compiler decides by itself what to join again.
        if recomputed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.attend(q, keys(), values())
        return attend_past(self.attend, q, keys, values)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces [B, n, heads, head_dim] one behind the other; a single one as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


class CrossAttention(nn.Module):
    """Attention from video tokens to the text, and to the tokens of images if the model has any."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.attend: Attend = attend
        self.reads_clip, self.text_len = config.reads_clip, config.text_len
        if self.reads_clip:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, keys: TextKeys, adapters: Sequence[str] = ()) -> Tensor:
        """x: [B, N, D]; keys: as of `keys_and_values`. Padding counts, as in Wan."""
        q = self.norm_q(linear(self.q, x, adapters)).unflatten(-1, (self.num_heads, -1))
        out = self.attend(q, keys[0], keys[1])
        if self.reads_clip:
            out = out + self.attend(q, keys[2], keys[3])
        return linear(self.o, out.flatten(2), adapters)

    def keys_and_values(self, memory: Tensor, adapters: Sequence[str] = ()) -> TextKeys:
        """Of memory [B, L, D], image tokens first; [B, l, heads, head_dim] each, text first."""
        heads = (self.num_heads, -1)
        image_tokens = memory.shape[1] - self.text_len if self.reads_clip else 0
        image, text = memory[:, :image_tokens], memory[:, image_tokens:]
        pairs = (
            self.norm_k(linear(self.k, text, adapters)).unflatten(-1, heads),
            linear(self.v, text, adapters).unflatten(-1, heads),
        )
        if not self.reads_clip:
            return pairs
        return (
            *pairs,
            self.norm_k_img(linear(self.k_img, image, adapters)).unflatten(-1, heads),
            linear(self.v_img, image, adapters).unflatten(-1, heads),
        )


class Head(nn.Module):
    """Tokens to patches of velocity."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(
        self, x: Tensor, time: Tensor, adapters: Sequence[str] = (), spans: Spans | None = None
    ) -> Tensor:
        """x: [B, N, D]; time: [B, T, D] fp32. Returns [B, N, patch * out_dim], of each span."""
        shift, scale = (self.modulation.float() + time[:, :, None]).unbind(2)
        if spans is not None:  # in fp32: heads of neighbouring steps differ by little
            said: Tensor = self.get_submodule("bank")(
                modulate(self.norm, x.float(), shift, scale), spans
            )
            return said
        return linear(self.head, modulate(self.norm, x, shift, scale), adapters)


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift in fp32, in x's dtype. x: [B, N, D]; shift, scale: [B, T, D]."""
    h = F.layer_norm(x.float(), norm.normalized_shape, eps=norm.eps)
    h = h.unflatten(1, (shift.shape[1], -1))
    h = torch.addcmul(shift[:, :, None], h, 1.0 + scale[:, :, None])
    return h.flatten(1, 2).to(x.dtype)


def add_gated(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + h gate in fp32, in x's dtype. x, h: [B, N, D]; gate: [B, T, D]."""
    if gate.shape[1] == 1:  # no view: FSDP2 warns of those that leave a block
        return torch.addcmul(x.float(), h.float(), gate).to(x.dtype)
    frames = (gate.shape[1], -1)
    sum_ = torch.addcmul(
        x.float().unflatten(1, frames), h.float().unflatten(1, frames), gate[:, :, None]
    )
    return sum_.flatten(1, 2).to(x.dtype)
