"""The tiny autoencoder (TAEHV): pixels of latents at a fraction of the cost, for previews.

Its published weights are taew2_1 (16 latent channels) and taew2_2 (48). Letters: p pixels on a
side that become channels, t frames of one latent frame at some depth, n and m channels there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoders.vae import StreamDecoder, StreamEncoder, VideoVAE
from model.folders import component
from utils.errors import UserError
from utils.weights import WeightFile, Weights, WeightsError

GROWN = (1, 2, 2)  # frames that each stage of the decoder makes of one
POOLED = (2, 2, 1)  # frames that each stage of the encoder makes one of
FRAMES = math.prod(GROWN)  # pixel frames of a latent frame
STRIDE = 2 ** len(GROWN)  # beside that of the pixel patches
MEMORIES = 3  # in a row, in each stage
SQUASH = 3.0  # latents are kept below it

Memory = dict[int, Tensor]  # the last input of each memory block, by its place


class LatentFacts(Protocol):
    """What a model's latents are, as its LatentSpec says."""

    @property
    def channels(self) -> int:
        """Of a latent."""

    @property
    def temporal_stride(self) -> int:
        """Pixel frames to a latent frame."""

    @property
    def spatial_stride(self) -> int:
        """Pixels to a latent row or column."""


@dataclass(frozen=True)
class TinySizes:
    """What tells one tiny autoencoder from another."""

    channels: int  # of latents
    patch: int = 1  # pixels on a side that become channels
    widths: tuple[int, ...] = (256, 128, 64, 64)  # of the decoder, from latents to pixels
    encoder_width: int = 64

    @classmethod
    def of(cls, weights: Weights) -> TinySizes:
        """The sizes that a file's shapes tell. Raises WeightsError if it holds none of its kind."""
        shapes = weights.shapes()

        def side(name: str, axis: int = 0) -> int:
            shape = shapes.get(f"{name}.weight", ())
            if len(shape) != 4:
                raise WeightsError(
                    f"{weights.path}: not a tiny autoencoder (TAEHV): it has no {name}.weight of "
                    f"four dimensions; take taew2_1 for 16 latent channels, or taew2_2 for 48"
                )
            return shape[axis]

        widths = tuple(side(f"decoder.{layer}") for layer in (1, 8, 14, 20))
        patch = max(1, math.isqrt(side("decoder.22") // 3))
        return cls(side("decoder.1", 1), patch, widths, side("encoder.0"))


TAEW21, TAEW22 = TinySizes(16), TinySizes(48, patch=2)


class TinyVAE(nn.Module):
    """Normalised latents [B, C, F, h, w] to pixels [B, 3, P, s h, s w] in [-1, 1], P = 4 F - 3.

    One latent frame at a time, whole or as a stream, so that both give the same bits.
    """

    temporal_stride = FRAMES

    sizes: TinySizes
    spatial_stride: int
    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(self, sizes: TinySizes) -> None:
        super().__init__()
        self.sizes, self.spatial_stride = sizes, STRIDE * sizes.patch
        self.encoder, self.decoder = _encoder(sizes), _decoder(sizes)
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, latent: LatentFacts) -> TinyVAE:
        """Read a .pth or .safetensors file for a model with such latents. See `open_tiny_vae`."""
        vae, weights = open_tiny_vae(path, latent)
        component.fill(vae, weights, dtype, what="the tiny autoencoder")
        return vae

    @classmethod
    def outline(cls, latent: LatentFacts) -> TinyVAE:
        """The published one for a model with such latents, on the meta device."""
        with torch.device("meta"):
            return cls(TinySizes(latent.channels, max(1, latent.spatial_stride // STRIDE)))

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, P, s h, s w] in [-1, 1] to about the full autoencoder's latents, fp32.

        Groups of 4 frames, the last frame repeated to fill; for a look, not for training data. It
        sees up to three frames ahead, so it cannot stream.
        """
        height, width = pixels.shape[-2:]
        if height % self.spatial_stride or width % self.spatial_stride:
            raise UserError(
                f"the sides of a clip must be multiples of {self.spatial_stride}, got "
                f"{height} x {width}"
            )
        lacking = -pixels.shape[2] % FRAMES
        filled = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, lacking, -1, -1)], dim=2)
        memory: Memory = {}
        parts = []
        for group in filled.split(FRAMES, dim=2):
            frames = (group.to(self._like.device).float().transpose(1, 2) + 1.0) / 2.0
            patches = F.pixel_unshuffle(frames, self.sizes.patch).to(self._like.dtype)
            parts.append(_through(self.encoder, patches, memory).transpose(1, 2).float())
        return torch.cat(parts, dim=2)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """Latents to pixels, all at once."""
        return self.stream_decoder().decode(latents)

    def stream_decoder(self) -> TinyStreamDecoder:
        """A decoder for one video that arrives in pieces."""
        return TinyStreamDecoder(self)

    @torch.no_grad()
    def decode_frame(self, latents: Tensor, memory: Memory) -> Tensor:
        """One latent frame [B, C, 1, h, w] to 4 pixel frames; `memory` is moved on."""
        frames = latents.to(self._like.device, self._like.dtype).transpose(1, 2)
        patches = _through(self.decoder, frames, memory).float()
        pixels = F.pixel_shuffle(patches, self.sizes.patch).transpose(1, 2)
        return 2.0 * pixels.clamp(0.0, 1.0) - 1.0

    @property
    def _like(self) -> Tensor:
        return next(self.parameters())


class TinyStreamDecoder:
    """Keeps the last frame that each memory block saw between calls."""

    def __init__(self, vae: TinyVAE) -> None:
        self._vae = vae
        self._memory: Memory = {}

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, C, f, h, w] to their pixels, 1 then 4 frames each."""
        parts = []
        for frame in latents.split(1, dim=2):
            began = bool(self._memory)
            pixels = self._vae.decode_frame(frame, self._memory)
            parts.append(pixels if began else pixels[:, :, -1:])
        return torch.cat(parts, dim=2)


@dataclass(frozen=True, eq=False)
class PreviewVAE:
    """A VideoVAE that shows pixels of the tiny autoencoder, and reads pixels with the model's own.

    What a clip begins with shapes all of it; the model's codec is loaded when that is first asked.
    """

    tiny: TinyVAE
    load_full: Callable[[], VideoVAE]

    @cached_property
    def full(self) -> VideoVAE:
        """The model's own."""
        return self.load_full()

    @property
    def temporal_stride(self) -> int:
        """See VideoVAE."""
        return self.tiny.temporal_stride

    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """See VideoVAE."""
        return self.full.encode_to_latent(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """See VideoVAE."""
        return self.tiny.decode_to_pixel(latents)

    def stream_encoder(self) -> StreamEncoder:
        """See VideoVAE."""
        return self.full.stream_encoder()

    def stream_decoder(self) -> StreamDecoder:
        """See VideoVAE."""
        return self.tiny.stream_decoder()


def open_tiny_vae(path: Path, latent: LatentFacts) -> tuple[TinyVAE, Weights]:
    """A tiny autoencoder without weights, and what the file `path` holds for it. Cheap.

    Raises WeightsError if it is none, or is not for a model with such latents.
    """
    file = WeightFile(path)
    sizes = TinySizes.of(file)
    with torch.device("meta"):
        vae = TinyVAE(sizes)
    found = sizes.channels, vae.temporal_stride, vae.spatial_stride
    wanted = latent.channels, latent.temporal_stride, latent.spatial_stride
    if found != wanted:
        raise WeightsError(
            f"{path}: a tiny autoencoder of {_in_words(found)}; the model's latents have "
            f"{_in_words(wanted)}; take taew2_1 for Wan2.1 and A14B, or taew2_2 for TI2V-5B"
        )
    return vae, LastRows(file, _grown_rows(vae))


def _in_words(facts: tuple[int, int, int]) -> str:
    return f"{facts[0]} channels and strides of {facts[1]} frames and {facts[2]} pixels"


class LastRows:
    """Weights of which some have more rows than wanted: the last ones are taken."""

    def __init__(self, weights: Weights, rows: Mapping[str, int]) -> None:
        """rows: how many are wanted, by name."""
        self.path = weights.path
        self._weights = weights
        self._rows = rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        return {
            name: (min(shape[0], self._rows[name]), *shape[1:]) if name in self._rows else shape
            for name, shape in self._weights.shapes().items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        if name not in self._rows:
            return self._weights.read(name, rows)
        return self._weights.read(name)[-self._rows[name] :][rows]


def _grown_rows(vae: TinyVAE) -> dict[str, int]:
    """Rows of the weights that make several frames of one: files hold some for more frames."""
    return {
        f"decoder.{place}.conv.weight": layer.conv.out_channels
        for place, layer in enumerate(vae.decoder)
        if isinstance(layer, Grow)
    }


# ---- layers; frames are [B, t, n, h, w]


class Squash(nn.Module):
    """Keeps latents between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return SQUASH * torch.tanh(x / SQUASH)


class MemoryBlock(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, last: Tensor | None) -> Tensor:
        """x: [B, t, n, h, w]. last: the frame before, [B, 1, n, h, w]; None = there is none."""
        first = torch.zeros_like(x[:, :1]) if last is None else last
        before = torch.cat([first, x[:, :-1]], dim=1)
        change = _clips(self.conv(torch.cat([x, before], dim=2).flatten(0, 1)), len(x))
        return F.relu(change + x)


class Grow(nn.Module):
    """Makes `count` frames of each."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv = nn.Conv2d(width, width * count, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, t, n, h, w] to [B, t count, n, h, w]; the new channels are frame by frame."""
        grown: Tensor = self.conv(x.flatten(0, 1))
        frames = grown.unflatten(1, (self.count, -1)).flatten(0, 1)
        return _clips(frames, len(x))


class Pool(nn.Module):
    """Makes one frame of each `count`, older ones first."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv = nn.Conv2d(width * count, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, t count, n, h, w] to [B, t, n, h, w]."""
        groups = x.unflatten(1, (-1, self.count)).flatten(2, 3)
        return _clips(self.conv(groups.flatten(0, 1)), len(x))


def _through(layers: nn.ModuleList, x: Tensor, memory: Memory) -> Tensor:
    """Frames [B, t, n, h, w] through one half; `memory` is of the frames before them."""
    for place, layer in enumerate(layers):
        if isinstance(layer, MemoryBlock):
            last = memory.get(place)
            memory[place] = x[:, -1:].clone()
            x = layer(x, last)
        elif isinstance(layer, Grow | Pool):
            x = layer(x)
        else:
            x = _clips(layer(x.flatten(0, 1)), len(x))
    return x


def _clips(frames: Tensor, count: int) -> Tensor:
    """[B t, n, h, w] to [B, t, n, h, w], where B is `count`."""
    return frames.view(count, -1, *frames.shape[1:])


def _conv(before: int, after: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=bias)


def _decoder(sizes: TinySizes) -> nn.ModuleList:
    """From latents to patches of pixels; places are those in the names of published weights."""

    def layers() -> Iterator[nn.Module]:
        widths = sizes.widths
        yield from (Squash(), _conv(sizes.channels, widths[0]), nn.ReLU())
        for before, after, count in zip(widths, widths[1:], GROWN, strict=False):
            yield from (MemoryBlock(before) for _ in range(MEMORIES))
            yield from (nn.Upsample(scale_factor=2), Grow(before, count))
            yield _conv(before, after, bias=False)
        yield from (nn.ReLU(), _conv(widths[-1], 3 * sizes.patch**2))

    return nn.ModuleList(layers())


def _encoder(sizes: TinySizes) -> nn.ModuleList:
    """From patches of pixels to latents; places are those in the names of published weights."""

    def layers() -> Iterator[nn.Module]:
        width = sizes.encoder_width
        yield from (_conv(3 * sizes.patch**2, width), nn.ReLU())
        for count in POOLED:
            yield from (Pool(width, count), _conv(width, width, stride=2, bias=False))
            yield from (MemoryBlock(width) for _ in range(MEMORIES))
        yield _conv(width, sizes.channels)

    return nn.ModuleList(layers())
