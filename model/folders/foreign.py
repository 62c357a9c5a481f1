"""What is given as weights and is something else: a LoRA, whatever names its tool gives it."""

from __future__ import annotations

import re

from utils.weights import Weights, WeightsError

_LORA = re.compile(
    r"(^|[._])lora_(A|B|up|down|unet|te)([._]|$)|\.alpha$|\.adapters\.[^.]+\.[ab]$"  # ours last
)


def adapter_names(weights: Weights) -> list[str]:
    """Those of `weights` that are an adapter's."""
    return [name for name in weights.shapes() if _LORA.search(name)]


def refuse_adapter(weights: Weights) -> None:
    """Raise WeightsError if `weights` are a LoRA's: what is added to a model, and no model."""
    names = adapter_names(weights)
    if names:
        raise WeightsError(
            f"{weights.path}: is a LoRA, an adapter that is added to a model's weights (it holds "
            f"{names[0]}, ...); add it with --adapter (inference.py, demo.py), go on training it "
            f"with generator.adapter.weights, or merge it into its base with "
            f"convert_checkpoint.py --input_path BASE --adapter {weights.path}"
        )
