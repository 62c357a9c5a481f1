"""A dry run: tensors without values and ranks without peers, so that real code runs for no cost.

What lies on the device has shapes and no values. What the host computes by itself (positions, step
counters, seeds) keeps its values, because Python reads it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from utils.fused_norm import fused_norms
from utils.op_costs import tensors_in

HOST_NUMBERS = 2**16  # a larger tensor has no values, whoever computes it

Draw = Literal["least", "most"]


class HostValues(TorchDispatchMode):
    """Lets the host compute for real what it computes of small tensors with values alone.

    draw: which end of its range each integer or single number takes that is drawn, such as the
    exit step of a rollout; so a dry run covers the shortest or the longest course.
    """

    def __init__(self, pretend: FakeTensorMode, draw: Draw) -> None:
        super().__init__()
        self.pretend = pretend
        self.draw = draw

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around each call, which costs time: nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` with values where it can be, and without them elsewhere."""
        if DTensor in types:
            return NotImplemented  # it turns to its local part, which comes by here
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor where it is
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if not _has_values(func, tensors, args, kwargs):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            if func.overloadpacket in (torch.ops.aten.randint, torch.ops.aten.rand):
                return self._drawn(func, args, kwargs)
            out = func(*args, **kwargs)
        return tree_map_only(Tensor, self._without_values_if_large, out)

    def _drawn(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        value: Tensor = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.rand:
            return value.fill_(0.0 if self.draw == "least" else 1.0 - 2.0**-24)
        bounds = [a for a in args if isinstance(a, int)]
        low, high = bounds if bounds[1:] else (0, bounds[0])
        return value.fill_(low if self.draw == "least" else high - 1)

    def _without_values_if_large(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() <= HOST_NUMBERS:
            return tensor
        return self.pretend.from_tensor(tensor, static_shapes=True)


def _has_values(
    func: Any, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether an operation runs as it is: on the host's values, or on the meta device."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    target = None if device is None else torch.device(device).type
    if any(isinstance(t, FakeTensor) for t in tensors):
        return False
    if target == "meta":
        return True
    if any(t.is_meta for t in tensors):
        return target is None  # else values would be needed where there are none
    counts = func.overloadpacket in (torch.ops.aten.randint, torch.ops.aten.arange)
    # One number for all samples decides what is done with them.
    counts = counts or (func.overloadpacket is torch.ops.aten.rand and not args[0])
    whole = dtype is not None and not (dtype.is_floating_point or dtype.is_complex)
    return bool(tensors) or counts or whole


@contextlib.contextmanager
def _addresses() -> Iterator[None]:
    """Within the body storages without memory have addresses, by which code tells them apart."""
    address = UntypedStorage.data_ptr

    def told(storage: UntypedStorage) -> int:
        return storage._cdata if storage.device.type == "meta" else address(storage)

    UntypedStorage.data_ptr = told  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        UntypedStorage.data_ptr = address  # type: ignore[method-assign]


@contextlib.contextmanager
def dry_run(
    *, world_size: int = 1, per_node: int | None = None, draw: Draw = "most", on_gpu: bool = False
) -> Iterator[FakeTensorMode]:
    """Within the body tensors have no values, and this process is rank 0 of `world_size`.

    per_node: how many of the ranks are on one machine; None = all. on_gpu: with the operations that
    a GPU would run, where they are others.
    """
    # Imported when they are used: they register what collectives do without values or peers.
    importlib.import_module("torch.distributed._tools.fake_collectives")
    peers = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=peers.FakeStore(), rank=0, world_size=world_size)
    pretend = FakeTensorMode(allow_non_fake_inputs=True)
    told = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(min(per_node or world_size, world_size))
    try:
        norms = fused_norms() if on_gpu else contextlib.nullcontext()
        with _addresses(), pretend, HostValues(pretend, draw), norms:
            yield pretend
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE")
        if told is not None:
            os.environ["LOCAL_WORLD_SIZE"] = told
        dist.destroy_process_group()
