"""Prompts to the states that transformers read: what each text encoder offers, and Wan's UMT5."""

from __future__ import annotations

import html
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from model.encoders.umt5 import load_umt5
from utils.weights import WeightsError

log = logging.getLogger(__name__)


class TextEncoder(nn.Module, ABC):
    """Prompts to states [B, length, width], zero past each prompt's end."""

    @abstractmethod
    def forward(self, prompts: list[str]) -> Tensor:
        """States [B, length, width] in the encoder's dtype."""

    @abstractmethod
    def tokens_cut(self, prompt: str) -> int:
        """How many tokens of a prompt the model does not read."""


class WanTextEncoder(TextEncoder):
    """Prompts to UMT5 states, as Wan reads them: padded to `text_len` rows, zero past the end."""

    def __init__(
        self, weights: Path, tokenizer: Path, *, text_len: int, text_dim: int, dtype: torch.dtype
    ) -> None:
        """weights: a file or a folder of either layout. Raises WeightsError."""
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer)
        self.encoder = load_umt5(weights, dtype)
        self.text_len = text_len
        sizes = self.encoder.config
        if sizes.d_model != text_dim or sizes.vocab_size < len(self.tokenizer):
            raise WeightsError(
                f"{weights}: a text encoder of {sizes.vocab_size} tokens and width "
                f"{sizes.d_model}; the tokenizer {tokenizer} has {len(self.tokenizer)}, the "
                f"transformer reads {text_dim}"
            )

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        """Text states [B, text_len, text_dim] in the encoder's dtype."""
        device = next(self.encoder.parameters()).device
        ids = self.tokenizer([clean_prompt(p) for p in prompts], add_special_tokens=True).input_ids
        for prompt, words in zip(prompts, ids, strict=True):
            if len(words) > self.text_len:
                log.warning(
                    "prompt of %d tokens cut to the %d that this model reads: '%.60s...'",
                    len(words),
                    self.text_len,
                    prompt,
                )
        batch = self.tokenizer(
            [clean_prompt(p) for p in prompts],
            add_special_tokens=True,
            padding="max_length",
            truncation=True,
            max_length=self.text_len,
            return_tensors="pt",
        ).to(device)
        states: Tensor = self.encoder(batch.input_ids, batch.attention_mask).last_hidden_state
        mask: Tensor = batch.attention_mask
        return states * mask[..., None].to(states.dtype)

    def tokens_cut(self, prompt: str) -> int:
        """How many tokens of a prompt the model does not read."""
        words = self.tokenizer(clean_prompt(prompt), add_special_tokens=True).input_ids
        return max(0, len(words) - self.text_len)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Raises WeightsError if it cannot be read."""
    from transformers import AutoTokenizer  # slow to import

    try:
        # A folder may ask for code of its own to be run; it is not, nor is anybody asked whether.
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # damaged files raise many types, some of them bare Exception
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder}: not a readable tokenizer: {reason}") from error


def clean_prompt(prompt: str) -> str:
    """Mend text, undo HTML escapes twice and collapse white space, as Wan does before tokenising.

    It matters for plain prompts too: mended text has straight quotes and commas of one width.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
