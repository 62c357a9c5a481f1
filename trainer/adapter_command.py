"""What convert_checkpoint.py does with adapters: its words, and what they mean together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from model.families.base import Model
from model.families.registry import identify_weights, open_model, recognised
from model.folders.adapter_extraction import Wanted
from model.folders.adapter_files import AdapterFile, read_adapter, read_header, refuse_heads
from model.folders.adapter_words import FORM, Merged, adapter_word, read_adapters
from model.wan.adapter_names import LAYOUTS
from trainer.adapting import (
    Target,
    export,
    extract_to,
    facts_of,
    tell_rounded_pass,
    tell_rounding,
)
from trainer.config import load
from trainer.student_facts import Facts, facts_of_run, known_facts
from utils.config import ConfigError
from utils.weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_RANK = 64


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """The words about adapters."""
    add = parser.add_argument_group("adapters (docs/lora.md)").add_argument
    add(
        "--adapter", action="append", default=[], metavar=FORM,
        help="merge it into the weights, which are fp32 then unless --dtype says otherwise; a file "
        "or a run that trained one (its average); repeatable; for an expert: high=PATH, low=PATH",
    )  # fmt: skip
    add(
        "--adapter_layout", choices=LAYOUTS, default=None,
        help="write the input, an adapter or a run that trained one, as other tools read it: a "
        ".safetensors file, or a folder with a model card",
    )  # fmt: skip
    add(
        "--extract_from", type=Path, default=None, metavar="BASE",
        help="write what the input has more than this base as an adapter (of diffusers' layout, "
        "unless --adapter_layout says otherwise)",
    )  # fmt: skip
    add("--rank", type=int, default=None, help=f"of an extracted adapter; default: {DEFAULT_RANK}")
    add("--max_error", type=float, default=None, help="of each of its layers, in place of a rank")
    add(
        "--samples", type=int, default=4,
        help="random inputs that networks are compared on; 0 = load none (default: %(default)s)",
    )  # fmt: skip


def writes_adapter(args: argparse.Namespace) -> bool:
    """Whether an adapter is asked for, and no network."""
    return args.adapter_layout is not None or args.extract_from is not None


def check_adapter_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for words about adapters that do not go together."""
    if args.samples < 0:
        raise ConfigError(f"--samples: must be at least 0, got {args.samples}")
    if args.extract_from is None:
        for name in ("rank", "max_error"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} is of an extracted adapter: add --extract_from BASE")
    if not writes_adapter(args):
        return
    flag = "--adapter_layout" if args.extract_from is None else "--extract_from"
    if args.adapter:
        raise ConfigError(
            f"--adapter merges into a network, and {flag} writes an adapter; leave one of them out"
        )
    for name in ("layout", "naming"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} is of a network, and {flag} writes an adapter")
    if args.dtype == "float16":
        raise ConfigError("--dtype float16: adapters are written in float32 or bfloat16")


def write_adapter(args: argparse.Namespace) -> None:
    """Write the adapter that is asked for. Raises UserError."""
    dtype = DTYPES[args.dtype or "float32"]
    layout = args.adapter_layout or LAYOUTS[0]
    target = Target(args.output_path, layout, dtype, args.overwrite)
    target.check()
    if args.extract_from is None:
        write_read(args, target)
    else:
        write_extracted(args, target)


def stored_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Of the weights that are written; None = as stored. Rounding takes most of a small change."""
    return DTYPES.get(args.dtype, torch.float32 if args.adapter else None)


def merged_adapters(args: argparse.Namespace, base: Weights) -> list[AdapterFile]:
    """What --adapter adds to `base`. Raises WeightsError for what does not fit."""
    words = [adapter_word(word) for word in args.adapter]
    return [adapter for _, adapter in read_adapters(words, base, what=str(base.path))]


def student_facts(args: argparse.Namespace, weights: Weights) -> Facts | None:
    """How what is written is sampled, by the run, the adapter or the folder that it comes from."""
    if args.config_path is not None:
        return facts_of_run(load(args.config_path))
    if args.weights == "critic":
        return None
    for word in args.adapter:
        path = adapter_word(word).read().path
        found = known_facts(path, read_header(path))
        if found is not None:
            return found
    return known_facts(args.input_path, {}) or known_facts(weights.path, {})


def tell_losses(
    args: argparse.Namespace,
    base: Weights,
    written: Weights,
    adapters: Sequence[AdapterFile],
    model: Model | None = None,
) -> dict[str, object]:
    """Log what rounding took of what adapters change; returns it."""
    dtype = stored_dtype(args)
    if not isinstance(written, Merged) or dtype is None or dtype == torch.float32:
        return {}
    lost: dict[str, object] = {**tell_rounding(written, dtype)}
    model = model or folder_model(args.model_folder, args.input_path)
    if model is not None and args.samples:
        lost["samples"] = tell_rounded_pass(model, base, adapters, dtype, args.samples)
    return {"rounding": lost}


def folder_model(*paths: Path | None) -> Model | None:
    """The model in the first of `paths` that is a model folder."""
    return next((open_model(p) for p in paths if p is not None and recognised(p)), None)


def write_extracted(args: argparse.Namespace, target: Target) -> None:
    """Write what the input has more than --extract_from."""
    model = folder_model(args.extract_from, args.model_folder)
    averaged = args.weights == "ema"
    if model is not None:
        where = None if recognised(args.extract_from) else args.extract_from
        base = model.find_weights(where)
        student = model.find_weights(args.input_path, averaged=averaged)
    else:
        _, base = identify_weights(args.extract_from)
        _, student = identify_weights(args.input_path, averaged=averaged)
    rank = DEFAULT_RANK if args.rank is None and args.max_error is None else args.rank
    facts = student_facts(args, student)
    wanted = Wanted(rank, args.max_error)
    extract_to(student, base, wanted, target, facts=facts, model=model, samples=args.samples)


def write_read(args: argparse.Namespace, target: Target) -> None:
    """Write the input, an adapter, in another layout."""
    role = "critic" if args.weights == "critic" else "generator"
    averaged = args.weights == "ema" or None if args.input_path.is_file() else args.weights == "ema"
    adapter = read_adapter(args.input_path, role=role, averaged=averaged)
    refuse_heads(
        adapter,
        why="and no file of an adapter has a place for them; merge it: convert_checkpoint.py "
        f"--input_path BASE --adapter {args.input_path} --output_path OUT.safetensors",
    )
    given = None if args.config_path is None else facts_of_run(load(args.config_path))
    export(adapter, target, None if role == "critic" else facts_of(adapter, given))
