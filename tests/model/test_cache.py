"""The key-value cache: read freely, written only without autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.wan.cache import KVCache


def rows(first: int, count: int) -> Tensor:
    """[B = 1, N = count, heads = 2, head_dim = 3], numbered from `first`."""
    return torch.arange(first, first + count).float().view(1, -1, 1, 1).expand(1, count, 2, 3)


def test_an_empty_cache_adds_nothing() -> None:
    cache, new = KVCache(2), rows(0, 2)
    keys, values = cache.extend(0, new, new)
    assert cache.tokens == 0
    assert torch.equal(keys, new)
    assert torch.equal(values, new)


def test_the_past_comes_before_the_present() -> None:
    cache = KVCache(1)
    with torch.no_grad():
        cache.commit(0, rows(0, 2), rows(10, 2))
    keys, values = cache.extend(0, rows(2, 1), rows(12, 1))
    assert keys[0, :, 0, 0].tolist() == [0, 1, 2]
    assert values[0, :, 0, 0].tolist() == [10, 11, 12]


def test_extending_does_not_write() -> None:
    cache = KVCache(1)
    with torch.no_grad():
        cache.commit(0, rows(0, 2), rows(0, 2))
    cache.extend(0, rows(2, 3), rows(2, 3))
    assert cache.tokens == 2


def test_layers_do_not_share_their_past() -> None:
    cache = KVCache(2)
    with torch.no_grad():
        cache.commit(0, rows(0, 2), rows(0, 2))
    keys, _ = cache.extend(1, rows(5, 1), rows(5, 1))
    assert keys.shape[1] == 1


def test_writing_under_autograd_is_refused() -> None:
    cache = KVCache(1)
    with pytest.raises(RuntimeError, match=r"written only under torch.no_grad\(\)"):
        cache.commit(0, rows(0, 1), rows(0, 1))
    assert cache.tokens == 0


def test_the_gradient_of_the_present_passes_through_the_cache() -> None:
    cache = KVCache(1)
    with torch.no_grad():
        cache.commit(0, rows(0, 2), rows(0, 2))
    new = rows(2, 1).clone().requires_grad_()
    keys, values = cache.extend(0, new, new)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(new.grad, torch.full_like(new, 2.0))
