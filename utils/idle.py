"""Frozen modules whose weights wait in host memory while nobody uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a module keeps a weight or a buffer, and the host's copy of it, which never changes."""

    owner: nn.Module
    name: str
    host: Tensor
    weight: bool  # else a buffer

    def put(self, value: Tensor) -> None:
        """Let the module compute with `value`."""
        if self.weight:
            self.owner._parameters[self.name] = nn.Parameter(value, requires_grad=False)
        else:
            self.owner._buffers[self.name] = value


class Idle:
    """Brings a frozen module's weights to its device when they are asked for, and drops them after.

    Nothing is copied back: the host keeps them all the time, pinned if the device is a GPU.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """module: anywhere; it goes to the host and stays there until it is used.

        Weights that want a gradient are left where they are: they are not frozen.
        """
        self.module = module
        self._device = device
        self._slots = list(_slots(module, pin=device.type == "cuda"))
        self._users = 0
        self._held = False
        self._here = False
        self._put(lambda host: host)

    @property
    def here(self) -> bool:
        """Whether the weights are on the device."""
        return self._here

    def brought(self, host: Tensor) -> Tensor:
        """A copy on the device of a tensor that waits on the host."""
        return host.to(self._device, non_blocking=True)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within the body the weights are on the device; they go when the last user has left."""
        if not self._here:
            self._put(self.brought)
            self._here = True
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._leave()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the body weights that have come stay, so that many uses bring them once."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._leave()

    def _leave(self) -> None:
        if self._here and not self._users and not self._held:
            self._put(lambda host: host)
            self._here = False

    def _put(self, place: Callable[[Tensor], Tensor]) -> None:
        placed: dict[int, Tensor] = {}  # weights that two modules share stay one
        for slot in self._slots:
            key = id(slot.host)
            if key not in placed:
                placed[key] = place(slot.host)
            slot.put(placed[key])


class Turns:
    """Modules of which one is used at a time: it is on the device, and the others on the host."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self._idle = {name: Idle(module, device) for name, module in modules.items()}
        self._here: str | None = None
        self._stay = ExitStack()

    def bring(self, name: str) -> None:
        """Let the weights of `name` be on the device until others are asked for."""
        if name == self._here:
            return
        self._here = None
        self._stay.close()  # first, so that there is room
        self._stay.enter_context(self._idle[name].awake())
        self._here = name


def _slots(module: nn.Module, *, pin: bool) -> Iterator[Slot]:
    """All frozen weights and buffers of `module`, and their copies in host memory."""
    hosts: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.requires_grad:
                    continue
                if id(tensor) not in hosts:
                    hosts[id(tensor)] = hosted(tensor, pin=pin)
                weight = isinstance(tensor, nn.Parameter)
                yield Slot(owner, name, hosts[id(tensor)], weight)


def hosted(tensor: Tensor, *, pin: bool) -> Tensor:
    """`tensor` in host memory."""
    host = tensor.detach().cpu()
    return host.pin_memory() if pin else host
