"""Which autoencoder makes the pixels of clips: the model's own, or the tiny one for previews."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.encoders.tiny_vae import PreviewVAE, TinyVAE, open_tiny_vae
from model.encoders.vae import VideoVAE
from model.families.base import Model
from utils.cli import path_word
from utils.config import ConfigError
from utils.hashes import sha256_of

FULL, TINY = "full", "tiny"


def add_vae_flags(parser: argparse.ArgumentParser) -> None:
    """The words of a command that choose who decodes."""
    parser.add_argument(
        "--vae", choices=(FULL, TINY), default=FULL,
        help="what makes pixels: the model's autoencoder, or for previews a tiny one "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tiny_vae", type=path_word, default=None,
        help="with --vae tiny: taew2_1 (.pth, .safetensors), or taew2_2 for latents of 48 channels",
    )  # fmt: skip


def read_tiny_vae(args: argparse.Namespace, model: Model) -> Path | None:
    """The file of the tiny autoencoder that decodes; None = the model's own does.

    Its shapes alone are read. Raises ConfigError for words that do not go together, and
    WeightsError for a file that does not fit the model.
    """
    path: Path | None = args.tiny_vae
    if args.vae == FULL:
        if path is not None:
            raise ConfigError(f"--tiny_vae {path}: has no effect without --vae {TINY}")
        return None
    if path is None:
        name = "taew2_2" if model.latent.channels == 48 else "taew2_1"
        raise ConfigError(
            f"--vae {TINY}: needs --tiny_vae, the file of {name}; or use --vae {FULL}"
        )
    open_tiny_vae(path, model.latent)
    return path


def vae_settings(tiny: Path | None) -> dict[str, Any]:
    """What a manifest says of who made the pixels."""
    if tiny is None:
        return {"vae": FULL, "tiny_vae_sha256": None}
    return {"vae": TINY, "tiny_vae_sha256": sha256_of({tiny.name: tiny})[tiny.name]}


def load_vae(
    model: Model, device: torch.device, dtype: torch.dtype, tiny: Path | None = None
) -> VideoVAE:
    """The model's codec; decoding with the one at `tiny` where that is given."""
    full = partial(model.load_codec, device, dtype)
    if tiny is None:
        return full()
    return PreviewVAE(TinyVAE.load(tiny, dtype, model.latent).to(device), full)
