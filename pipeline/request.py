"""One request for every way of serving, and the validator that all of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

from torch import Tensor

from model.causal import CausalLayout
from model.types import LatentSpec
from pipeline.fields import (
    MOST,
    Number,
    PixelSize,
    RequestError,
    Text,
    Whole,
    asked,
    options,
    parse,
    shown,
)
from pipeline.memory import Footprint
from pipeline.teacher import SamplingConfig
from utils.data.prompts import Picture
from utils.media.given_frames import Size, read_fitted
from utils.media.images import Scale

MAX_PROMPT = 2000  # characters
MAX_SEED = 2**53 - 1  # beyond it, whole numbers in a browser are not exact
FPS = Number(0.1, 240.0)  # frames per second of a file, which players know
WHOLE = (
    "this model makes whole clips and cannot begin with given frames; use one with "
    "generator_type: causal"
)
WHOLE_WITH_IMAGE = (
    "this model makes whole clips, which may begin with an image, but with no more frames; give "
    "images (--i2v), or use a model with generator_type: causal"
)
R = TypeVar("R", bound="Request")


class Footage(Protocol):
    """Frames that a clip begins or ends with; equal footage gives equal frames."""

    def read(self, size: Size) -> Tensor:
        """[3, P, H, W] in [-1, 1], fitted to `size`, height and width."""


@dataclass(frozen=True)
class ImageFile:
    """An image on disk, read when it is needed."""

    picture: Picture
    scale: Scale = "bicubic"

    def read(self, size: Size) -> Tensor:
        """See Footage: it covers `size`, and is cropped at the centre."""
        return read_fitted(self.picture, size, self.scale)[:, None]


@dataclass(frozen=True, eq=False)
class Pixels:
    """Frames in memory, [3, P, H, W] in [-1, 1], of the clip's size already."""

    frames: Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        data = self.frames.detach().cpu().contiguous().numpy()
        digest = hashlib.blake2b(data.tobytes(), digest_size=16)
        digest.update(repr((data.shape, data.dtype)).encode())
        object.__setattr__(self, "digest", digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pixels) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def read(self, size: Size) -> Tensor:
        """See Footage; of their own size alone."""
        own = tuple(self.frames.shape[2:])
        assert own == tuple(size), f"frames of {own} for clips of {size}"
        return self.frames


@dataclass(frozen=True)
class Capabilities:
    """What a model can be asked for, known before its weights are read."""

    latent: LatentSpec
    size: Size  # height and width of its usual clips, in pixels
    frames: int  # of them, in pixels
    steps: int  # of a clip, or of each block of a causal one
    sampling: SamplingConfig | None = None  # of a many-step model; None = steps are fixed
    layout: CausalLayout | None = None  # how clips fall into blocks; None = made whole
    images: int = 0  # that it must be given: 1 = the first frame, 2 = the last one, too
    first_frame: bool = False  # whether it knows images as first latent frames of clips (TI2V)
    footprint: Footprint | None = None  # None = memory is not checked

    @property
    def streams(self) -> bool:
        """Whether frames come before the whole clip is done."""
        return self.layout is not None

    @property
    def scale(self) -> Scale:
        """How images are brought to a clip's size."""
        return "lanczos" if self.first_frame else "bicubic"

    def size_of_image(self, shape: Size, area: int) -> Size:
        """The size of about `area` pixels of clips that take the aspect ratio of an image."""
        rule = self.latent.size_of_image if self.first_frame else self.latent.nearest_size
        return rule(shape, area)

    def image_problem(self, frames: int) -> str | None:
        """Why a clip of `frames` latent frames cannot begin with an image in the first one's place.

        None if it can.
        """
        if self.layout is not None:
            try:
                self.layout.split(frames, 1)
            except ValueError as error:
                return str(error)
            return None
        if not self.first_frame:
            return (
                "this model makes whole clips from text alone; use an image-to-video model, or one "
                "with generator_type: causal"
            )
        return (
            "a clip of one latent frame is its image, and leaves none to make"
            if frames == 1
            else None
        )

    def nearest_frames(self, frames: int) -> int:
        """The number of pixel frames next to `frames` that it can make."""
        middle = 1 + max(0, round((frames - 1) / self.latent.temporal_stride))
        reach = 1 + (0 if self.layout is None else self.layout.num_frame_per_block)
        near = range(max(1, middle - reach), middle + reach + 1)
        made = [self.latent.pixel_frames(n) for n in near if self.length_problem(n) is None]
        return min(made, key=lambda count: abs(count - frames))

    def length_problem(self, latent_frames: int) -> str | None:
        """Why blocks do not come out even; None if they do, or the model makes whole clips."""
        try:
            if self.layout is not None:
                self.layout.blocks(latent_frames)
        except ValueError as error:
            return str(error)
        return None


