"""Names of the autoencoders' weights: the releases' .pth files on one side, diffusers on the other.

Wan2.1 counts the layers of its encoder, and of its decoder, from end to end; Wan2.2 counts stages,
and layers within them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Ordered; official -> diffusers. Backwards, the last rule comes first.
_RULES = (
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.downsamples.", "encoder.down_blocks."),
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

# A stage of Wan2.1's decoder is four layers in a row there, three resnets and an upsampler here.
_STAGE = 4
_LAYER = re.compile(r"^decoder\.upsamples\.(\d+)\.(?!upsamples\.)")
_BLOCK = re.compile(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.([0-2])|upsamplers\.0)\.")

# A stage of Wan2.2: two resnets and a downsampler, or three resnets and an upsampler.
_RESNETS = {"down": 2, "up": 3}
_LAYER22 = re.compile(r"^(..coder\.)(?:down_blocks|upsamples)\.(\d+)\.(down|up)samples\.(\d+)\.")
_BLOCK22 = re.compile(
    r"^(..coder\.)(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)sampler)\."
)


def to_diffusers(name: str) -> str:
    """The name that diffusers' AutoencoderKLWan gives to the official weight `name`."""
    head, dot, rest = name.partition(".")
    if head in _OUTER:
        return _OUTER[head] + dot + rest
    for ours, theirs in _RULES:
        name = name.replace(ours, theirs)
    return _LAYER22.sub(_block22, _LAYER.sub(_block, name))


def to_official(names: Iterable[str]) -> dict[str, str]:
    """The official name of each weight of an autoencoder that diffusers calls by `names`.

    All of them, since only together they tell of which autoencoder they are.
    """
    names = list(names)
    staged = any(name.startswith("encoder.down_blocks.0.resnets.") for name in names)
    return {name: _official(name, staged=staged) for name in names}


def _official(name: str, *, staged: bool) -> str:
    """staged: of Wan2.2."""
    head, dot, rest = name.partition(".")
    if head in _INNER:
        return _INNER[head] + dot + rest
    name = _BLOCK22.sub(_layer22, name) if staged else _BLOCK.sub(_layer, name)
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


def _block22(match: re.Match[str]) -> str:
    half, stage, way, layer = match[1], match[2], match[3], int(match[4])
    inner = f"{way}sampler" if layer == _RESNETS[way] else f"resnets.{layer}"
    return f"{half}{way}_blocks.{stage}.{inner}."


def _layer22(match: re.Match[str]) -> str:
    half, way, stage = match[1], match[2], match[3]
    layer = _RESNETS[way] if match[4] is None else int(match[4])
    return f"{half}{way}samples.{stage}.{way}samples.{layer}."
