"""The CLIP image encoder of image-to-video models: sizes read off the weights, names translated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.folders import component
from utils.weights import WeightFile, WeightsError

HEAD_DIM = 80  # of the official ViT-H; its file does not tell
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red green blue
STD = (0.26862954, 0.26130258, 0.27577711)
_PREFIX = "visual."  # the official file's; its text half lies behind "textual."
_THEIR_PREFIX = "vision_model."  # in files of transformers 4
_DROPPED = ("head", "log_scale", "textual.")  # for comparison with text
_THEIR_DROPPED = "visual_projection."  # the head, in folders of the second class
_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection")

# Official -> transformers: the beginning of a weight's name, up to a dot or the end.
_NAMES = {
    "patch_embedding": "embeddings.patch_embedding",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
# The same behind "transformer.N." and "encoder.layers.N.".
_LAYER_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_JOINED, _PARTS = "attn.to_qkv", [f"self_attn.{part}_proj" for part in "qkv"]


class WanCLIPEncoder(nn.Module):
    """Images to what Wan2.1's image-to-video models read of them: the last states but one."""

    def __init__(self, path: Path, *, tokens: int, width: int, dtype: torch.dtype) -> None:
        """path: as for `load_clip`. tokens, width: of the states that the transformer reads."""
        super().__init__()
        self.encoder = load_clip(path, dtype)
        embeddings = self.encoder.embeddings
        found = (embeddings.num_positions, embeddings.embed_dim)
        if found != (tokens, width):
            raise WeightsError(
                f"{path}: a CLIP image encoder of {found[0]} states of width {found[1]}; the "
                f"transformer reads {tokens} of {width}"
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to states [B, n, width] in the encoder's dtype.

        n: a class token and one token per patch.
        """
        weight = self.encoder.embeddings.patch_embedding.weight
        pixels = preprocess(images.to(weight.device), self.encoder.config.image_size)
        states: Tensor = self.encoder(pixels.to(weight.dtype)).last_hidden_state
        return states


def preprocess(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], squeezed to size x size pixels and normalised, fp32."""
    # Without antialiasing and with the aspect ratio lost, as the transformer was trained on it.
    small = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (small.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (small * 0.5 + 0.5 - mean) / std


def load_clip(path: Path, dtype: torch.dtype) -> Any:
    """transformers' CLIPVisionModel without its last layer, frozen.

    path: the official file, or an image_encoder/ folder of diffusers' layout. Raises WeightsError.
    """
    from transformers import CLIPVisionModel  # slow to import

    config, state = read_image_encoder(path)
    # What is read are the states before the last layer, so it is neither kept nor computed.
    config.num_hidden_layers -= 1
    last = f"encoder.layers.{config.num_hidden_layers}."
    with component.described(path), torch.device("meta"):
        model = CLIPVisionModel(config)
    encoder: Any = getattr(model, "vision_model", model)  # transformers 4 wraps it once more
    state = {name: v.to(dtype) for name, v in state.items() if not name.startswith(last)}
    try:
        encoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path}: not a CLIP image encoder: {reason}") from error
    positions = encoder.embeddings.num_positions
    encoder.embeddings.position_ids = torch.arange(positions)[None]  # stored in no file
    return encoder.requires_grad_(False).eval()


def read_image_encoder(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The CLIPVisionConfig and the weights of an encoder, all layers, under transformers' names.

    path: as for `load_clip`. Raises WeightsError.
    """
    from transformers import CLIPVisionConfig  # slow to import

    if path.is_dir():
        values = component.folder_config(path, *_CLASSES)
        with component.described(path):
            config = CLIPVisionConfig.from_dict(values)
        file = component.folder_weights(path)
        return config, _without_prefix({name: file.read(name) for name in file.shapes()})
    file = WeightFile(path)
    held = [name for name in file.shapes() if name.startswith(_PREFIX)]
    config = CLIPVisionConfig(**_sizes(file))
    return config, to_transformers({name: file.read(name) for name in held})


def _sizes(file: WeightFile) -> dict[str, Any]:
    """transformers' configuration of the encoder in an official file."""
    shapes = {name.removeprefix(_PREFIX): shape for name, shape in file.shapes().items()}
    try:
        width, _, _, patch = shapes["patch_embedding.weight"]
        tokens = shapes["pos_embedding"][1]
        hidden = shapes["transformer.0.mlp.0.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{file.path}: not a CLIP image encoder: {error} is missing") from error
    if width % HEAD_DIM:
        raise WeightsError(
            f"{file.path}: a CLIP image encoder of width {width}; the official file's heads are "
            f"{HEAD_DIM} wide, which must divide it"
        )
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": sum(name.endswith(_JOINED + ".weight") for name in shapes),
        "num_attention_heads": width // HEAD_DIM,
        "patch_size": patch,
        "image_size": patch * math.isqrt(tokens - 1),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official encoder's weights under the names of transformers' CLIPVisionModel.

    The text half and the projections that compare images with text are dropped.
    """
    result = {}
    for name, value in ((name.removeprefix(_PREFIX), value) for name, value in state.items()):
        if name.startswith(_DROPPED):
            continue
        layer, rest = _layer(name, "transformer.")
        if layer is None:
            new = _renamed(rest, _NAMES)
            result[new] = value.reshape(_shape_of(new, value))
        elif rest.startswith(_JOINED):
            for part, third in zip(_PARTS, value.chunk(3), strict=True):
                result[f"encoder.layers.{layer}.{part}{rest.removeprefix(_JOINED)}"] = third
        else:
            result[f"encoder.layers.{layer}.{_renamed(rest, _LAYER_NAMES)}"] = value
    return result


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPVisionModel's weights under official names, those of the image half."""
    result, state = {}, _without_prefix(state)
    for name, value in state.items():
        layer, rest = _layer(name, "encoder.layers.")
        if layer is None:
            new = _renamed(rest, {theirs: ours for ours, theirs in _NAMES.items()})
            result[_PREFIX + new] = value.reshape(_shape_of(new, value))
        elif rest.startswith(_PARTS[0]):
            kind = rest.removeprefix(_PARTS[0])
            parts = [state[f"encoder.layers.{layer}.{part}{kind}"] for part in _PARTS]
            result[f"{_PREFIX}transformer.{layer}.{_JOINED}{kind}"] = torch.cat(parts)
        elif not rest.startswith(tuple(_PARTS)):
            new = _renamed(rest, {theirs: ours for ours, theirs in _LAYER_NAMES.items()})
            result[f"{_PREFIX}transformer.{layer}.{new}"] = value
    return result


def _layer(name: str, prefix: str) -> tuple[str | None, str]:
    """The number of the layer that the weight `name` is of, if any, and the rest of its name."""
    if not name.startswith(prefix):
        return None, name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return number, rest


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def _shape_of(name: str, value: Tensor) -> tuple[int, ...]:
    """The shape that goes with a name: the official embeddings have leading axes of one."""
    width = value.shape[-1]
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.position_embedding.weight": (-1, width),
        "cls_embedding": (1, 1, width),
        "pos_embedding": (1, -1, width),
    }.get(name, tuple(value.shape))


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers 5 for those of 4, whose files also hold a list of positions.

    Without the projection that compares images with text.
    """
    named = {name.removeprefix(_THEIR_PREFIX): value for name, value in state.items()}
    return {
        name: value
        for name, value in named.items()
        if not name.endswith("position_ids") and not name.startswith(_THEIR_DROPPED)
    }
