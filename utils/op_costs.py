"""What one operation costs: arithmetic, bytes read and written, bytes sent to other ranks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_iter
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


def kind_of(func: Any, flops: int) -> Kind:
    """Which units of a device it keeps busy."""
    name = func.overloadpacket.__name__
    if "attention" in name or "attend" in name:
        return "attention_backward" if "backward" in name else "attention"
    if "convolution" in name:
        return "convolution"
    return "matmul" if flops else "elementwise"


def work_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Work | None:
    """What `func` did; None = it moved nothing, as a view."""
    flops = flops_of(func, args, kwargs, out)
    inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    if not outputs and not func._schema.is_mutable:
        return None
    written = _mutated(func, args) if func._schema.is_mutable else outputs
    if not flops and (_is_view(func) or _only_makes_room(func)):
        return None
    moved = sum(map(span, inputs)) + sum(map(span, written))
    if not moved:
        return None
    size = max((t.dtype.itemsize for t in inputs or outputs), default=4)
    return Work(kind_of(func, flops), flops, moved, size)


def span(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor moves; an expanded one is read once."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return 0
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else min(1, size)
    return numbers * tensor.dtype.itemsize


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _only_makes_room(func: Any) -> bool:
    return func.overloadpacket.__name__.startswith(("empty", "new_empty", "_local_scalar", "lift"))


def _mutated(func: Any, args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [t for t in tree_iter(value) if isinstance(t, Tensor)]
    return found


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
        if name in ("wait_tensor", "barrier"):
            return None
        raise AssertionError(f"no rule tells what {func} sends")
    kind, where = _COLLECTIVES[name]
    whole = out if where is None else args[where]
    count = sum(t.numel() * t.dtype.itemsize for t in tree_iter(whole) if isinstance(t, Tensor))
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
            group = dist.distributed_c10d._resolve_process_group(value)
            return dist.get_process_group_ranks(group)
    raise AssertionError("a collective names its group")
