"""Writes a checkpoint's files, hashing them on their way, from a state or from a copy of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.tensor import DTensor

from utils.checkpoint_manifest import Written
from utils.hashes import CHUNK_BYTES

BUFFER_BYTES = 2**18


class _Hashed(io.RawIOBase):
    """A file that is written from front to back, and hashed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._count = 0

    @property
    def written(self) -> Written:
        """What went into it so far."""
        return Written(self._count, self._digest.hexdigest())

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self._digest.update(memoryview(data)[:count])
        self._count += count
        return count

    def tell(self) -> int:
        return self._count

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


class _Buffered(io.BufferedWriter):
    """Collects small pieces; whoever asks for the file's number is about to sync it."""

    def fileno(self) -> int:
        self.flush()
        return super().fileno()


class _HashingFiles(FileSystem):
    """torch's way to files; `written` tells what went into each."""

    def __init__(self) -> None:
        self.written: dict[str, Written] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        raw = _Hashed(Path(path))
        with _Buffered(raw, BUFFER_BYTES) as stream:
            yield stream
        name = Path(path).name.removesuffix(".tmp")  # the metadata are renamed when they are whole
        self.written[name] = raw.written


class Writer(dcp.FileSystemWriter):
    """Writes into a folder, durably; `written` tells what went into this rank's files.

    Equal states give equal bytes.
    """

    def __init__(self, path: Path, *, name: str) -> None:
        super().__init__(path)
        self._files = _HashingFiles()
        self.fs = self._files
        self._name = name

    @property
    def written(self) -> dict[str, Written]:
        """Size and hash of each file that this rank wrote."""
        return self._files.written

    def storage_meta(self) -> StorageMeta | None:
        """What torch writes beside the metadata: usually a random number and the first place."""
        return StorageMeta(checkpoint_id=self._name, save_id="")


class Copies:
    """A state copied to host memory, whose buffers serve every copy of such a state."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    @property
    def taken(self) -> bool:
        """Whether the buffers are there."""
        return bool(self._values)

    def take(self, state: dict[str, Any]) -> Mapping[str, Any]:
        """What `state` holds now, by flat name; of a sharded tensor, this rank's part.

        Valid until the next call.
        """
        flat = flatten_state_dict(state)[0]
        self._values = {name: self._copied(name, value) for name, value in flat.items()}
        if any(isinstance(value, Tensor) and _part(value).is_cuda for value in flat.values()):
            torch.cuda.current_stream().synchronize()
        return self._values

    def _copied(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        part, buffer = _part(value), self._values.get(name)
        if not isinstance(buffer, Tensor) or not _alike(buffer, part):
            buffer = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
        # Strides are kept, so that what is written does not tell a copy from the tensor itself.
        return buffer.copy_(part, non_blocking=True)


def bytes_of(state: dict[str, Any]) -> int:
    """What a copy of this rank's part of a state takes."""
    values = flatten_state_dict(state)[0].values()
    return sum(_part(value).nbytes for value in values if isinstance(value, Tensor))


def free_bytes() -> int:
    """Host memory that may still be taken, by the system and by this process's control group."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no group, or one without a limit
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def _part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, without its history."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _alike(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride())


class CopyPlanner(dcp.DefaultSavePlanner):
    """Plans from a state, of which it hands out the copies that were taken."""

    def __init__(self, copies: Mapping[str, Any]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The copy of what the state had under this name."""
        return self._copies[index.fqn]


def hash_on_disk(path: Path) -> Written:
    """Size and hash of a file as the disk has it: read anew, not from memory, if possible."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # some file systems take no advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            count += len(chunk)
    return Written(count, digest.hexdigest())
