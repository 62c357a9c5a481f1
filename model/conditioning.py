"""Prompts and images to Conditioning; each prompt is encoded once as long as it is remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.encoders.vae import VideoVAE
from model.types import Conditioning, Keyframes
from utils.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Keyframes to what Wan's image-to-video transformers read of them."""

    # [B, 3, H, W] in [-1, 1] to states [B, n, image_dim]; None = the transformer reads none.
    clip: Callable[[Tensor], Tensor] | None
    vae: VideoVAE

    @torch.no_grad()
    def __call__(self, keyframes: Keyframes, frames: int) -> tuple[Tensor | None, Tensor]:
        """CLIP states [B, n per image, image_dim], and mask and latents [B, k + C, F, H, W].

        frames: F. What is encoded is a video of the keyframes with grey in the place of all other
        pixel frames; the mask tells which are given, in k channels, the temporal stride. Each
        sample is encoded alone, so that it never depends on its neighbours in a batch.
        """
        samples = [keyframes.row(i) for i in range(len(keyframes.first))]
        channels = torch.cat([self.channels(sample, frames) for sample in samples])
        if self.clip is None:
            return None, channels
        return torch.cat([_states(self.clip, sample) for sample in samples]), channels

    def channels(self, keyframes: Keyframes, frames: int) -> Tensor:
        """Mask and latents [B, k + C, F, H, W], k pixel frames in memory at a time."""
        if keyframes.last is not None and frames == 1:
            raise UserError("a video of one latent frame has no last frame to give")
        encoder, stride = self.vae.stream_encoder(), self.vae.temporal_stride
        first = keyframes.first[:, :, None]
        grey = torch.zeros_like(first).repeat(1, 1, stride, 1, 1)
        end = grey
        if keyframes.last is not None:
            end = torch.cat([grey[:, :, 1:], keyframes.last[:, :, None]], dim=2)
        groups = [grey] * (frames - 2) + [end] * min(1, frames - 1)
        latents = torch.cat([encoder.encode(piece) for piece in (first, *groups)], dim=2)
        mask = torch.zeros_like(latents[:, :1]).repeat(1, stride, 1, 1, 1)
        mask[:, :, 0] = 1.0
        if keyframes.last is not None:
            mask[:, -1, -1] = 1.0
        return torch.cat([mask, latents], dim=1)


def _states(clip: Callable[[Tensor], Tensor], keyframes: Keyframes) -> Tensor:
    """CLIP states of one image behind the other, [B, n per image, image_dim]."""
    first = clip(keyframes.first)
    return first if keyframes.last is None else torch.cat([first, clip(keyframes.last)], dim=1)


def first_latents(vae: VideoVAE, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] as the first latent frames of videos, [B, C, 1, h, w].

    Each is encoded alone, so that it never depends on its neighbours in a batch.
    """
    return torch.cat([vae.encode_to_latent(image) for image in images[:, :, None].split(1)])


class ConditioningEncoder:
    """Encodes prompts one by one, so that a state never depends on its neighbours in a batch."""

    def __init__(
        self,
        encode: Callable[[list[str]], Tensor],
        *,
        negative_prompt: str,
        device: torch.device,
        images: ImageEncoder | None = None,
        remembered_bytes: int = 2**28,
    ) -> None:
        """`encode` maps prompts to [B, L, text_dim]; remembered_bytes: of states on the device.

        images: of a model that reads keyframes; None = of one that does not.
        """
        self._encode = encode
        self._device = device
        self._images = images
        self._states: OrderedDict[str, Tensor] = OrderedDict()
        self._negative = encode([negative_prompt])[0].to(device)
        self._remembered = max(1, remembered_bytes // self._negative.nbytes)  # prompts

    @property
    def reads_images(self) -> bool:
        """Whether `encode` must be given keyframes."""
        return self._images is not None

    def encode(
        self, prompts: Sequence[str], keyframes: Keyframes | None = None, *, frames: int = 1
    ) -> Conditioning:
        """The conditioning of a batch of prompts, [B, L, text_dim], and of their keyframes.

        frames: of the video, in latents; matters only with keyframes. Raises ValueError if an
        image-to-video model is given none, or another model some.
        """
        text = torch.stack([self._state(prompt) for prompt in prompts])
        if (keyframes is None) != (self._images is None):
            raise UserError(
                "this model begins with an image, but none is given"
                if keyframes is None
                else "this model reads no images; use an image-to-video model"
            )
        if keyframes is None or self._images is None:
            return Conditioning(text)
        clip, first_frame = self._images(keyframes, frames)
        return Conditioning(text, clip, first_frame)

    def unconditional(
        self, conditioning: Conditioning, negative: Sequence[str | None] | None = None
    ) -> Conditioning:
        """The same images under the negative prompt, or under one for each sample; None = it."""
        if negative is None:
            count = len(conditioning.text)
            return replace(conditioning, text=self._negative.expand(count, -1, -1))
        states = [self._negative if text is None else self._state(text) for text in negative]
        return replace(conditioning, text=torch.stack(states))

    def _state(self, prompt: str) -> Tensor:
        if prompt not in self._states:
            self._states[prompt] = self._encode([prompt])[0].to(self._device)
            if len(self._states) > self._remembered:
                self._states.popitem(last=False)
        self._states.move_to_end(prompt)
        return self._states[prompt]
