"""Reads a checkpoint's tensors, whole or some of their rows, and never runs code that it holds."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from utils.errors import UserError

# What torch pickles into a checkpoint's .metadata, beside its dtypes.
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
_PLAIN = {
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _Unpickler(pickle.Unpickler):
    """Refuses a pickle that wants code."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(
                f"it wants to run code ({module}.{name}), which is refused"
            )
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint's metadata once, and never runs code that it holds.

    For each of a checkpoint's tensors, reading them again would be quadratic work.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path / ".metadata"
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises ValueError that names the file if it is no metadata of a checkpoint."""
        if self._metadata is None:
            try:
                with self._file.open("rb") as file:
                    content = _Unpickler(file).load()
            except Exception as error:  # unpickling raises many types; all mean the same
                raise UserError(f"{self._file}: not readable as metadata: {error}") from error
            if not isinstance(content, Metadata):
                raise UserError(f"{self._file}: holds no metadata but a {type(content).__name__}")
            self._metadata = content
        return self._metadata

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a stored tensor along its first dimension; the bytes of others are not read.

        rows: in steps of 1. A tensor without dimensions is read whole.
        """
        stored = self.read_metadata().state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata), name
        size = list(stored.size)
        first, end, _ = rows.indices(size[0]) if size else (0, 1, 1)
        result = torch.empty(
            [max(0, end - first), *size[1:]] if size else [1], dtype=stored.properties.dtype
        )
        for chunk in stored.chunks:
            offsets, sizes = (list(chunk.offsets), list(chunk.sizes)) if size else ([0], [1])
            begin, stop = max(first, offsets[0]), min(end, offsets[0] + sizes[0])
            if begin >= stop or not math.prod(sizes):
                continue
            place = [slice(begin - first, stop - first)]
            place += [slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)]
            index = MetadataIndex(name, chunk.offsets)
            result[tuple(place)] = self._chunk_rows(index, begin - offsets[0], stop - offsets[0])
        return result if size else result[0]

    def _chunk_rows(self, index: MetadataIndex, begin: int, stop: int) -> Tensor:
        """Rows `begin` to `stop` of one chunk, which `torch.save` wrote somewhere in a file."""
        info = self.read_metadata().storage_data[index]
        with (self._file.parent / info.relative_path).open("rb") as file:
            view = self._slice_file(file, info)
            layout = torch.load(view, map_location="meta", weights_only=True)
            at = layout.untyped_storage()._checkpoint_offset
            if not layout.is_contiguous() or at is None:  # as other systems may write
                view.seek(0)
                whole = torch.load(view, map_location="cpu", weights_only=True)
                return whole[begin:stop] if whole.ndim else whole
            row = layout.nbytes // len(layout) if layout.ndim else layout.nbytes
            part = torch.empty([stop - begin, *layout.shape[1:]], dtype=layout.dtype)
            skipped = layout.storage_offset() * layout.element_size() + begin * row
            file.seek(info.offset + at + skipped)
            raw = part.view(-1).view(torch.uint8).numpy()
            count = file.readinto(raw)
            assert count == raw.nbytes, f"{file.name}: {count} of {raw.nbytes} bytes"
            return part


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads objects as torch reads weights: plain containers, no code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take an object's bytes, if they hold no more than that."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
