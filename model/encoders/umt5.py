"""The UMT5 encoder of a model folder: sizes from weights or config, names translated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.folders import component
from utils.weights import WeightFile, Weights, WeightsError

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
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"  # one embedding, two names


def to_transformers(name: str) -> str:
    """The name that transformers' UMT5EncoderModel gives to the official weight `name`."""
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    for ours, theirs in _RULES:
        name = name.replace(ours, theirs)
    return name


def official_name(name: str) -> str:
    """The name in the official file of the weight that UMT5EncoderModel calls `name`."""
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    for ours, theirs in reversed(_RULES):
        name = name.replace(theirs, ours)
    return name


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UMT5EncoderModel's weights under official names; the tied second embedding is dropped."""
    return {official_name(name): value for name, value in state.items() if name != TIED}


def load_umt5(path: Path, dtype: torch.dtype) -> Any:
    """transformers' UMT5EncoderModel with the weights at `path`, frozen.

    path: the official file, or a text_encoder/ folder of diffusers' layout. Raises WeightsError
    that lists what is missing, unexpected or of another shape.
    """
    encoder, weights = open_umt5(path)
    component.fill(encoder, weights, dtype, what="a UMT5 encoder")
    return encoder


def open_umt5(path: Path) -> tuple[Any, Weights]:
    """A UMT5EncoderModel without weights, and what the folder or file `path` holds for it.

    The weights are under transformers' names. Raises WeightsError if the sizes cannot be told.
    """
    from transformers import UMT5Config, UMT5EncoderModel  # slow to import

    if path.is_dir():
        values = component.folder_config(path, "UMT5EncoderModel")
        file = component.folder_weights(path)
        names = {name: name for name in file.shapes()}
    else:
        file = WeightFile(path)
        values = _sizes(path, file.shapes())
        names = {to_transformers(name): name for name in file.shapes()}
    for one, other in ((SHARED, TIED), (TIED, SHARED)):
        if one in names:
            names.setdefault(other, names[one])
    with component.described(path), torch.device("meta"):
        network = UMT5EncoderModel(UMT5Config.from_dict(values))
    return network, component.Renamed(file, names)


def _sizes(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        return {
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
            "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
            "num_layers": len([name for name in shapes if name.endswith(".norm1.weight")]),
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
        }
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not a UMT5 encoder: {error} is missing") from error
