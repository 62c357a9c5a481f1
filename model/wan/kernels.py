"""Attention kernels by name: which of them work here, and which is the fastest.

The names are torch's own choice (sdpa), its backends (cudnn, flash, efficient, math), and optional
packages: flash-attn 2 and 3 (flash2, flash3) and SageAttention (sage: 8 bits, inference only).
Packages are called through custom ops with a backward pass, so that no compiled block breaks there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.errors import UserError

USUAL = "sdpa"
AUTO = "auto"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "sage": "sageattention"}
KERNELS = (USUAL, *BACKENDS, *PACKAGES)
EXACT = tuple(name for name in KERNELS if name != "sage")
HOPPER = 9  # compute capability
TOLERANCE = 2e-2  # of half precision: what a kernel may differ from the formula, relative
ROUNDS = 5


def compute(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v by the kernel of that name.

    q: [B, N, heads, head_dim]; k, v: [B, M, heads, head_dim]. Returns [B, N, heads, head_dim].
    What a package's kernel does not serve (another dtype or device) torch computes.
    """
    if kernel in PACKAGES and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        out: Tensor = torch.ops.fewstep.attention(q, k, v, kernel)[0]
        return out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if kernel in BACKENDS:
        with sdpa_kernel(BACKENDS[kernel]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# ---- packages ----


def _forward(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [B, heads, N] of a package's kernel."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    if kernel == "sage":
        out = package(kernel).sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
        return out.contiguous(), q.new_empty(0, dtype=torch.float32)
    found = call_by_name(
        package(kernel)._flash_attn_forward,
        {"q": q, "k": k, "v": v, "softmax_scale": scale, **UNUSED},
    )
    return found[0].contiguous(), found[1].contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call_by_name(
        package(kernel)._flash_attn_backward,
        {
            "dout": grad.contiguous(), "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse,
            "dq": dq, "dk": dk, "dv": dv, "softmax_scale": 1.0 / math.sqrt(q.shape[-1]), **UNUSED,
        },
    )  # fmt: skip
    return dq, dk, dv


# What flash-attn 2 and 3 can do beside plain attention, under the names of either; switched off.
UNUSED: dict[str, Any] = {
    "dropout_p": 0.0, "causal": False, "is_causal": False, "window_size": (-1, -1),
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "return_softmax": False,
    "deterministic": False,
}  # fmt: skip


def call_by_name(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Call `function` with those of `values` that it has parameters for, and None for others.

    Releases of the packages differ in what else they can do, not in the names of what is used.
    """
    words = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in values:
            words[name] = values[name]
        elif parameter.default is inspect.Parameter.empty:
            words[name] = None
    return function(**words)


@functools.cache
def package(kernel: str) -> Any:
    """The module that holds a package's kernel. Raises ImportError."""
    module = importlib.import_module(PACKAGES[kernel])
    if kernel == "flash2":
        return importlib.import_module("flash_attn.flash_attn_interface")
    return module


def _register() -> None:
    attention = torch.library.custom_op("fewstep::attention", _forward, mutates_args=())
    backward = torch.library.custom_op("fewstep::attention_backward", _backward, mutates_args=())

    @attention.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        del k, v
        batch, tokens, heads, _ = q.shape
        lse = (0,) if kernel == "sage" else (batch, heads, tokens)
        return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)

    @backward.register_fake
    def _(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        del grad, out, lse, kernel
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.kernel = inputs
        if ctx.kernel == "sage":
            raise UserError("attention 'sage' has no backward pass: it serves inference alone")
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = torch.ops.fewstep.attention_backward(grad, *ctx.saved_tensors, ctx.kernel)
        return (*grads, None)

    attention.register_autograd(differentiate, setup_context=keep)


_register()


# ---- which there are, and which is the fastest ----


@dataclass(frozen=True)
class Shape:
    """What a kernel is timed at."""

    tokens: int
    heads: int
    head_dim: int
    batch: int = 1

    def inputs(self, device: torch.device, dtype: torch.dtype, *, grad: bool) -> list[Tensor]:
        """Queries, keys and values."""
        rng = torch.Generator(device).manual_seed(0)
        size = (self.batch, self.tokens, self.heads, self.head_dim)
        return [
            torch.randn(size, device=device, generator=rng).to(dtype).requires_grad_(grad)
            for _ in range(3)
        ]


def fault(kernel: str, device: torch.device, dtype: torch.dtype, *, grad: bool) -> str | None:
    """Why a kernel cannot be used here; None = it can.

    One that is there is tried on a small input against the formula, forward and, with `grad`,
    backward: so no release of a package is trusted by its name.
    """
    if kernel == USUAL:
        return None
    missing = _missing(kernel, device, dtype, grad=grad) if kernel in PACKAGES else None
    if missing is not None:
        return missing
    try:
        wrong = error_of(kernel, device, dtype, grad=grad)
    except Exception as error:  # a kernel that is not for this device says so in many ways
        first = (str(error) or repr(error)).splitlines()[0]
        return f"it fails here: {first}"
    bound = 10 * TOLERANCE if kernel == "sage" else TOLERANCE
    return None if wrong < bound else f"it differs from the formula by {wrong:.1e}, relative"


def _missing(kernel: str, device: torch.device, dtype: torch.dtype, *, grad: bool) -> str | None:
    """What a package's kernel lacks here."""
    if kernel == "sage" and grad:
        return "it has no backward pass: it serves inference alone"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "it needs a CUDA device and bf16"
    if kernel == "flash3" and torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "it needs a Hopper GPU"
    try:
        package(kernel)
    except ImportError as error:
        return f"{PACKAGES[kernel]} is not installed ({error})"
    return None


def error_of(kernel: str, device: torch.device, dtype: torch.dtype, *, grad: bool) -> float:
    """The largest relative difference of a kernel's output and gradients from the formula's."""
    found = []
    for name in (kernel, "math"):
        q, k, v = Shape(192, 2, 64).inputs(device, dtype, grad=grad)
        out = compute(q, k, v, name)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v)) if grad else ()
        found.append([x.detach() for x in (out, *grads)])
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(*found, strict=True)
    )


