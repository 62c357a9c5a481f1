"""Adapters outside of training: merged, extracted from two models, written for other tools."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.families.base import Model
from model.folders.adapter_extraction import Extraction, Wanted, extract
from model.folders.adapter_files import AdapterFile, side_and_layer
from model.folders.adapter_words import Merged, Rounded
from model.folders.adapter_writing import check_layout, check_place, file_names, write_adapter
from model.wan.adapter_names import Layout
from trainer.model_card import CARD, Exported, texts
from trainer.student_facts import Facts, known_facts, record_beside
from trainer.velocities import Input, fixed_inputs, relative, velocities
from utils.config import ConfigError
from utils.files import write_text
from utils.weights import Weights

log = logging.getLogger(__name__)

SHOWN = 5  # layers in the log of an extraction; the record has all


@dataclass(frozen=True)
class Target:
    """Where an adapter goes, and how."""

    path: Path  # a .safetensors file, or a new folder
    layout: Layout
    dtype: torch.dtype = torch.float32
    overwrite: bool = False

    def check(self) -> None:
        """Raise UserError if nothing may be written there. Cheap."""
        check_place(self.path)
        if self.path.is_file() and not self.overwrite:
            raise ConfigError(
                f"--output_path {self.path}: is there already; give another name, or add "
                f"--overwrite to replace it"
            )


def facts_of(adapter: AdapterFile, given: Facts | None) -> Facts | None:
    """How a student is sampled: as `given`, else as what it was read from says."""
    found = given or known_facts(adapter.path, adapter.metadata)
    if found is None:
        log.warning(
            "%s: does not say how it is sampled, so no model card is written; "
            "give the run's configuration with --config_path",
            adapter.path,
        )
    return found


def export(
    adapter: AdapterFile,
    target: Target,
    facts: Facts | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter and what tells of it. more: figures for its record."""
    folder = target.path.suffix == ""
    if (
        folder
        and facts is not None
        and facts.expert
        and not side_and_layer(next(iter(adapter.factors)))[0]
    ):
        adapter = adapter.of_expert(facts.expert)  # the file's name tells which
    check_layout(adapter, target.path, target.layout)
    rank = max(pair.rank for pair in adapter.factors.values())
    kept = {} if facts is None else facts.header() | {"rank": str(rank)}
    names, dtype = file_names(target.path, adapter.factors), str(target.dtype).split(".")[-1]
    what = Exported("adapter", names, target.layout, dtype, rank, more or {})
    told = {} if facts is None else texts(facts, what)
    written = write_adapter(
        target.path, adapter.factors, layout=target.layout, dtype=target.dtype,
        metadata=kept or _kept(adapter), texts=told if folder else {},
    )  # fmt: skip
    if not folder:
        write_beside(target.path, told)
    count = sum(pair.a.numel() + pair.b.numel() for pair in adapter.factors.values())
    log.info("%s: %d layers, %d parameters", target.path, len(adapter.factors), count)
    if target.dtype != torch.float32:
        errors = sorted(written.errors.values())
        log.info(
            "%s: each product b a moved by %.3f %% of itself (median), %.3f %% (worst)",
            str(target.dtype).removeprefix("torch."),
            100 * statistics.median(errors),
            100 * errors[-1],
        )


def _kept(adapter: AdapterFile) -> dict[str, str]:
    """What a foreign header said that is still true."""
    return {k: v for k, v in adapter.metadata.items() if not k.startswith(("lora_adapter", "ss_"))}


def write_beside(file: Path, told: Mapping[str, str]) -> None:
    """Write a card and a record beside a file, under names that begin with the file's."""
    for name, text in told.items():
        write_text(
            file.with_name(f"{file.stem}.{name}") if name == CARD else record_beside(file), text
        )


# ---- extracting


def extract_to(
    student: Weights,
    base: Weights,
    wanted: Wanted,
    target: Target,
    *,
    facts: Facts | None,
    model: Model | None,
    samples: int,
) -> None:
    """Write what `student` has more than `base` as an adapter, and how good it is.

    model: of the base; None = no network is run. samples: inputs that networks are compared on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = extract(student, base, wanted, device=device, layout=target.layout)
    tell(found)
    report = found.report()
    if model is not None and samples:
        inputs = fixed_inputs(model, samples, () if facts is None else facts.sigmas)
        report["samples"] = compare(model, student, base, found.adapter, inputs, device)
    export(found.adapter, target, facts, {"extraction": report})


def tell(found: Extraction) -> None:
    """Log how far an extracted adapter is from what it was extracted from."""
    ranked = sorted(found.layers.items(), key=lambda item: item[1].error, reverse=True)
    for name, layer in ranked[:SHOWN]:
        log.info("%s: rank %d misses %.2f %% of its change", name, layer.rank, 100 * layer.error)
    log.info(
        "%d layers: %.2f %% of the change missed in all (median %.2f %%, the worst are above)",
        len(ranked),
        100 * found.error,
        100 * statistics.median(layer.error for _, layer in ranked),
    )
    log.info(
        "%.2f %% of the whole change lies in weights that no such adapter holds (norms, biases, "
        "modulation, ...)",
        100 * found.share_beside,
    )


def compare(
    model: Model,
    student: Weights,
    base: Weights,
    adapter: AdapterFile,
    inputs: Sequence[Input],
    device: torch.device,
) -> dict[str, float]:
    """How far base and adapter are from the student on `inputs`; also logged."""
    wanted = velocities(model, student, inputs, device, what="the student")
    plain = velocities(model, base, inputs, device, what="the base")
    made = velocities(model, Merged(base, [adapter]), inputs, device, what="base and adapter")
    missed = relative(made, wanted, plain)
    error = float((made - wanted).norm() / wanted.norm())
    log.info(
        "on %d inputs: velocities differ from the student's by %.3f %%, which is %.2f %% of what "
        "the student changed",
        len(inputs),
        100 * error,
        100 * missed,
    )
    return {"count": len(inputs), "error": error, "missed": missed}


# ---- merging


def tell_rounding(merged: Merged, dtype: torch.dtype) -> dict[str, float]:
    """Log what rounding took of each change while `merged` was read; returns median and worst."""
    if not merged.lost:
        return {}
    name, worst = max(merged.lost.items(), key=lambda item: item[1])
    median = statistics.median(merged.lost.values())
    log.warning(
        "%s takes %.1f %% of a matrix's change (median), %.1f %% of %s (worst); fp32 keeps all",
        str(dtype).removeprefix("torch."),
        100 * median,
        100 * worst,
        name,
    )
    return {"median": median, "worst": worst}


def tell_rounded_pass(
    model: Model, base: Weights, adapters: Sequence[AdapterFile], dtype: torch.dtype, samples: int
) -> float:
    """Log what rounding takes of what adapters change in `samples` forward passes; returns it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, exact = fixed_inputs(model, samples), Merged(base, adapters)
    plain = velocities(model, base, inputs, device, what="the base")
    wanted = velocities(model, exact, inputs, device, what="the merged weights")
    made = velocities(model, Rounded(exact, dtype), inputs, device, what="the rounded weights")
    lost = relative(made, wanted, plain)
    log.warning("on %d inputs: %.1f %% of what the adapters change is lost", samples, 100 * lost)
    return lost
