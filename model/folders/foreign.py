"""What looks like a model or its weights and is something else, by name: LoRAs, Wan2.2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.weights import Weights, WeightsError

# Two networks for two ranges of noise, as the official release and diffusers name their folders.
_TWO_NETWORKS = ("high_noise_model", "low_noise_model", "transformer_2")
_LORA = re.compile(r"(^|[._])lora_(A|B|up|down|unet|te)([._]|$)|\.alpha$")
_CHANNELS = 48  # of the latents of Wan2.2's own autoencoder


def refuse_foreign(path: Path) -> None:
    """Raise UserError if the folder at `path` is a release that nothing here reads."""
    mark = _wan22(path)
    if mark is not None:
        raise UserError(
            f"{path}: is a Wan2.2 release ({mark}), and Wan2.1's are read alone; use one of them"
        )


def refuse_adapter(weights: Weights) -> None:
    """Raise WeightsError if `weights` are a LoRA's: what is added to a model, and no model."""
    names = [name for name in weights.shapes() if _LORA.search(name)]
    if names:
        raise WeightsError(
            f"{weights.path}: is a LoRA, an adapter that is added to a model's weights (it holds "
            f"{names[0]}, ...); give the weights of a whole model, such as the two merged"
        )


def _wan22(path: Path) -> str | None:
    """What shows that a folder is one of Wan2.2; None = nothing does."""
    held = [f"it holds {name}/" for name in _TWO_NETWORKS if (path / name).is_dir()]
    if (path / "Wan2.2_VAE.pth").is_file():
        held.append("it holds Wan2.2_VAE.pth")
    transformer = _first_json((path / "config.json", path / "transformer" / "config.json"))
    if transformer.get("model_type") == "ti2v":
        held.append("its model_type is ti2v")
    channels = transformer.get("out_dim", transformer.get("out_channels"))
    codec = _first_json([path / "vae" / "config.json"])
    if _CHANNELS in (channels, codec.get("z_dim")):
        held.append(f"its latents have {_CHANNELS} channels")
    return held[0] if held else None


def _first_json(paths: Iterable[Path]) -> dict[str, Any]:
    """The first of these files that is there and holds a mapping; others have their own errors."""
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            return values
    return {}
