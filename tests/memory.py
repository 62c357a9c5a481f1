"""What tests need to say how many bytes are held."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Notes every tensor that is made, to say later how many bytes are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.made.append(StorageWeakRef(tensor.untyped_storage()))
        return out

    def settled_bytes(self) -> int:
        """Those that are held once what other threads still drop is gone."""
        readings = []
        for _ in range(10):
            gc.collect()
            readings.append(self.bytes())
            time.sleep(0.02)
        return min(readings)

    def bytes(self) -> int:
        """Of distinct storages that are still alive, at their present size: FSDP2 empties some."""
        held = {}
        for reference in self.made:
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                held[reference.cdata] = storage.nbytes()
        return sum(held.values())