def _steps_refused(model: Capabilities) -> str | None:
    if model.sampling is None:
        return f"this model makes clips in the {model.steps} steps of its training; leave it out"
    return None


def _guidance_refused(model: Capabilities) -> str | None:
    if model.sampling is None:
        return "this model was distilled and makes clips without guidance; leave it out"
    return None


def _size_problem(size: Size, model: Capabilities) -> str | None:
    step = model.latent.pixel_step
    if all(side % least == 0 for side, least in zip(size, step, strict=True)):
        return None
    height, width = model.latent.nearest_size(size, size[0] * size[1])
    return (
        f"sides must be multiples of {step[0]} and {step[1]} pixels, got {size[0]}x{size[1]}; the "
        f"nearest is {height}x{width}"
    )


def _frames_problem(frames: int, model: Capabilities) -> str | None:
    stride, layout = model.latent.temporal_stride, model.layout
    whole = (frames - 1) % stride == 0
    if whole and model.length_problem(model.latent.latent_frames(frames)) is None:
        return None
    blocks = ""
    if layout is not None:
        first = "one, then " if layout.independent_first_frame else ""
        blocks = f" in blocks of {first}{layout.num_frame_per_block} latent frames"
    return (
        f"must be 1 + {stride} k{blocks}, got {frames}; the nearest is "
        f"{model.nearest_frames(frames)}"
    )


@dataclass(frozen=True)
class Request:
    """One clip to make. Equal requests give equal clips, whoever asks in whatever order.

    None stands for the model's own. What is not `asked` cannot be set by JSON or a flag.
    """

    prompt: str = asked(Text(MAX_PROMPT), "what the clip shows")
    seed: int = asked(Whole(0, MAX_SEED), "the same prompt and seed make the same clip", default=0)
    sample: int = asked(
        Whole(0, MAX_SEED), "which of several clips of one prompt and seed", default=0
    )
    negative_prompt: str | None = asked(
        Text(MAX_PROMPT, empty=True), "what the clip must not show", default=None,
        refused=_guidance_refused,
    )  # fmt: skip
    size: Size | None = asked(  # noqa: RUF009
        PixelSize(), "height and width in pixels", default=None,
        usual=lambda model: list(model.size), problem=_size_problem,
    )  # fmt: skip
    frames: int | None = asked(
        Whole(1, MOST), "length in pixel frames", default=None,
        usual=lambda model: model.frames, problem=_frames_problem,
    )  # fmt: skip
    steps: int | None = asked(
        Whole(1, 1000), "denoising steps, of each block of a causal model", default=None,
        refused=_steps_refused, usual=lambda model: model.steps,
    )  # fmt: skip
    cfg_scale: float | None = asked(
        Number(0.0, 100.0), "strength of guidance; 1 = off", default=None,
        refused=_guidance_refused, usual=lambda model: model.sampling.cfg_scale,
    )  # fmt: skip
    first_image: Footage | None = None  # one frame
    last_image: Footage | None = None  # one frame
    initial: Footage | None = None  # 1 + stride k frames that a causal clip continues

    def shape(self, model: Capabilities) -> tuple[int, int, int, int]:
        """[C, F, H, W] of its latents."""
        frames = model.latent.latent_frames(self.frames or model.frames)
        height, width = model.latent.latent_size(self.size or model.size)
        return model.latent.channels, frames, height, width

    @property
    def batch_key(self) -> Hashable:
        """Equal for requests that one batch can hold."""
        given = (self.first_image is None, self.last_image is None, self.initial is None)
        return self.size, self.frames, self.steps, self.cfg_scale, given

    @property
    def noise_key(self) -> str:
        """What its noise is keyed by: not by what the model is conditioned on beside the prompt."""
        return f"{self.seed}/{self.sample}/{self.prompt}"


