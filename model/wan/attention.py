"""One attention call: flash-attn where it is installed and fits, torch's own kernels elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v.

    q: [B, N, heads, head_dim]; k, v: [B, M, heads, head_dim]; mask: [N, M] bool, True = visible.
    Returns [B, N, heads, head_dim].
    """
    if mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        kernel = flash_attention()
        if kernel is not None:
            return kernel(q, k, v)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


@functools.cache
def flash_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The optional flash-attn kernel over [B, N, heads, head_dim], or None where not installed."""
    try:
        from flash_attn import flash_attn_func  # optional kernel
    except ImportError:
        return None
    return flash_attn_func
