"""From a configuration and a checkpoint to a ready generator: what all serving commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.conditioning import ConditioningEncoder, first_latents
from model.encoders.vae import VideoVAE
from model.families.base import Model
from model.families.registry import check_model
from model.folders.loading import Placement
from model.types import Keyframes, LatentSpec
from pipeline.protocol import InferencePipeline
from trainer.build import build_encoder
from trainer.config import Config
from trainer.inputs import check_latent_shape
from trainer.run import Run, resolve
from utils.errors import UserError
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

    network: nn.Module  # a Denoiser
    pipeline: InferencePipeline
    encoder: ConditioningEncoder
    vae: VideoVAE
    latent_shape: tuple[int, int, int, int]  # [C, F, H, W] of the clips it makes
    latent: LatentSpec
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
                raise UserError("this model begins with one image, or with latents, not more")
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
    """What a configuration means, and the checked weights of its generator."""

    run: Run
    weights: Weights

    @property
    def folder(self) -> Model:
        """The generator's model."""
        return self.run.model


def check_source(config: Config, checkpoint_path: Path, *, use_ema: bool | None) -> Source:
    """Find the model folder and the weights, and see that they fit. Nothing heavy is read.

    checkpoint_path: a log directory, a training checkpoint, a weight file or a model folder.
    use_ema: take a training checkpoint's averaged weights; None = if it has some.
    Raises FileNotFoundError or WeightsError that says what is missing or does not fit.
    """
    run = resolve(config, ("generator",))
    check_model(run.model, weights=False)
    check_latent_shape(config.latent_shape, run.model)
    weights = run.model.find_weights(checkpoint_path, averaged=use_ema)
    run.model.check_weights(weights, what=f"generator {run.model.path}")
    return Source(run, weights)


def load_generator(
    config: Config,
    source: Source,
    device: torch.device,
) -> VideoGenerator:
    """Load what `check_source` found, for inference."""
    dtype = torch.bfloat16 if config.mixed_precision and device.type == "cuda" else torch.float32
    run, place = source.run, Placement(device, storage=dtype, compute=dtype)
    what = f"generator {run.model.path}"
    network = run.model.load_network(source.weights, place, what=what).requires_grad_(False)
    vae = run.model.load_codec(device, dtype)
    return VideoGenerator(
        network=network,
        pipeline=run.pipeline(network),
        encoder=build_encoder(run, device, dtype, vae),
        vae=vae,
        latent_shape=run.latent_shape,
        latent=run.model.latent,
        device=device,
    )
