"""Names of the autoencoder's weights: Wan2.1_VAE.pth on one side, diffusers on the other."""

from __future__ import annotations

import re

# Ordered; official -> diffusers. Backwards, the last rule comes first.
_RULES = (
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    (".downsamples.", ".down_blocks."),
    (".middle.0.", ".mid_block.resnets.0."),
    (".middle.1.", ".mid_block.attentions.0."),
    (".middle.2.", ".mid_block.resnets.1."),
    (".head.0.", ".norm_out."),
    (".head.2.", ".conv_out."),
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)
_OUTER = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_INNER = {theirs: ours for ours, theirs in _OUTER.items()}

# A stage of the decoder is four layers in a row there, three resnets and an upsampler here.
_STAGE = 4
_LAYER = re.compile(r"^decoder\.upsamples\.(\d+)\.")
_BLOCK = re.compile(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.([0-2])|upsamplers\.0)\.")


def to_diffusers(name: str) -> str:
    """The name that diffusers' AutoencoderKLWan gives to the official weight `name`."""
    head, dot, rest = name.partition(".")
    if head in _OUTER:
        return _OUTER[head] + dot + rest
    for ours, theirs in _RULES:
        name = name.replace(ours, theirs)
    return _LAYER.sub(_block, name)


def to_official(name: str) -> str:
    """The name in Wan2.1_VAE.pth of the weight that diffusers calls `name`."""
    head, dot, rest = name.partition(".")
    if head in _INNER:
        return _INNER[head] + dot + rest
    name = _BLOCK.sub(_layer, name)
    for ours, theirs in reversed(_RULES):
        name = name.replace(theirs, ours)
    return name


def _block(match: re.Match[str]) -> str:
    stage, layer = divmod(int(match[1]), _STAGE)
    inner = "upsamplers.0" if layer == _STAGE - 1 else f"resnets.{layer}"
    return f"decoder.up_blocks.{stage}.{inner}."


def _layer(match: re.Match[str]) -> str:
    layer = _STAGE - 1 if match[2] is None else int(match[2])
    return f"decoder.upsamples.{_STAGE * int(match[1]) + layer}."
