"""The UMT5 encoder from an official Wan2.1 file: sizes read off the weights, names translated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.weights import WeightFile, WeightsError

# Ordered; official -> transformers.
_RULES = (
    ("token_embedding.", "shared."),
    ("blocks.", "encoder.block."),
    (".norm1.", ".layer.0.layer_norm."),
    (".norm2.", ".layer.1.layer_norm."),
    (".attn.", ".layer.0.SelfAttention."),
    (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
    (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."),
    (".ffn.fc2.", ".layer.1.DenseReluDense.wo."),
)


def to_transformers(name: str) -> str:
    """The name that transformers' UMT5EncoderModel gives to the official weight `name`."""
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    for ours, theirs in _RULES:
        name = name.replace(ours, theirs)
    return name


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UMT5EncoderModel's weights under official names; the tied second embedding is dropped."""
    return {
        _official(name): value
        for name, value in state.items()
        if name != "encoder.embed_tokens.weight"
    }


def _official(name: str) -> str:
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    for ours, theirs in reversed(_RULES):
        name = name.replace(theirs, ours)
    return name


def load_umt5(path: Path, dtype: torch.dtype) -> Any:
    """transformers' UMT5EncoderModel with the weights of an official file, frozen."""
    from transformers import UMT5Config, UMT5EncoderModel  # slow to import

    weights = WeightFile(path)
    shapes = weights.shapes()
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=shapes["blocks.0.attn.q.weight"][0] // heads,
            d_ff=shapes["blocks.0.ffn.fc1.weight"][0],
            num_layers=len([name for name in shapes if name.endswith(".norm1.weight")]),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=128,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    except KeyError as error:
        raise WeightsError(f"{path}: not a UMT5 encoder: {error} is missing") from error
    with torch.device("meta"):
        encoder: nn.Module = UMT5EncoderModel(config)
    state = {to_transformers(name): weights.read(name).to(dtype) for name in shapes}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    try:
        encoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path}: not a UMT5 encoder: {error}") from error
    return encoder.requires_grad_(False).eval()
