"""Prompts to Conditioning, each prompt encoded once per run as long as it is remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.types import Conditioning


class ConditioningEncoder:
    """Encodes prompts one by one, so that a state never depends on its neighbours in a batch."""

    def __init__(
        self,
        encode: Callable[[list[str]], Tensor],
        *,
        negative_prompt: str,
        device: torch.device,
        remembered: int = 4096,
    ) -> None:
        """`encode` maps prompts to [B, L, text_dim]; `remembered`: how many prompts are kept."""
        self._encode = encode
        self._device = device
        self._remembered = remembered
        self._states: OrderedDict[str, Tensor] = OrderedDict()
        self._negative = encode([negative_prompt])[0].to(device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of a batch of prompts, [B, L, text_dim]."""
        return Conditioning(torch.stack([self._state(prompt) for prompt in prompts]))

    def unconditional(self, batch: int) -> Conditioning:
        """The negative prompt's conditioning, `batch` times."""
        return Conditioning(self._negative.expand(batch, -1, -1))

    def _state(self, prompt: str) -> Tensor:
        if prompt not in self._states:
            self._states[prompt] = self._encode([prompt])[0].to(self._device)
            if len(self._states) > self._remembered:
                self._states.popitem(last=False)
        self._states.move_to_end(prompt)
        return self._states[prompt]
