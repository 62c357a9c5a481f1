"""From a configuration and a checkpoint to a ready generator: what all serving commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.conditioning import ConditioningEncoder, first_latents
from model.encoders.vae import VideoVAE, load_vae
from model.folders.folder import ModelFolder, check_model, find_model
from model.folders.loading import Placement, check_weights, find_weights, load_network
from model.types import Keyframes
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.protocol import InferencePipeline
from trainer.build import build_encoder, run_pipeline
from trainer.config import Config, generator_model
from trainer.inputs import check_latent_shape
from utils.media.video import to_unit
from utils.seeding import sample_rng
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
        keyframes: Keyframes | None = None,
        initial: Tensor | None = None,
        latent_shape: Sequence[int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, F, H, W], fp32. `on_step(done, total)` is called after each step."""
        pieces = self.pieces(
            requests,
            keyframes=keyframes,
            initial=initial,
            latent_shape=latent_shape,
            on_step=on_step,
        )
        return torch.cat(list(pieces), dim=2)

    def pieces(
        self,
        requests: Sequence[Request],
        *,
        keyframes: Keyframes | None = None,
        initial: Tensor | None = None,
        latent_shape: Sequence[int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """The same latents as they come, [B, C, f, H, W] each; a whole-clip model gives one piece.

        keyframes: the images of an image-to-video model; a causal model without image inputs begins
        with them as its first latent frame. initial: [B, C, g, H, W], latents that the clips of a
        causal model begin with. latent_shape: [C, F, H, W], if not the usual one. Raises ValueError
        where the model cannot.
        """
        shape = self.latent_shape if latent_shape is None else latent_shape
        rng = sample_rng(
            0, "inference", [f"{r.seed}/{r.sample}/{r.prompt}" for r in requests], self.device
        )
        if keyframes is not None and not self.encoder.reads_images:
            if initial is not None or keyframes.last is not None:
                raise ValueError("this model begins with one image, or with latents, not more")
            initial = first_latents(self.vae, keyframes.first)
            keyframes = None
        prompts = [request.prompt for request in requests]
        conditioning = self.encoder.encode(prompts, keyframes, frames=shape[1])
        return self.pipeline.stream(
            conditioning,
            self.encoder.unconditional(conditioning),
            shape,
            rng,
            initial=initial,
            on_step=on_step,
        )

    def stream(
        self,
        request: Request,
        *,
        keyframes: Keyframes | None = None,
        initial: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """One clip in pieces [3, p, H, W] in [0, 1], each decoded before the next is begun."""
        decoder = self.vae.stream_decoder()
        for piece in self.pieces([request], keyframes=keyframes, initial=initial, on_step=on_step):
            yield to_unit(decoder.decode(piece))[0]

    def clips(
        self,
        requests: Sequence[Request],
        *,
        keyframes: Keyframes | None = None,
        initial: Tensor | None = None,
        latent_shape: Sequence[int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Clips [B, 3, P, H, W] in [0, 1]; the settings are those of `pieces`."""
        latents = self.latents(
            requests,
            keyframes=keyframes,
            initial=initial,
            latent_shape=latent_shape,
            on_step=on_step,
        )
        return torch.cat([to_unit(self.vae.decode_to_pixel(row[None])) for row in latents])


@dataclass(frozen=True, eq=False)
class Source:
    """A checked model folder and the weights to put into it."""

    folder: ModelFolder
    weights: Weights


def check_source(config: Config, checkpoint_path: Path, *, use_ema: bool | None) -> Source:
    """Find the model folder and the weights, and see that they fit. Nothing heavy is read.

    checkpoint_path: a log directory, a training checkpoint, a weight file or a model folder.
    use_ema: take a training checkpoint's averaged weights; None = if it has some.
    Raises FileNotFoundError or WeightsError that says what is missing or does not fit.
    """
    folder = find_model(Path(config.model_root), generator_model(config))
    check_model(folder, weights=False)
    check_latent_shape(config.latent_shape, folder)
    weights = find_weights(checkpoint_path, averaged=use_ema)
    check_weights(folder.wan_config(), weights, what=f"generator {folder.path}")
    return Source(folder, weights)


def load_generator(
    config: Config,
    source: Source,
    device: torch.device,
) -> VideoGenerator:
    """Load what `check_source` found, for inference."""
    dtype = torch.bfloat16 if config.mixed_precision and device.type == "cuda" else torch.float32
    sizes = source.folder.wan_config()
    place = Placement(device, storage=dtype, compute=dtype)
    network = load_network(sizes, source.weights, place, what=f"generator {source.folder.path}")
    network.requires_grad_(False)
    vae = load_vae(source.folder, device, dtype)
    channels, frames, height, width = config.latent_shape
    return VideoGenerator(
        network=network,
        pipeline=run_pipeline(config, network),
        encoder=build_encoder(config, source.folder, device, dtype, vae),
        vae=vae,
        latent_shape=(channels, frames, height, width),
        device=device,
    )
