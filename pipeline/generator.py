"""A loaded model behind one interface: requests in; latents, pieces or whole clips out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from model.conditioning import ConditioningEncoder
from model.encoders.vae import VideoVAE
from model.types import Keyframes
from pipeline.fields import RequestError
from pipeline.protocol import InferencePipeline, OnProgress, Progress
from pipeline.request import Capabilities, Footage, Request, problems
from utils.media.given_frames import Size
from utils.media.video import to_unit
from utils.seeding import sample_rng


@dataclass(frozen=True, eq=False)
class VideoGenerator:
    """Makes what requests ask for. Those of one batch share a `batch_key`."""

    network: nn.Module
    pipeline: InferencePipeline
    encoder: ConditioningEncoder
    vae: VideoVAE
    capabilities: Capabilities
    device: torch.device
    # Latents of the footage that the last clips began with: many clips may continue the same.
    _encoded: dict[tuple[Footage, Size], Tensor] = field(default_factory=dict)

    def latents(
        self, requests: Sequence[Request], *, on_progress: OnProgress | None = None
    ) -> Tensor:
        """Latents [B, C, F, H, W], fp32; see `pieces`."""
        return torch.cat(list(self.pieces(requests, on_progress=on_progress)), dim=2)

    def pieces(
        self, requests: Sequence[Request], *, on_progress: OnProgress | None = None
    ) -> Iterator[Tensor]:
        """The same latents as they come, [B, C, f, H, W] each; a whole-clip model gives one piece.

        A model without image inputs begins with a first image as its first latent frame.
        Raises RequestError where the model cannot.
        """
        first, model = requests[0], self.capabilities
        found = {line: None for request in requests for line in problems(request, model)}
        if found:
            raise RequestError(found)
        keys = {request.batch_key for request in requests}
        assert len(keys) == 1, "the requests of a batch must have one size, length and sampling"
        shape, size = first.shape(model), first.size or model.size
        rng = sample_rng(0, "inference", [r.noise_key for r in requests], self.device)
        keyframes, initial = self._keyframes(requests, size), self._initial(requests, size)
        prompts = [request.prompt for request in requests]
        conditioning = self.encoder.encode(prompts, keyframes, frames=shape[1])
        negative = [request.negative_prompt for request in requests]
        return self.sampler(first).stream(
            conditioning,
            self.encoder.unconditional(conditioning, negative),
            shape,
            rng,
            initial=initial,
            on_step=None if on_progress is None else partial(_tell_step, on_progress),
        )

    def sampler(self, request: Request) -> InferencePipeline:
        """The pipeline with the steps and the guidance of a request."""
        if request.steps is None and request.cfg_scale is None:
            return self.pipeline
        return self.pipeline.adjusted(steps=request.steps, cfg_scale=request.cfg_scale)

    def stream(
        self, request: Request, *, on_progress: OnProgress | None = None
    ) -> Iterator[Tensor]:
        """One clip in pieces [3, p, H, W] in [0, 1], each decoded before the next is begun."""
        decoder = self.vae.stream_decoder()
        frames, done = request.shape(self.capabilities)[1], 0
        for piece in self.pieces([request], on_progress=on_progress):
            yield to_unit(decoder.decode(piece))[0]
            done += piece.shape[2]
            if on_progress is not None:
                on_progress(Progress("decode", done, frames))

    def clips(
        self, requests: Sequence[Request], *, on_progress: OnProgress | None = None
    ) -> Tensor:
        """Clips [B, 3, P, H, W] in [0, 1] on the CPU, decoded one latent frame at a time."""
        latents = self.latents(requests, on_progress=on_progress)
        total = latents.shape[0] * latents.shape[2]
        rows: list[Tensor] = []
        for row in torch.split(latents, 1):
            decoder, parts = self.vae.stream_decoder(), []
            for frame in torch.split(row, 1, dim=2):
                parts.append(to_unit(decoder.decode(frame))[0].cpu())
                if on_progress is not None:
                    done = len(rows) * latents.shape[2] + len(parts)
                    on_progress(Progress("decode", done, total))
            rows.append(torch.cat(parts, dim=1))
        return torch.stack(rows)

    def network_evaluations(self, request: Request) -> int:
        """How often the network runs for it; a guided step counts twice."""
        frames = request.shape(self.capabilities)[1]
        return self.sampler(request).network_evaluations(frames)

    def _keyframes(self, requests: Sequence[Request], size: Size) -> Keyframes | None:
        """The images of a batch, for a model that reads them."""
        if not self.encoder.reads_images:
            return None
        first = [r.first_image.read(size)[:, 0] for r in requests if r.first_image is not None]
        last = [r.last_image.read(size)[:, 0] for r in requests if r.last_image is not None]
        return Keyframes(
            torch.stack(first).to(self.device), torch.stack(last).to(self.device) if last else None
        )

    def _initial(self, requests: Sequence[Request], size: Size) -> Tensor | None:
        """Latents [B, C, g, H, W] that clips begin with, of models that do not read images."""
        images = [None if self.encoder.reads_images else r.first_image for r in requests]
        given = [r.initial or image for r, image in zip(requests, images, strict=True)]
        rows = [self._encode(footage, size) for footage in given if footage is not None]
        return torch.cat(rows) if rows else None

    def _encode(self, footage: Footage, size: Size) -> Tensor:
        """Each alone, so that it never depends on its neighbours in a batch: [1, C, g, H, W]."""
        key = (footage, size)
        if key not in self._encoded:
            latents = self.vae.encode_to_latent(footage.read(size)[None].to(self.device))
            self._encoded.clear()
            self._encoded[key] = latents
        return self._encoded[key]


def _tell_step(on_progress: OnProgress, done: int, total: int) -> None:
    on_progress(Progress("denoise", done, total))
