"""What a run reads, in a few hashes: so that data or weights that changed are noticed.

A file's place does not count, its content does. Of large things samples are hashed: every caption,
but only some records' tensors; of weights all names and shapes, and the first rows of each.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor

from trainer.bases import adapter_files
from trainer.inputs import Inputs
from trainer.run import Run
from utils.data.dataset import Dataset, captions
from utils.data.lmdb_reading import DamagedRecordError
from utils.weights import Weights

log = logging.getLogger(__name__)

SAMPLED_RECORDS = 16  # whose tensors are hashed
ROWS = 2  # of each weight
SHOWN = 8  # damaged records that are named
DAMAGED = b"\0damaged\0"  # in the place of what cannot be read


@dataclass(frozen=True)
class Fingerprint:
    """Equal for equal inputs."""

    records: int
    captions: str  # of all, in order
    tensors: str  # of some records
    weights: dict[str, str]  # per role where it begins

    def to_json(self) -> str:
        """As it is kept in a log directory."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """What `to_json` gave. Raises KeyError, TypeError or JSONDecodeError for anything else."""
        return cls(**json.loads(text))

    def differences(self, before: Fingerprint) -> Iterator[str]:
        """What has changed since `before`, a phrase each."""
        if self.records > before.records:
            yield f"data.path: has grown from {before.records} to {self.records} records"
        elif self.records < before.records:
            yield f"data.path: has shrunk from {before.records} to {self.records} records"
        elif self.captions != before.captions:
            yield "data.path: captions were changed, or records reordered"
        elif self.tensors != before.tensors:
            yield "data.path: latents, images or trajectories were changed"
        for role in sorted(self.weights.keys() & before.weights.keys()):
            if self.weights[role] != before.weights[role]:
                yield f"{role}: the weights that it begins with were exchanged"


def fingerprint(run: Run, inputs: Inputs) -> Fingerprint:
    """That of a run's data, and of the weights that its roles begin with."""
    data = inputs.dataset
    return Fingerprint(
        records=len(data),
        captions=_digest(_captions(data)),
        tensors=_digest(_tensors(data)),
        weights={role: _begins(run, role) for role in run.models},
    )


def _begins(run: Run, role: str) -> str:
    """A hash of the weights that a role begins with, its adapters included."""
    if run.random_init(role):
        return "random"
    adapters = (file.factors[layer] for file in adapter_files(run, role) for layer in file.factors)
    return _digest(chain(_rows(run.weights(role)), (_bytes(t) for pair in adapters for t in pair)))


def _captions(data: Dataset) -> Iterator[bytes]:
    """Every caption; one that is damaged is told, and is another than it was."""
    damaged = []
    for index, caption in enumerate(captions(data)):
        if caption is None:
            damaged.append(index)
        yield DAMAGED if caption is None else caption.encode() + b"\0"
    if damaged:
        more = ", ..." if len(damaged) > SHOWN else ""
        log.warning(
            "data.path: the captions of %d records are damaged: %s%s; training skips them",
            len(damaged), ", ".join(map(str, damaged[:SHOWN])), more,
        )  # fmt: skip


def _tensors(data: Dataset) -> Iterator[bytes]:
    """The tensors of some records; what is damaged is told."""
    count = min(SAMPLED_RECORDS, len(data))
    for i in range(count):
        index = i * (len(data) - 1) // max(1, count - 1)
        try:
            item = data[index]
        except DamagedRecordError as error:
            log.warning("data.path: record %d is damaged: %s; training skips it", index, error)
            yield DAMAGED
            continue
        for tensor in (item.latents, item.trajectory, item.image):
            if tensor is not None:
                yield _bytes(tensor)


def _rows(weights: Weights) -> Iterator[bytes]:
    for name, shape in sorted(weights.shapes().items()):
        yield f"{name} {shape}".encode()
        yield _bytes(weights.read(name, slice(0, ROWS)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
