"""What is given as weights and is something else: a LoRA, whatever names its tool gives it."""

from __future__ import annotations

import re

from utils.weights import Weights, WeightsError

_LORA = re.compile(r"(^|[._])lora_(A|B|up|down|unet|te)([._]|$)|\.alpha$")


def refuse_adapter(weights: Weights) -> None:
    """Raise WeightsError if `weights` are a LoRA's: what is added to a model, and no model."""
    names = [name for name in weights.shapes() if _LORA.search(name)]
    if names:
        raise WeightsError(
            f"{weights.path}: is a LoRA, an adapter that is added to a model's weights (it holds "
            f"{names[0]}, ...); give the weights of a whole model, such as the two merged"
        )
