"""Prompts to the states that Wan's transformers read: tokenizer and UMT5 of a model folder."""

from __future__ import annotations

import html
import logging
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from model.encoders.umt5 import load_umt5
from model.folders.folder import ModelFolder
from utils.weights import WeightsError

log = logging.getLogger(__name__)


class WanTextEncoder(nn.Module):
    """Prompts to UMT5 states, as Wan reads them: padded to `text_len` rows, zero past the end."""

    def __init__(self, folder: ModelFolder, text_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        weights = folder.text_encoder
        assert weights is not None, "check_model comes first"
        self.tokenizer = load_tokenizer(folder)
        self.encoder = load_umt5(weights, dtype)
        self.text_len = text_len
        sizes, wanted = self.encoder.config, folder.wan_config().text_dim
        if sizes.d_model != wanted or sizes.vocab_size < len(self.tokenizer):
            raise WeightsError(
                f"{weights}: a text encoder of {sizes.vocab_size} tokens and width "
                f"{sizes.d_model}; the tokenizer of {folder.path} has {len(self.tokenizer)}, its "
                f"transformer reads {wanted}"
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
        states = self.encoder(batch.input_ids, batch.attention_mask).last_hidden_state
        return states * batch.attention_mask[..., None].to(states.dtype)


def load_tokenizer(folder: ModelFolder) -> Any:
    """The tokenizer of a model folder. Raises WeightsError if it cannot be read."""
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(str(folder.tokenizer))
    except Exception as error:  # damaged files raise many types, some of them bare Exception
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder.tokenizer}: not a readable tokenizer: {reason}") from error


def clean_prompt(prompt: str) -> str:
    """Mend text, undo HTML escapes twice and collapse white space, as Wan does before tokenising.

    It matters for plain prompts too: mended text has straight quotes and commas of one width.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
