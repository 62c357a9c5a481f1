"""A device that only pretends: it computes on the CPU, and counts what would wait for a GPU.

Its tensors say that they lie on another device, so code under test moves data there and back as it
would on a GPU, and what it computes on the CPU by design is told from what it reads from there.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sources import ROOT

PRETENDED = torch.device("meta")  # one that torch has no memory on, and asks no driver about
CPU = torch.device("cpu")
IN_PLACE = {torch.ops.aten.copy_, torch.ops.aten._foreach_copy_}
COPIES = {*IN_PLACE, torch.ops.aten._to_copy}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
MIXING = COPIES | INDEXING
# What torch says of operations whose result, or its size, is known only when they are done.
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
TorchGenerator = torch.Generator


class OnDevice(Tensor):
    """A tensor of the pretended device."""

    held: Tensor  # its values, in the same memory

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_subclass(cls, held, require_grad=False, dispatch_device=True)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        del types
        return compute(function, args, kwargs or {})

    # What torch would answer without asking the dispatcher. On a GPU numpy() is an error.
    def tolist(self) -> Any:
        """Its values, read on the host."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """Its values, read on the host."""
        return self.cpu().numpy()

    def __repr__(self, **_: Any) -> str:
        return repr(self.cpu())

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)


class Generator(torch.Generator):
    """A random generator of the pretended device."""

    device = PRETENDED


def make_generator(device: torch.device | str = CPU) -> torch.Generator:
    """What torch.Generator(device) gives."""
    return Generator() if torch.device(device) == PRETENDED else TorchGenerator(device)


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> object:
    """The result of an operation, on the device that it would be on."""
    if function is torch.ops.prim.device.default:
        return PRETENDED
    inputs = list(tensors((args, kwargs.values())))
    check_devices(function, inputs)
    own = {id(x.held): x for x in inputs if isinstance(x, OnDevice)}
    target = target_device(function, inputs, kwargs)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": CPU}
    held = {name: _mapped(_held, value) for name, value in kwargs.items()}
    result = function(*_mapped(_held, args), **held)
    if target != PRETENDED:
        return result
    return _mapped(lambda x: own[id(x)] if id(x) in own else OnDevice(x), result)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of an operation's arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, ValuesView)):
            yield from tensors(value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, item) for item in value)
    return value


def _held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, OnDevice) else x


def target_device(
    function: Any, inputs: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> torch.device:
    """Where the result of an operation lies."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if function.overloadpacket in IN_PLACE:
        inputs = inputs[:1]
    return PRETENDED if any(isinstance(x, OnDevice) for x in inputs) else CPU


def check_devices(function: Any, inputs: Sequence[Tensor]) -> None:
    """Refuse to mix devices, but for copies, indices and scalars, as CUDA does."""
    if function.overloadpacket in MIXING:
        return
    found = {isinstance(x, OnDevice) for x in inputs if x.ndim}
    if len(found) > 1:
        raise RuntimeError(f"{function}: expected all tensors on one device, found two")


def waits(function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation needs a value of the device on the host."""
    inputs = list(tensors((args, kwargs.values())))
    if not any(isinstance(x, OnDevice) for x in inputs):
        return False
    if function.overloadpacket in COPIES:
        return target_device(function, inputs, kwargs) == CPU and not hastens(
            function, args, kwargs
        )
    if function.overloadpacket in INDEXING:  # by a mask: how many elements does it choose?
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1]))
    if kwargs.get("output_size") is not None:  # of repeat_interleave, so that it need not ask
        return False
    return bool(READS & set(function.tags)) or function is torch.ops.aten.is_nonzero.default


def hastens(function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a copy is asked not to wait, as from a GPU to pinned memory it does not."""
    in_place = function is torch.ops.aten.copy_.default and len(args) > 2 and bool(args[2])
    return in_place or bool(kwargs.get("non_blocking"))


class Counting(TorchDispatchMode):
    """Counts reads of the pretended device by the line of ours that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        del types
        if waits(function, args, kwargs or {}):
            self.reads[f"{function} in {_caller()}"] += 1
        return compute(function, args, kwargs or {})


def _caller() -> str:
    """The innermost line of this project that is not in this file."""
    for frame in reversed(traceback.extract_stack()):
        ours = frame.filename.startswith(f"{ROOT}/") and "/site-packages/" not in frame.filename
        if ours and frame.filename != __file__:
            return f"{frame.filename.removeprefix(str(ROOT) + '/')}:{frame.name}"
    return "?"


@contextmanager
def pretended_device() -> Iterator[Counter[str]]:
    """Within the body PRETENDED works as a device; what is read from it is counted."""
    whole = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with patch.object(torch, "Generator", make_generator), Counting() as mode:
            yield mode.reads
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(whole)
