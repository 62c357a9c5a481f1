"""From a configuration and a checkpoint to a ready generator: what all serving commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.conditioning import ConditioningEncoder
from model.folder import ModelFolder, check_model, find_model
from model.loading import Placement, check_weights, find_weights, load_network
from model.vae import VideoVAE, load_vae
from model.wan_wrapper import WanDiffusionWrapper, WanTextEncoder
from pipeline.protocol import InferencePipeline
from trainer.build import run_pipeline
from trainer.config import Config, generator_model
from trainer.inputs import check_latent_shape
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
        initial: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, F, H, W], fp32. `on_step(done, total)` is called after each step."""
        return torch.cat(list(self.pieces(requests, initial=initial, on_step=on_step)), dim=2)

    def pieces(
        self,
        requests: Sequence[Request],
        *,
        initial: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """The same latents as they come, [B, C, f, H, W] each; a whole-clip model gives one piece.

        initial: [B, C, g, H, W], frames that the clips begin with. Raises ValueError where the
        model cannot.
        """
        rng = sample_rng(
            0, "inference", [f"{r.seed}/{r.sample}/{r.prompt}" for r in requests], self.device
        )
        return self.pipeline.stream(
            self.encoder.encode([request.prompt for request in requests]),
            self.encoder.unconditional(len(requests)),
            self.latent_shape,
            rng,
            initial=initial,
            on_step=on_step,
        )

    def stream(
        self,
        request: Request,
        *,
        initial: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """One clip in pieces [3, p, H, W] in [0, 1], each decoded before the next is begun."""
        decoder = self.vae.stream_decoder()
        for piece in self.pieces([request], initial=initial, on_step=on_step):
            yield to_unit(decoder.decode(piece))[0]

    def clips(
        self,
        requests: Sequence[Request],
        *,
        initial: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Clips [B, 3, P, H, W] in [0, 1]. initial: see `pieces`."""
        latents = self.latents(requests, initial=initial, on_step=on_step)
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
    check_latent_shape(config, folder)
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
    text_encoder = WanTextEncoder(source.folder, sizes.text_len, dtype).to(device)
    channels, frames, height, width = config.latent_shape
    return VideoGenerator(
        network=network,
        pipeline=run_pipeline(config, network),
        encoder=ConditioningEncoder(
            text_encoder, negative_prompt=config.data.negative_prompt, device=device
        ),
        vae=load_vae(source.folder, device, dtype),
        latent_shape=(channels, frames, height, width),
        device=device,
    )
