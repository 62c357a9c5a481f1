"""What a network computes from shapes and positions alone, kept so that it is computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Memo:
    """Constants by what they depend on, up to so many bytes; the longest unused leave first.

    All that a value depends on must be in its key, the device included: then nothing goes stale.
    Weights change under their names, so what depends on them does not belong here.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of `key`, computed at the first call; one beyond the limit is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
            known: T = self._values[key]
            return known
        # A tensor that is made in inference mode could never be used under autograd.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        if bytes_of(value) <= self.limit_bytes:
            self._values[key] = value
        while self.bytes_held() > self.limit_bytes:
            self._values.popitem(last=False)
        return value

    def bytes_held(self) -> int:
        """Of the tensors in all values."""
        return sum(map(bytes_of, self._values.values()))


def bytes_of(value: object) -> int:
    """Of a tensor, or of those that are an object's attributes, as of FlexAttention's masks."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(value))


def _tensors(value: object) -> Iterator[Tensor]:
    candidates = [value] if isinstance(value, Tensor) else vars(value).values()
    return (tensor for tensor in candidates if isinstance(tensor, Tensor))
