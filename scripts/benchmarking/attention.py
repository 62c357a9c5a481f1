"""Attention timed at a shape: kernels that are installed, and both ways to attend under a mask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from model.wan import attention, kernels
from model.wan.masks import FrameMask, frame_blocks, teacher_forcing
from scripts.benchmarking.meters import device_name
from scripts.benchmarking.shapes import SHAPES

# Beyond so many tokens the plain formula's scores are more than memory holds.
MATH_TOKENS = 8192
MASKED_BY: tuple[attention.MaskedBy, ...] = ("blocks", "flex")


@dataclass(frozen=True)
class Masked:
    """A shape's teacher forcing, a clean and a noisy video in one pass, by both ways of masking."""

    mask: FrameMask
    kernel: str  # what `blocks` calls
    forward: Mapping[str, float | str]  # milliseconds, or why it cannot be used
    backward: Mapping[str, float | str]  # forward and backward

    def json(self) -> dict[str, object]:
        """For the shape's line."""
        return {
            "frames": self.mask.frames,
            "blocks_call": self.kernel,
            "forward_ms": times(self.forward),
            "forward_and_backward_ms": times(self.backward),
            "unusable": unusable(self.backward),
            "fastest": fastest(self.backward, MASKED_BY),
        }

    def table(self) -> list[str]:
        """A row for each way."""
        lines = [
            f"teacher forcing over {self.mask.frames} frames, `blocks` by {self.kernel}:",
            "",
            "| masked by | forward ms | forward and backward ms |",
            "| --- | --- | --- |",
        ]
        for name, found in times(self.backward).items():
            lines.append(f"| {name} | {times(self.forward)[name]:.3f} | {found:.3f} |")
        lines += ["", *(f"not {name}: {why}" for name, why in unusable(self.backward).items())]
        best = fastest(self.backward, MASKED_BY)
        return [*lines, *([] if best is None else [f"fastest: parallel.masked_attention={best}"])]


@dataclass(frozen=True)
class Timed:
    """One shape's kernels: milliseconds, or why it cannot be used, each by its name."""

    name: str
    shape: kernels.Shape
    dtype: str
    device: str
    forward: Mapping[str, float | str]
    backward: Mapping[str, float | str]  # forward and backward
    masked: Masked

    def json(self) -> str:
        """One line."""
        values = {
            "mode": "attention",
            "name": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "tokens": self.shape.tokens,
            "heads": self.shape.heads,
            "head_dim": self.shape.head_dim,
            "forward_ms": times(self.forward),
            "forward_and_backward_ms": times(self.backward),
            "unusable": unusable(self.forward),
            "fastest_forward": fastest(self.forward),
            "fastest": fastest(self.backward),
            "masked": self.masked.json(),
        }
        return json.dumps(values)

    def table(self) -> str:
        """A row per kernel."""
        size = self.shape
        flops = 4.0 * size.tokens**2 * size.heads * size.head_dim
        head = f"{self.name}: {size.tokens} tokens, {size.heads} heads of {size.head_dim}"
        lines = [
            f"{head}, {self.dtype}, {self.device}",
            "",
            "| kernel | forward ms | TFLOP/s | forward and backward ms | TFLOP/s |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name in times(self.forward):
            cells = [
                *_cells(self.forward[name], flops), *_cells(self.backward[name], 3.5 * flops)
            ]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", *(f"not {name}: {why}" for name, why in unusable(self.forward).items())]
        if fastest(self.backward) is not None:
            lines += [f"fastest: parallel.attention={fastest(self.backward)}"]
        return "\n".join([*lines, "", *self.masked.table()])


def times(found: Mapping[str, float | str]) -> dict[str, float]:
    """The kernels that could be timed."""
    return {name: value for name, value in found.items() if not isinstance(value, str)}


def unusable(found: Mapping[str, float | str]) -> dict[str, str]:
    """What cannot be used here, and why."""
    return {name: value for name, value in found.items() if isinstance(value, str)}


def fastest(found: Mapping[str, float | str], allowed: Sequence[str] = kernels.EXACT) -> str | None:
    """The fastest of those that round like torch's own; None = none could be timed."""
    exact = {name: value for name, value in times(found).items() if name in allowed}
    return min(exact, key=lambda name: exact[name]) if exact else None


def _cells(found: float | str, flops: float) -> tuple[str, str]:
    """Milliseconds and TFLOP/s; a backward pass is 2.5 forward ones: scores are made anew."""
    if isinstance(found, str):
        return "-", "-"
    return f"{found:.3f}", f"{flops / found / 1e9:.3g}"


def measure(names: Sequence[str], device: torch.device) -> list[Timed]:
    """All kernels at each shape, in the dtype that the device trains in."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for name in names:
        sizes, (_, frames, height, width) = SHAPES[name].sizes, SHAPES[name].latent
        _, rows, columns = sizes.patch_size
        tokens = frames * (height // rows) * (width // columns)
        shape = kernels.Shape(tokens, sizes.num_heads, sizes.head_dim)
        tried = [k for k in kernels.KERNELS if k != "math" or tokens <= MATH_TOKENS]
        forward, backward = (
            dict(kernels.measure(shape, device, dtype, grad=grad, kernels=tried))
            for grad in (False, True)
        )
        kernel = fastest(backward) or kernels.USUAL
        masked = measure_masked(shape, teacher_mask(name), kernel, device, dtype)
        text = str(dtype).removeprefix("torch.")
        found.append(Timed(name, shape, text, device_name(device), forward, backward, masked))
    return found


def teacher_mask(name: str) -> FrameMask:
    """The mask of a shape's teacher forcing: a clean video, then a noisy one."""
    frames, block = SHAPES[name].latent[1], SHAPES[name].block
    alone = frames % block == 1
    return teacher_forcing(frame_blocks(frames, block, independent_first_frame=alone))


def measure_masked(
    video: kernels.Shape, mask: FrameMask, kernel: str, device: torch.device, dtype: torch.dtype
) -> Masked:
    """Time both ways of masking; video: one of the two that a pass sees at once."""
    shape = replace(video, tokens=2 * video.tokens)
    forward: dict[str, float | str] = {}
    backward: dict[str, float | str] = {}
    for by in MASKED_BY:
        forward[by] = masked_ms(by, mask, kernel, shape, device, dtype, grad=False)
        backward[by] = masked_ms(by, mask, kernel, shape, device, dtype, grad=True)
    return Masked(mask, kernel, forward, backward)


def masked_ms(
    by: attention.MaskedBy,
    mask: FrameMask,
    kernel: str,
    shape: kernels.Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
) -> float | str:
    """The median milliseconds of a masked call at `shape`, or why it cannot be used."""
    if by == "flex" and device.type != "cuda":
        return "it is compiled for CUDA; elsewhere it holds all scores, and has no backward pass"
    x = shape.inputs(device, dtype, grad=grad)
    weight = torch.ones_like(x[0])
    form = attention.device_mask(mask, shape.tokens // mask.frames, device, by)

    def call() -> None:
        out = attention.attend(*x, mask=form, kernel=kernel)
        if grad:
            torch.autograd.grad(out, x, weight)

    try:
        return kernels.median_ms(call, device)
    except Exception as error:  # a compiler that is not for this device says so in many ways
        return f"it fails here: {(str(error) or repr(error)).splitlines()[0]}"
