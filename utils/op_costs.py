"""What one operation costs: arithmetic, bytes read and written, bytes sent to other ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Kind = Literal["matmul", "convolution", "attention", "attention_backward", "elementwise"]


class Work(NamedTuple):
    """An operation on the device."""

    kind: Kind
    flops: int  # of matrix products and attention; others are bound by memory
    moved: int  # bytes read and written
    itemsize: int  # bytes of a number that it computes with


class Transfer(NamedTuple):
    """A message between ranks."""

    kind: str  # all_gather, reduce_scatter, all_reduce, all_to_all, broadcast
    sent: int  # bytes that this rank sends, in the usual ring
    ranks: int  # in the group
    step: int  # from one rank of the group to the next; 1 = neighbours


aten = torch.ops.aten
_FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


def flops_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Multiplications and additions of matrix products, convolutions and attention."""
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    # As torch counts its other fused kernels.
    if packet is _FLASH_CPU:
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if packet is _FLASH_CPU_BACKWARD:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    return 0


@functools.cache
def _unit(name: str) -> Kind | None:
    """Which units of a device an operation keeps busy, if its name tells."""
    if "attention" in name or "attend" in name:
        return "attention_backward" if "backward" in name else "attention"
    return "convolution" if "convolution" in name else None


def work_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Work | None:
    """What `func` did; None = it moved nothing, as a view."""
    if _moves_nothing(func):
        return None
    flops = flops_of(func, args, kwargs, out)
    inputs = list(tensors_in((args, kwargs)))
    written = tensors_in([args[i] for i in _mutated(func) if i < len(args)] or out)
    moved = sum(map(span, inputs)) + sum(map(span, written))
    if not moved:
        return None
    size = inputs[0].dtype.itemsize if inputs else 4
    kind = _unit(func.overloadpacket.__name__) or ("matmul" if flops else "elementwise")
    return Work(kind, flops, moved, size)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def span(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor moves; an expanded one is read once."""
    if tensor.is_meta:
        return 0
    if 0 not in tensor.stride():
        return tensor.nbytes
    kept = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(kept) * tensor.dtype.itemsize if tensor.numel() else 0


@functools.cache
def _moves_nothing(func: Any) -> bool:
    """Views, and what only makes room."""
    name, returns = func.overloadpacket.__name__, func._schema.returns
    if name.startswith(("empty", "new_empty", "_local_scalar", "lift", "is_same_size")):
        return True
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


@functools.cache
def _mutated(func: Any) -> tuple[int, ...]:
    """Which arguments are written to."""
    return tuple(
        i
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


# Name of the operation -> what it is, which argument or result holds all ranks' bytes.
_COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 0),
    "all_to_all_single": ("all_to_all", 0),
    "broadcast_": ("broadcast", 0),
    "broadcast": ("broadcast", 0),
}


def transfer_of(func: Any, args: Any, out: Any) -> Transfer | None:
    """What `func` sends to other ranks; None = nothing."""
    if func.namespace not in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
        return None
    name = func.overloadpacket.__name__
    if name not in _COLLECTIVES:
        if name.startswith(("wait", "barrier", "_wrap")):
            return None
        raise AssertionError(f"no rule tells what {func} sends")
    kind, where = _COLLECTIVES[name]
    whole = out if where is None else args[where]
    count = sum(t.numel() * t.dtype.itemsize for t in tensors_in(whole))
    ranks = _ranks(args)
    n = len(ranks)
    share = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(kind, (n - 1) / n)
    return Transfer(kind, round(count * share), n, ranks[1] - ranks[0] if n > 1 else 1)


def _ranks(args: Any) -> list[int]:
    """The members of the group that a collective names: as an object, or by its name."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            with_type = value._type().qualified_name()
            if with_type.endswith("c10d.ProcessGroup"):
                return dist.get_process_group_ranks(dist.ProcessGroup.unbox(value))
    for value in args:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            name: Any = value
            group = dist.distributed_c10d._resolve_process_group(name)
            return dist.get_process_group_ranks(group)
    raise AssertionError("a collective names its group")
