"""From a configuration and a checkpoint to a ready generator: what all serving commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.conditioning import ConditioningEncoder
from model.folder import ModelFolder, check_model, find_model
from model.loading import Placement, check_weights, find_weights, load_network
from model.wan_wrapper import VideoVAE, WanDiffusionWrapper, WanTextEncoder, load_vae
from pipeline.protocol import InferencePipeline
from trainer.build import run_pipeline
from trainer.config import Config, generator_model
from utils.seeding import sample_rng
from utils.video import to_unit
from utils.weights import Weights


@dataclass(frozen=True)
class Request:
    """One clip to make. Equal requests give equal clips, whoever asks in whatever order."""

    prompt: str
    seed: int
    sample: int = 0  # which of several clips of the same prompt and seed


@dataclass(frozen=True, eq=False)
class VideoGenerator:
    """A loaded model behind its own pipeline."""

    network: WanDiffusionWrapper
    pipeline: InferencePipeline
    encoder: ConditioningEncoder
    vae: VideoVAE
    latent_shape: tuple[int, int, int, int]  # [C, F, H, W] of the clips it makes
    device: torch.device

    def latents(
        self,
        requests: Sequence[Request],
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, F, H, W], fp32. `on_step(done, total)` is called after each step."""
        rng = sample_rng(
            0, "inference", [f"{r.seed}/{r.sample}/{r.prompt}" for r in requests], self.device
        )
        return self.pipeline.sample(
            self.encoder.encode([request.prompt for request in requests]),
            self.encoder.unconditional(len(requests)),
            self.latent_shape,
            rng,
            on_step=on_step,
        )

    def clips(
        self,
        requests: Sequence[Request],
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Clips [B, 3, P, H, W] in [0, 1]."""
        latents = self.latents(requests, on_step=on_step)
        return torch.cat([to_unit(self.vae.decode_to_pixel(row[None])) for row in latents])


@dataclass(frozen=True, eq=False)
class Source:
    """A checked model folder and the weights to put into it."""

    folder: ModelFolder
    weights: Weights


def check_source(config: Config, checkpoint_path: Path, *, use_ema: bool) -> Source:
    """Find the model folder and the weights, and see that they fit. Nothing heavy is read.

    checkpoint_path: a log directory, a training checkpoint, a weight file or a model folder.
    use_ema: take a training checkpoint's averaged weights.
    Raises FileNotFoundError or WeightsError that says what is missing or does not fit.
    """
    folder = find_model(Path(config.model_root), generator_model(config))
    check_model(folder, weights=False)
    weights = find_weights(checkpoint_path, averaged=use_ema)
    check_weights(folder.wan_config(), weights, what=f"generator {folder.path}")
    return Source(folder, weights)


def load_generator(
    config: Config,
    source: Source,
    device: torch.device,
    *,
    latent_frames: int | None = None,
) -> VideoGenerator:
    """Load what `check_source` found, for inference. latent_frames: None = as trained."""
    dtype = torch.bfloat16 if config.mixed_precision and device.type == "cuda" else torch.float32
    sizes = source.folder.wan_config()
    place = Placement(device, storage=dtype, compute=dtype)
    network = load_network(sizes, source.weights, place, what=f"generator {source.folder.path}")
    network.requires_grad_(False)
    text_encoder = WanTextEncoder(source.folder, sizes.text_len, dtype).to(device)
    channels, frames, height, width = config.latent_shape
    return VideoGenerator(
        network=network,
        pipeline=run_pipeline(config, network),
        encoder=ConditioningEncoder(
            text_encoder, negative_prompt=config.data.negative_prompt, device=device
        ),
        vae=load_vae(source.folder, device, dtype),
        latent_shape=(channels, latent_frames or frames, height, width),
        device=device,
    )
