"""Encoders and codecs that wait in host memory; their device sees them while they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from model.encoders.vae import StreamDecoder, StreamEncoder, VideoVAE
from utils.idle import Idle

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Encoders:
    """Where a run's encoders and codec live: on its device, or in host memory but while used."""

    device: torch.device
    rest: bool = False
    idle: list[Idle] = field(default_factory=list)

    def encoder(self, module: nn.Module) -> Callable[..., Tensor]:
        """A loaded encoder of prompts or images."""
        return IdleEncoder(self._lay(module)) if self.rest else module.to(self.device)

    def codec(self, load: Callable[[torch.device], VideoVAE]) -> VideoVAE:
        """A codec; `load` reads it onto a device."""
        if not self.rest:
            return load(self.device)
        codec = load(torch.device("cpu"))
        assert isinstance(codec, nn.Module), "a codec that rests is a module"
        return IdleCodec(self._lay(codec), codec)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the body whoever has been used stays on the device, so that it comes once."""
        with ExitStack() as stack:
            for one in self.idle:
                stack.enter_context(one.held())
            yield

    def _lay(self, module: nn.Module) -> Idle:
        self.idle.append(Idle(module, self.device))
        return self.idle[-1]


@dataclass(frozen=True, eq=False)
class IdleEncoder(Generic[T]):
    """An encoder of prompts or images."""

    idle: Idle

    def __call__(self, inputs: T) -> Tensor:
        """What the module says of them."""
        with self.idle.awake():
            states: Tensor = self.idle.module(inputs)
            return states


@dataclass(frozen=True, eq=False)
class IdleCodec:
    """A codec, as a VideoVAE."""

    idle: Idle
    codec: VideoVAE  # the idle module

    @property
    def temporal_stride(self) -> int:
        """See VideoVAE."""
        return self.codec.temporal_stride

    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """See VideoVAE."""
        with self.idle.awake():
            return self.codec.encode_to_latent(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """See VideoVAE."""
        with self.idle.awake():
            return self.codec.decode_to_pixel(latents)

    def stream_encoder(self) -> StreamEncoder:
        """See VideoVAE; it may outlive many naps of the codec."""
        return _Stream(self.idle, self.codec.stream_encoder().encode)

    def stream_decoder(self) -> StreamDecoder:
        """See VideoVAE; it may outlive many naps of the codec."""
        return _Stream(self.idle, self.codec.stream_decoder().decode)


@dataclass(frozen=True, eq=False)
class _Stream:
    """One direction of a stream."""

    idle: Idle
    step: Callable[[Tensor], Tensor]

    def encode(self, pixels: Tensor) -> Tensor:
        """See StreamEncoder."""
        with self.idle.awake():
            return self.step(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """See StreamDecoder."""
        with self.idle.awake():
            return self.step(latents)