def milliseconds(
    kernel: str, shape: Shape, device: torch.device, dtype: torch.dtype, *, grad: bool
) -> float:
    """The median time of a call, with its backward pass if `grad`."""
    x = shape.inputs(device, dtype, grad=grad)
    q, k, v = x
    weight = torch.ones_like(q)

    def call() -> None:
        out = compute(q, k, v, kernel)
        if grad:
            torch.autograd.grad(out, x, weight)

    return median_ms(call, device)


def median_ms(call: Callable[[], None], device: torch.device) -> float:
    """The median time of a call in milliseconds, after a first one that does not count."""
    call()
    found = []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return sorted(found)[ROUNDS // 2]


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
    kernels: Sequence[str] = KERNELS,
) -> Iterator[tuple[str, float | str]]:
    """Each kernel with its milliseconds, or with why it cannot be used."""
    for kernel in kernels:
        problem = fault(kernel, device, dtype, grad=grad)
        yield kernel, problem or milliseconds(kernel, shape, device, dtype, grad=grad)


@functools.cache
def fastest(shape: Shape, device: torch.device, dtype: torch.dtype, *, grad: bool) -> str:
    """The fastest exact kernel at `shape`, measured; where there is no GPU, torch's own choice."""
    if device.type != "cuda":
        return USUAL
    # The plain formula holds all scores, which at real sizes is more memory than there is.
    kernels = [name for name in EXACT if name != "math"]
    times = {
        kernel: found
        for kernel, found in measure(shape, device, dtype, grad=grad, kernels=kernels)
        if not isinstance(found, str)
    }
    return min(times, key=lambda kernel: times[kernel])


def chosen(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, *, grad: bool) -> str:
    """The kernel that `name` means here: itself, or for `auto` the fastest. Raises UserError."""
    if name == AUTO:
        return fastest(shape, device, dtype, grad=grad)
    if name not in KERNELS:
        raise UserError(
            f"attention '{name}' is unknown, choose {AUTO} or one of {', '.join(KERNELS)}"
        )
    problem = fault(name, device, dtype, grad=grad)
    if problem is not None:
        raise UserError(f"attention '{name}' cannot be used: {problem}; choose {AUTO}, or another")
    return name


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
