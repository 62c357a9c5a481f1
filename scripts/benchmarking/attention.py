"""The attention kernels that are installed, timed at a shape's self-attention; and the fastest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.wan import kernels
from scripts.benchmarking.meters import device_name
from scripts.benchmarking.shapes import SHAPES

# Beyond so many tokens the plain formula's scores are more than memory holds.
MATH_TOKENS = 8192


@dataclass(frozen=True)
class Timed:
    """One shape's kernels: milliseconds, or why it cannot be used, each by its name."""

    name: str
    shape: kernels.Shape
    dtype: str
    device: str
    forward: Mapping[str, float | str]
    backward: Mapping[str, float | str]  # forward and backward

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
            "unusable": self.unusable(),
            "fastest_forward": fastest(self.forward),
            "fastest": fastest(self.backward),
        }
        return json.dumps(values)

    def unusable(self) -> dict[str, str]:
        """The kernels that cannot be used here, and why."""
        return {name: found for name, found in self.forward.items() if isinstance(found, str)}

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
        lines += ["", *(f"not {name}: {why}" for name, why in self.unusable().items())]
        if fastest(self.backward) is not None:
            lines += [f"fastest: parallel.attention={fastest(self.backward)}"]
        return "\n".join(lines)


def times(found: Mapping[str, float | str]) -> dict[str, float]:
    """The kernels that could be timed."""
    return {name: value for name, value in found.items() if not isinstance(value, str)}


def fastest(found: Mapping[str, float | str]) -> str | None:
    """The fastest kernel of those that round like torch's own; None = none could be timed."""
    exact = {name: value for name, value in times(found).items() if name in kernels.EXACT}
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
        timed = [
            dict(kernels.measure(shape, device, dtype, grad=grad, kernels=tried))
            for grad in (False, True)
        ]
        text = str(dtype).removeprefix("torch.")
        found.append(Timed(name, shape, text, device_name(device), *timed))
    return found
