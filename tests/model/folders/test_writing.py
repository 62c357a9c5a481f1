"""Files of weights that are written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.folders.writing import write_stream
from tests.adapters import header_of
from tests.runs import unequal
from utils.seeding import generator

SHAPES = {"b": (3, 5), "a": (), "c": (0, 4), "long.name": (2, 3, 4), "d": (7,)}


def values(dtype: torch.dtype) -> dict[str, Tensor]:
    draws = generator(0, "stream")
    return {name: torch.randn(shape, generator=draws).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_file_holds_every_bit_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    given, path = values(dtype), tmp_path / "new" / "file.safetensors"
    shuffled = ((name, given[name]) for name in sorted(given))
    write_stream(shuffled, SHAPES, dtype, path, {"source": "here"})
    assert unequal(load_file(path), given) == []
    assert header_of(path) == {"format": "pt", "source": "here"}


def test_rows_that_are_not_contiguous_are_written_as_they_read(tmp_path: Path) -> None:
    value, path = torch.arange(6.0).reshape(2, 3).T, tmp_path / "file.safetensors"
    write_stream(iter([("x", value)]), {"x": (3, 2)}, torch.float32, path, {})
    assert torch.equal(load_file(path)["x"], value)


def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "b", torch.zeros(3, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(broken(), SHAPES, torch.float32, tmp_path / "file.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_never_came_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not given"):
        write_stream(iter([]), SHAPES, torch.float32, tmp_path / "file.safetensors", {})
    assert list(tmp_path.iterdir()) == []