def itself(name: str) -> str:
    """A field's name as JSON has it."""
    return name


def flag(name: str) -> str:
    """A field's name as the command line has it."""
    return f"--{name}"


def problems(
    request: Request, model: Capabilities, *, name_of: Callable[[str], str] = itself
) -> Iterator[str]:
    """What a model cannot do about a request, one line each."""
    fine = True
    for name, option in options(type(request)).items():
        value = getattr(request, name)
        default = next(f.default for f in fields(request) if f.name == name)
        if value is None or value == default:
            continue
        fault = option.refused(model) or option.problem(value, model)
        if fault:
            fine = False
            yield f"{name_of(name)}: {fault}"
    if fine:
        yield from joint_problems(request, model, name_of=name_of)


def joint_problems(
    request: Request, model: Capabilities, *, name_of: Callable[[str], str] = itself
) -> Iterator[str]:
    """What fields are wrong about together, where each of them is right by itself."""
    shape = request.shape(model)
    sampling = model.sampling
    if request.negative_prompt and sampling is not None:
        scale = sampling.cfg_scale if request.cfg_scale is None else request.cfg_scale
        if scale == 1.0:
            yield (
                f"{name_of('negative_prompt')}: has no effect without guidance; set "
                f"{name_of('cfg_scale')} to another number than 1"
            )
    found = _first_image_problem(request, model, shape[1])
    if found:
        yield f"{name_of('first_image')}: {found}"
    found = _last_image_problem(request, model, shape[1])
    if found:
        yield f"{name_of('last_image')}: {found}"
    found = _initial_problem(request, model)
    if found:
        yield f"{name_of('initial')}: {found}"
    found = footprint_problem(request, model)
    if found:
        usual = request.size in (None, model.size)
        blamed = "frames" if usual or request.frames is not None else "size"
        yield f"{name_of(blamed)}: {found}"


def footprint_problem(request: Request, model: Capabilities, *, clips: int = 1) -> str | None:
    """Why this machine can never hold so many such clips at a time; None if it may."""
    if model.footprint is None:
        return None
    return model.footprint.problem(request.shape(model), model.latent, model.layout, clips=clips)


def _first_image_problem(request: Request, model: Capabilities, frames: int) -> str | None:
    if request.first_image is None:
        return "this model begins with an image, but none is given" if model.images else None
    return None if model.images else model.image_problem(frames)


def _last_image_problem(request: Request, model: Capabilities, frames: int) -> str | None:
    if request.last_image is None:
        return "this model ends with an image, but none is given" if model.images > 1 else None
    if model.images < 2:
        return "this model ends with no image; use a first-last-frame model"
    return "a clip of one latent frame has no last image to end with" if frames == 1 else None


def _initial_problem(request: Request, model: Capabilities) -> str | None:
    if request.initial is None:
        return None
    if model.layout is None:
        return WHOLE_WITH_IMAGE if model.first_frame else WHOLE
    if request.first_image is not None and not model.images:
        return "this model begins with an image or with given frames, not with both"
    return None


def read_request(
    body: object,
    model: Capabilities,
    cls: type[R] = Request,  # type: ignore[assignment]
    *,
    name_of: Callable[[str], str] = itself,
) -> R:
    """What JSON, or words of the command line in its place, ask for.

    Raises RequestError with all that is wrong at once.
    """
    if not isinstance(body, Mapping):
        raise RequestError([f'must be an object such as {{"prompt": "a text"}}, got {shown(body)}'])
    values, found = parse(cls, body, model, name_of)
    if not found:
        request: Any = cls(**values)
        found = list(joint_problems(request, model, name_of=name_of))
    if found:
        raise RequestError(found)
    return cls(**values)
