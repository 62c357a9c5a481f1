"""Model folders that appear whole or not at all: shards of weights, copied parts."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import ExistsError
from utils.files import replaced_atomically, write_text
from utils.weights import INDEX_SUFFIX, write_weights


def check_target(target: Path) -> None:
    """Raise ExistsError unless a folder may appear at `target`."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExistsError(f"{target}: is there already; give a new or an empty folder")


# As the safetensors format calls them.
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_stream(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """Write one safetensors file tensor by tensor; it appears whole or not at all.

    shapes: of all that `tensors` gives, in any order. dtype: of all of them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    places: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        places[name], end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [places[name], end]
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replaced_atomically(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, value in tensors:
            assert value.dtype == dtype and tuple(value.shape) == tuple(shapes[name]), name
            file.seek(begin + places.pop(name))
            file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        assert not places, f"not given: {list(places)[:3]}"
        file.flush()


def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    stem: str,
    max_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as they come: one safetensors file, or shards and their index.

    A shard holds at most `max_bytes`, or a single tensor. No more than one is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        write_weights(shard, folder / f"{stem}-{len(shards)}.safetensors", metadata)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(value.nbytes for value in shard.values()) + tensor.nbytes > max_bytes:
            close()
        shard[name] = tensor
        total += tensor.nbytes
    close()
    if len(shards) == 1:
        (folder / f"{stem}-0.safetensors").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / f"{stem}{INDEX_SUFFIX}", json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes it at the end; what a killed call left goes."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_part(source: Path, target: Path) -> None:
    """Copy a file or a folder; the folders that it lies in are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def copy_if_there(source: Path, target: Path) -> bool:
    """The same, if there is something to copy; returns whether there is."""
    if source.exists():
        copy_part(source, target)
    return source.exists()
