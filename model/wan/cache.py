"""Keys and values of frames that are already clean, kept between forward passes."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values per layer, [B, N, heads, head_dim], in the order of their frames.

    Reading is free. Writing is allowed only without autograd: activation checkpointing runs a
    forward pass twice, and a write inside it would append twice.
    """

    def __init__(self, num_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def tokens(self) -> int:
        """How many tokens each layer holds."""
        keys = self._keys[0]
        return 0 if keys is None else keys.shape[1]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The past followed by `keys` and `values`; the cache itself is left as it is."""
        past_keys, past_values = self._keys[layer], self._values[layer]
        if past_keys is None or past_values is None:
            return keys, values
        return torch.cat([past_keys, keys], dim=1), torch.cat([past_values, values], dim=1)

    def commit(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Replace a layer's content with what `extend` returned for it."""
        if torch.is_grad_enabled():
            raise RuntimeError("a KV cache is written only under torch.no_grad()")
        self._keys[layer], self._values[layer] = keys, values
