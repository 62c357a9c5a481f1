"""What is given as weights and is something else: a LoRA, or weights that are quantised."""

from __future__ import annotations

import re

from utils.weights import WeightFile, Weights, WeightsError

_LORA = re.compile(
    r"(^|[._])lora_(A|B|up|down|unet|te)([._]|$)|\.alpha$|\.adapters\.[^.]+\.[ab]$"  # ours last
)

# What tools put beside weights of few bits, and the dtypes of weights that are none.
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_(weight|input)|(weight|input)_scale(_inv)?|absmax|quant_(map|state.*)"
    r"|comfy_quant|qweight|qzeros)$"
)
_WHOLE = {
    *("F32", "BF16", "F16"),  # of safetensors
    *("torch.float32", "torch.bfloat16", "torch.float16"),
}


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


def refuse_quantised(weights: WeightFile) -> None:
    """Raise WeightsError if a file holds weights of few bits, with or without their scales.

    They would load: the scales may be passed over, and the rest trains as noise.
    """
    dtypes = weights.dtypes()
    names = [name for name in dtypes if _SCALES.search(name)]
    names += [name for name, dtype in dtypes.items() if dtype not in _WHOLE]
    if names:
        raise WeightsError(
            f"{weights.path}: holds quantised weights ({names[0]} of dtype {dtypes[names[0]]}, "
            f"...), which without their scales are noise; give the weights that they were made of, "
            f"in float32, bfloat16 or float16"
        )
