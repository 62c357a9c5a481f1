"""Flat weight files: stream safetensors or .pt into a module, sharded or not, and write them."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from utils import checkpoint
from utils.errors import UserError
from utils.files import replaced_atomically

log = logging.getLogger(__name__)

INDEX_SUFFIX = ".safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"  # what a clone without git lfs holds instead of files


class WeightsError(UserError):
    """Weights that do not fit the model they are meant for."""


class MissingFilesError(WeightsError):
    """An index of weights that names files which are not there."""


class Weights(Protocol):
    """Named tensors somewhere on disk."""

    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it; in the order that is fastest to read."""

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""


class JoinedWeights:
    """Those of several networks as one: names begin with what each network is called."""

    def __init__(self, path: Path, parts: Mapping[Any, Weights]) -> None:
        """parts: by the networks' names, which are strings."""
        self.path = path
        self._parts = parts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it; one network after the other."""
        return {
            f"{part}.{name}": shape
            for part, weights in self._parts.items()
            for name, shape in weights.shapes().items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        part, _, own = name.partition(".")
        return self._parts[part].read(own, rows)


class CheckpointWeights:
    """One role's weights, or their average, inside a training checkpoint."""

    def __init__(self, path: Path, *, role: str = "generator", averaged: bool = False) -> None:
        self.path = path
        self._prefix = f"{'ema' if averaged else 'roles'}.{role}."
        self._reader = checkpoint.Reader(path)
        try:
            metadata = self._reader.read_metadata().state_dict_metadata
        except ValueError as error:
            raise WeightsError(str(error)) from error
        self._tensors = {
            key.removeprefix(self._prefix): value
            for key, value in metadata.items()
            if key.startswith(self._prefix) and isinstance(value, TensorStorageMetadata)
        }
        if not self._tensors:
            held = sorted({".".join(key.split(".")[:2]) for key in metadata})
            raise WeightsError(f"{path}: holds no '{self._prefix[:-1]}', only {held}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        return {name: tuple(value.size) for name, value in self._tensors.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension; other rows are not read."""
        return self._reader.read_rows(self._prefix + name, rows)


class WeightFile:
    """One or several files that together hold named tensors; slices are read without the rest.

    Segments that wrappers add to names are left out, see `plain_name`.
    """

    def __init__(
        self, path: Path, *, role: str = "generator", averaged: bool | None = None
    ) -> None:
        """Of a .pt file with several networks, `role` is read: generator or critic.

        averaged: which of a generator's two kinds; None = the average if there is one.
        """
        self.path = path
        self._lazy: dict[str, tuple[Path, str]] = {}  # name -> file, name in it
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        if not path.is_file():
            raise WeightsError(f"{path}: no such weight file")
        try:
            if path.name.endswith(INDEX_SUFFIX):
                self._open(_indexed_files(path))
            elif path.suffix == ".safetensors":
                self._open([path])
            else:
                self._tensors = dict(_flat_tensors(path, role, averaged))
                self._shapes = {name: tuple(v.shape) for name, v in self._tensors.items()}
                self._dtypes = {name: str(v.dtype) for name, v in self._tensors.items()}
        except WeightsError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise WeightsError(f"{path}: not readable as weights: {error}") from error
        if self._lazy and (averaged or role != "generator"):
            raise WeightsError(_lacks(path, role))

    def _open(self, files: list[Path]) -> None:
        for path in files:
            with _open_safetensors(path) as file:
                for held in file.offset_keys():
                    name = plain_name(held)
                    if name in self._lazy:
                        raise WeightsError(f"{self.path}: holds '{name}' twice")
                    self._lazy[name] = path, held
                    found = file.get_slice(held)
                    self._shapes[name] = tuple(found.get_shape())
                    self._dtypes[name] = found.get_dtype()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it; in the order of the files."""
        return dict(self._shapes)

    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor, as its file calls it: F32, or else torch.float32."""
        return dict(self._dtypes)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        if name in self._tensors:
            tensor = self._tensors[name]
            return tensor[rows] if tensor.ndim else tensor
        # Opened for each tensor: pages that are read count as this process's until it is closed.
        path, held = self._lazy[name]
        with _open_safetensors(path) as file:
            part = file.get_slice(held)
            return part[rows] if part.get_shape() else file.get_tensor(held)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not readable as weights: {_unopened(path, error)}") from error


def _unopened(path: Path, error: Exception) -> str:
    begin = path.open("rb").read(len(_LFS_POINTER)) if path.is_file() else b""
    return _reason(path, error) if begin == _LFS_POINTER else f"{error}; was it cut off?"


def _indexed_files(path: Path) -> list[Path]:
    """The files that an index names, in their order."""
    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    files = [path.parent / name for name in sorted(set(weight_map.values()))]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise MissingFilesError(f"{path}: lists files that are missing: {absent}")
    return files


# Where the checkpoints of Self-Forcing and its relatives keep a network, and its average.
_GROUPS = {
    ("generator", None): ("generator_ema", "generator", "model"),
    ("generator", True): ("generator_ema",),
    ("generator", False): ("generator", "model", "generator_ema"),
    ("critic", None): ("critic",),
    ("critic", False): ("critic",),
}


def _lacks(path: Path, role: str) -> str:
    if role == "generator":
        return f"{path}: holds no averaged weights beside its own; ask for the regular ones"
    return f"{path}: holds no {role}; ask for the generator"


def _flat_tensors(path: Path, role: str, averaged: bool | None) -> Iterator[tuple[str, Tensor]]:
    content = read_tensors(path)
    for key in _GROUPS.get((role, averaged), ()):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            if averaged is False and key == "generator_ema":
                log.warning("%s: holds no generator but its average, which is taken", path)
            break
    else:
        if averaged or role != "generator":
            raise WeightsError(_lacks(path, role))
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds no named tensors but a {type(content).__name__}")
    seen = set()
    for held, value in content.items():
        if isinstance(held, str) and isinstance(value, Tensor):
            name = plain_name(held)
            if name in seen:
                raise WeightsError(f"{path}: holds '{name}' twice")
            seen.add(name)
            yield name, value


def weight_names(path: Path) -> list[str]:
    """The names in a safetensors file, or in those that an index names, without reading either.

    Empty where nothing can be read; whoever needs the weights says so.
    """
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return list(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return []


def read_tensors(path: Path) -> Any:
    """What a .pt or .pth file holds, read when it is used; tensors and plain containers alone.

    Raises WeightsError with the file's name.
    """
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many types; all mean: not a file of tensors
        raise WeightsError(
            f"{path}: not a file of plain tensors: {_reason(path, error)}"
        ) from error


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read as tensors, in words that suit its user.

    torch's own advise to read it with weights_only=False, that is to run the code that it holds.
    """
    code = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code is not None:
        return f"it wants to run code ({code.group(1)}), which is refused; save tensors alone"
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(len(_LFS_POINTER)).lower()
        if not begin:
            return "it is empty; copy it again"
        if begin == _LFS_POINTER:
            return "it is a pointer of git lfs; fetch the file itself with: git lfs pull"
        if begin.startswith(b"gguf"):
            return "it is a GGUF file, of quantised weights; give those that it was made of"
        if begin.startswith((b"<!doctype", b"<html")):
            return "it is a web page; download the file itself"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    cut = isinstance(error, OSError) and error.errno == errno.EINVAL  # mapped beyond its end
    wrong = isinstance(error, UnicodeDecodeError | IndexError | EOFError)
    if cut or wrong or re.search("weights_only|PytorchStreamReader", reason):
        reason = "it is damaged, cut off, or nothing that torch.save wrote"
    return f"{reason.partition('. ')[0]}; copy it again"


def plain_name(name: str) -> str:
    """A weight's name without the segments that wrappers of other systems add."""
    for segment in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(segment, "")
    return name.removeprefix("model.")


def check_fits(
    module: nn.Module, weights: Weights, *, what: str, without: Collection[str] = ()
) -> None:
    """Raise WeightsError unless names and shapes are exactly those of `module`.

    without: names in `module` that come from elsewhere.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    expected = {name: shape for name, shape in expected.items() if name not in without}
    found = weights.shapes()
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if missing or extra or shapes:
        raise WeightsError(
            f"{weights.path} does not fit {what}: {len(missing)} weights missing "
            f"{missing[:3]}, {len(extra)} unexpected {extra[:3]}, {len(shapes)} of another shape "
            f"{shapes[:3]}; is it a checkpoint of another architecture?"
        )


def load_weights(
    module: nn.Module, weights: Weights, *, what: str, without: Collection[str] = ()
) -> None:
    """Copy `weights` into `module`; a sharded module reads only this rank's rows of each tensor.

    without: names in `module` that come from elsewhere.
    """
    check_fits(module, weights, what=what, without=without)
    targets = module.state_dict()
    for name in weights.shapes():
        _copy(targets[name], functools.partial(weights.read, name))


def fill_weights(
    module: nn.Module,
    value: Callable[[str, torch.Size], Tensor],
    names: Collection[str] | None = None,
) -> None:
    """Set weights of `module` to `value(name, shape)`; a sharded module keeps its rows.

    names: of the weights that are set; None = of all.
    """
    state = module.state_dict()
    for name in state if names is None else names:
        _copy(state[name], value(name, state[name].shape).__getitem__)


@torch.no_grad()
def _copy(target: Tensor, read_rows: Callable[[slice], Tensor]) -> None:
    if not isinstance(target, DTensor):
        target.copy_(read_rows(slice(None)))
        return
    shape, offset = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    if target.to_local().numel():
        target.to_local().copy_(read_rows(slice(offset[0], offset[0] + shape[0])))


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a .safetensors or .pt file; the file appears whole or not at all."""
    if path.suffix not in (".safetensors", ".pt"):
        raise WeightsError(f"{path}: weights are written to .safetensors or .pt files")
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replaced_atomically(path) as part:
        if path.suffix == ".pt":
            torch.save(whole, part)
        else:
            save_file(whole, part, metadata={"format": "pt", **metadata})
            os.chmod(part, 0o644)  # safetensors creates private files
