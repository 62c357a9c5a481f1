"""Attention calls: for whole videos, masks of frames, and a past; by the kernel that is named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.wan.kernels import USUAL, compute
from model.wan.masks import FrameMask

FLEX_TILE = 128  # tokens on each side of the tiles that FlexAttention skips or computes


MaskedBy = Literal["auto", "flex", "blocks"]
Mask = FrameMask | BlockMask  # constants, in the form that a device's attention reads


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = None, kernel: str = USUAL
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over all tokens, or over the frames that `mask` shows.

    q: [B, N, heads, head_dim]; k, v: [B, M, heads, head_dim]; with a mask, N = M = F n. Returns
    [B, N, heads, head_dim]. kernel: see model/wan/kernels.py.
    """
    if mask is None:
        return compute(q, k, v, kernel)
    if isinstance(mask, BlockMask):
        return attend_flex(q, k, v, mask)
    return attend_blocks(q, k, v, mask, kernel=kernel)


def device_mask(
    mask: FrameMask, per_frame: int, device: torch.device, by: MaskedBy = "auto"
) -> Mask:
    """`mask` between frames of so many tokens, in the form that `by` reads.

    flex: FlexAttention, one kernel that is compiled. blocks: a loop over groups of frames, each a
    call of the plain kernel on what it sees. auto: the first on CUDA, the second elsewhere.
    """
    flex = device.type == "cuda" if by == "auto" else by == "flex"
    return flex_mask(mask, per_frame, device) if flex else mask


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, *, kernel: str = USUAL
) -> Tensor:
    """One unmasked call per group of frames, on the keys that it sees; nothing is masked away."""
    n = q.shape[1] // mask.frames
    parts = []
    for group in mask.groups:
        first, last = group.queries
        seen = [slice(a * n, b * n) for a, b in group.keys]
        keys = torch.cat([k[:, span] for span in seen], dim=1) if seen[1:] else k[:, seen[0]]
        values = torch.cat([v[:, span] for span in seen], dim=1) if seen[1:] else v[:, seen[0]]
        parts.append(compute(q[:, first * n : last * n], keys, values, kernel))
    return torch.cat(parts, dim=1)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """The same through FlexAttention; on CUDA compiled, elsewhere eager and without gradients."""
    # Within a compiled block the call belongs to the block's own graph.
    own_graph = q.is_cuda and not torch.compiler.is_compiling()
    kernel: Any = _compiled_flex() if own_graph else flex_attention
    out: Tensor = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
    return out.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    kernel: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return kernel


def flex_mask(mask: FrameMask, per_frame: int, device: torch.device) -> BlockMask:
    """FlexAttention's own form of a mask, from frames alone: no [N, N] tensor is ever made."""
    visible, tokens = mask.visible(), mask.frames * per_frame
    frame = torch.arange(tokens) // per_frame
    tiles = -(-tokens // FLEX_TILE)
    touches = torch.zeros(tiles, mask.frames)  # [tile, frame]
    touches[torch.arange(tokens) // FLEX_TILE, frame] = 1.0
    some = touches @ visible.float() @ touches.T > 0
    whole = touches @ (~visible).float() @ touches.T == 0
    if tokens % FLEX_TILE:  # the last tile reaches past the end: let the mask decide there
        whole[-1] = whole[:, -1] = False
    on_device = visible.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return on_device[query // per_frame, key // per_frame]

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole, device),
        *_listed(some & whole, device),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def _listed(tiles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of tiles, how many are set, [1, 1, R], and their columns first, [1, 1, R, R]."""
    order = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
    counts = tiles.sum(dim=1)
    return counts.int()[None, None].to(device), order.int()[None, None].to(device)


def attend_past(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    keys: Callable[[], Tensor],
    values: Callable[[], Tensor],
) -> Tensor:
    """Attention whose keys and values are joined from pieces, now and again in the backward pass.

    `keys` and `values` join a long shared past with a short present. Autograd would keep each
    joined tensor, so that every block of a rollout would hold the whole cache once more; here it
    keeps only how to join them, which costs a copy in the backward pass.
    """
    joined = keys(), values()
    makers = {
        tensor.untyped_storage().data_ptr(): make
        for tensor, make in zip(joined, (keys, values), strict=True)
    }

    def pack(tensor: Tensor) -> Any:  # lives as long as what it packs: it must not hold `joined`
        make = makers.get(tensor.untyped_storage().data_ptr())
        if make is None:
            return tensor.detach()  # of an output, the tensor itself would be a cycle
        return make, tensor.shape, tensor.stride(), tensor.storage_offset()

    with saved_tensors_hooks(pack, _unpack):
        return attention(q, *joined)


@torch.no_grad()
def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    make, *layout = packed
    joined: Tensor = make()
    return joined.as_strided(*layout)


class Attend(Protocol):
    """Attention as a block calls it; see `attend`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = None) -> Tensor:
        """[B, N, heads, head_dim]."""


def use_kernel(network: nn.Module, kernel: str, masked_by: MaskedBy = "auto") -> None:
    """Let every attention of `network` be computed by the kernel of that name. In place.

    masked_by: see `device_mask`.
    """
    for module in network.modules():
        if hasattr(module, "attend"):
            setattr(module, "attend", functools.partial(attend, kernel=kernel))  # noqa: B010
        if hasattr(module, "masked_by"):
            setattr(module, "masked_by", masked_by)  # noqa: B010
