"""What a run takes of memory at least, so that absurd sizes are refused before any is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.memory import available_memory
from trainer.config import Config
from utils.config import ConfigError
from utils.distributed import Session
from utils.parallel import ParallelConfig

# Values per token, layer and unit of width that a backward pass keeps of a block, at least: its
# input alone if it is recomputed, beside it what both kinds of attention return if all else is,
# and otherwise all that products and activations are made of.
KEPT = {"block": 1, "selective": 3, "none": 10}
LATENTS = 4  # copies of a batch's latents, fp32: noise, clean, noised and their gradient


def training_bytes(
    config: Config, samples: int, *, tokens: int, layers: int, width: int, latent_values: int
) -> int:
    """Bytes that `samples` of one micro-batch take on a device at least, weights not counted.

    tokens: of one sample. layers, width: of the trained transformer. latent_values: C x F x H x W.
    """
    kept = kept_per_layer(config.parallel, layers) * width * tokens
    return samples * (kept * (2 if config.mixed_precision else 4) + 4 * LATENTS * latent_values)


def kept_per_layer(config: ParallelConfig, layers: int) -> int:
    """Values per token and unit of width that all layers together keep at least."""
    again = -(-layers // config.checkpoint_every)
    elsewhere = again if config.offload_inputs else 0
    return KEPT[config.activation_checkpoint] * again - elsewhere + KEPT["none"] * (layers - again)


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU, or of the machine."""
    memory = available_memory(device)
    return memory.host if memory.device is None else memory.device


def check_memory(config: Config, session: Session, *, tokens: int, layers: int, width: int) -> None:
    """Raise ConfigError if a micro-batch cannot fit into a device's memory, whatever else is there.

    A lower bound: what passes may still be too much. The arguments are `training_bytes`'.
    """
    samples = config.batch_size // (config.accumulation * session.data_world)
    channels, frames, height, width_ = config.latent_shape
    needed = training_bytes(
        config,
        samples,
        tokens=tokens // session.group,
        layers=layers,
        width=width,
        latent_values=channels * frames * height * width_,
    )
    there = device_bytes(session.device)
    if needed > there:
        raise ConfigError(too_large(config.latent_shape, samples, needed, there))


def too_large(shape: Sequence[int], samples: int, needed: int, there: int) -> str:
    """What to say of sizes that do not fit, and what to change."""
    return (
        f"batch_size: {samples} samples at once of latent_shape {list(shape)} take "
        f"{needed / 2**30:,.0f} GiB at least, and this device has {there / 2**30:,.0f} GiB; lower "
        f"batch_size or latent_shape, raise accumulation, use more ranks, or set "
        f"parallel.activation_checkpoint=block"
    )
