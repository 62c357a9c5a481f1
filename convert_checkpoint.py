"""Turn a checkpoint or weight file into a weight file, a model folder or an adapter (LoRA)."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from utils import start

if __name__ == "__main__":  # before torch is imported
    start.begin()

import torch
from torch import Tensor
from tqdm import tqdm

from model.families.base import Export, Model
from model.families.registry import (
    identify_weights,
    known_families,
    open_model,
    recognised,
)
from model.folders.adapter_words import Merged
from model.folders.writing import write_stream
from trainer.adapter_command import (
    DTYPES,
    add_adapter_flags,
    check_adapter_arguments,
    merged_adapters,
    stored_dtype,
    student_facts,
    tell_losses,
    write_adapter,
    writes_adapter,
)
from trainer.adapting import write_beside
from trainer.fusing import check_naming, fused_student, with_heads
from trainer.model_card import Exported, texts
from utils.cli import USER_ERRORS, command_parser, fail, start_logging
from utils.config import ConfigError
from utils.files import replaced_atomically
from utils.weights import Weights, write_weights

log = logging.getLogger(__name__)

FILES = (".safetensors", ".pt")


def parser() -> argparse.ArgumentParser:
    """The command line of convert_checkpoint.py."""
    families = known_families()[::-1]  # the usual words first
    layouts = list(dict.fromkeys(word for family in families for word in family.layouts))
    namings = list(dict.fromkeys(word for family in families for word in family.namings))
    result = command_parser(__doc__)
    result.add_argument(
        "--input_path", "--input-checkpoint", type=Path, required=True,
        help="log directory, training checkpoint, weight file or model folder",
    )  # fmt: skip
    result.add_argument(
        "--output_path", "--output-checkpoint", type=Path, required=True,
        help="a .safetensors or .pt file; with --layout, a folder",
    )  # fmt: skip
    result.add_argument(
        "--overwrite", action="store_true", help="replace --output_path if it is a file already"
    )
    result.add_argument("--weights", choices=("generator", "ema", "critic"), default=None)
    result.add_argument(
        "--use_ema", "--ema", action="store_true", help="the averaged weights, as --weights ema"
    )
    result.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of the transformer; default: as stored"
    )
    result.add_argument("--to-bf16", dest="dtype", action="store_const", const="bfloat16")
    result.add_argument(
        "--naming", choices=namings, default=None,
        help="of the weights in a single file; default: official",
    )  # fmt: skip
    result.add_argument(
        "--layout", choices=layouts, default=None, help="write a complete model folder of this kind"
    )
    result.add_argument(
        "--model_folder", type=Path, default=None,
        help="gives a folder its sizes, VAE and encoders; default: the input, if it is one",
    )  # fmt: skip
    result.add_argument(
        "--fuse_steps", type=int, default=None,
        help="of a student of method pdd: in how many steps it is sampled, one of its run's "
        "loss.calls; default: as many as its run's denoising_step_list has",
    )  # fmt: skip
    result.add_argument("--max_shard_gb", type=float, default=5.0, help="per file of a folder")
    result.add_argument(
        "--remove-prefix", default="model.", help="of the reference's tool; always removed"
    )
    result.add_argument(
        "--config_path", type=Path, default=None,
        help="the run's YAML file, for the model card of weights that do not tell of their run",
    )  # fmt: skip
    add_adapter_flags(result)
    return result


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the kind of weights decided. Raises ConfigError if two are named."""
    if args.use_ema and args.weights == "critic":
        raise ConfigError(
            "--use_ema: only the generator has an average, and --weights critic asks for the "
            "critic; leave one of them out"
        )
    kind = "ema" if args.use_ema else args.weights or "generator"
    return argparse.Namespace(**{**vars(args), "weights": kind})


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for words that do not go together."""
    if args.remove_prefix != "model.":
        raise ConfigError(
            f"--remove-prefix {args.remove_prefix}: only 'model.' and the segments of FSDP, "
            f"checkpoint and compile wrappers are removed, and they always are; leave the flag out"
        )
    check_adapter_arguments(args)
    if writes_adapter(args):
        return
    if args.layout is None:
        check_file_arguments(args)
        return
    if args.output_path.suffix in FILES:
        raise ConfigError(f"--output_path {args.output_path}: with --layout, give a folder's name")
    if args.overwrite:
        raise ConfigError(
            "--overwrite is of a single file; a model folder is written to a new or an empty one"
        )
    if args.naming is not None:
        raise ConfigError("--naming is of a single file; in a folder --layout decides the names")
    if not args.max_shard_gb > 0:
        raise ConfigError(f"--max_shard_gb: must be above 0, got {args.max_shard_gb}")


def check_file_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for words that do not go with a single file."""
    if args.output_path.suffix not in FILES:
        raise ConfigError(
            f"--output_path {args.output_path}: must end in .safetensors or .pt; for a model "
            f"folder add --layout official or --layout diffusers"
        )
    if args.model_folder is not None and not args.adapter:
        raise ConfigError("--model_folder is for a model folder: add --layout")
    if args.naming == "reference" and args.output_path.suffix != ".pt":
        raise ConfigError(
            f"--output_path {args.output_path}: --naming reference is a .pt file's, whose "
            f"dictionaries a .safetensors file cannot hold"
        )
    check_output(args)


def check_output(args: argparse.Namespace) -> None:
    """Raise ConfigError if the file to write would replace something unasked."""
    path: Path = args.output_path
    if path.is_dir():
        raise ConfigError(f"--output_path {path}: is a folder; give the name of a file in it")
    if path.exists() and not args.overwrite:
        own = " and the input itself" if path.resolve() == args.input_path.resolve() else ""
        raise ConfigError(
            f"--output_path {path}: is there already{own}; give another name, or add --overwrite "
            f"to replace it"
        )


def write_file(args: argparse.Namespace, family: type[Model], weights: Weights) -> None:
    """Write one weight file. Raises ConfigError for names that its family does not have."""
    naming = args.naming or family.namings[0]
    if naming not in family.namings:
        raise ConfigError(
            f"--naming {naming}: the weights are of {family.family}, whose names can be "
            f"{', '.join(family.namings)}"
        )
    facts = student_facts(args, weights)
    source, adapters = weights, merged_adapters(args, weights)
    dtype = stored_dtype(args)
    if adapters:
        weights = Merged(source, adapters, rounding=dtype)
    plain = weights
    weights, facts = fused_student(with_heads(weights, adapters), facts, args.fuse_steps)
    check_naming(weights, [naming])
    tensors = read_in_turn(weights, dtype, lambda name: family.renamed(name, naming))
    told = {"source": str(weights.path), "weights": args.weights}
    if args.naming == "reference":
        write_reference(dict(tensors), args.output_path, args.weights)
    elif args.output_path.suffix == FILES[0] and dtype is not None:
        shapes = {family.renamed(n, naming): shape for n, shape in weights.shapes().items()}
        write_stream(tensors, shapes, dtype, args.output_path, told)
    else:
        write_weights(dict(tensors), args.output_path, told)
    count = sum(map(math.prod, weights.shapes().values()))
    log.info("%s: %d tensors, %d parameters", args.output_path, len(weights.shapes()), count)
    more = tell_losses(args, source, plain, adapters)
    if facts is not None:
        what = Exported(
            "model", [args.output_path.name], naming, args.dtype or "as stored", None, more
        )
        write_beside(args.output_path, texts(facts, what))


def read_in_turn(
    weights: Weights, dtype: torch.dtype | None, renamed: Callable[[str], str]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors under new names, sorted by their old ones; one at a time."""
    for name in tqdm(sorted(weights.shapes()), desc="converting", unit="tensor"):
        value = weights.read(name)
        yield renamed(name), value if dtype is None else value.to(dtype)


def write_reference(tensors: dict[str, Tensor], path: Path, kind: str) -> None:
    """Write a .pt file as Self-Forcing does: a dictionary per network, names with `model.`."""
    group = {"generator": "generator", "ema": "generator_ema", "critic": "critic"}[kind]
    named = {f"model.{name}": value.contiguous() for name, value in tensors.items()}
    with replaced_atomically(path) as part:
        torch.save({group: named}, part)


def write_folder(args: argparse.Namespace, model: Model, weights: Weights) -> None:
    """Write a model folder."""
    facts = student_facts(args, weights)
    source, adapters = weights, merged_adapters(args, weights)
    dtype, max_bytes = stored_dtype(args), int(args.max_shard_gb * 1e9)
    if adapters:
        weights = Merged(source, adapters, rounding=dtype)
    plain = weights
    weights, facts = fused_student(with_heads(weights, adapters), facts, args.fuse_steps)
    check_naming(weights, [args.layout])
    export = Export(weights, args.layout, dtype, max_bytes)
    if facts is not None:
        what = Exported("model", [], args.layout, args.dtype or "as stored")
        export = replace(
            export, shift=facts.shift, boundary=facts.boundary, texts=texts(facts, what)
        )
    model.export(export, args.output_path)
    log.info("%s: a complete model folder, %s layout", args.output_path, args.layout)
    tell_losses(args, source, plain, adapters, model)


def source_model(args: argparse.Namespace) -> Model:
    """Where a new folder's sizes, VAE and encoders come from. Raises ConfigError."""
    path = args.model_folder
    if path is None:
        path = args.input_path
        if not recognised(path):
            raise ConfigError(
                f"--layout {args.layout}: {path} is no model folder; say with --model_folder where "
                f"the sizes, the VAE and the encoders come from"
            )
    elif not path.is_dir():
        raise ConfigError(f"--model_folder {path}: no such folder")
    model = open_model(path)
    if args.layout not in model.layouts:
        raise ConfigError(
            f"--layout {args.layout}: {path} is of {model.family}, whose folders can be "
            f"{', '.join(model.layouts)}"
        )
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    args = parser().parse_args(arguments)
    start_logging()
    try:
        args = complete(args)
        check_arguments(args)
        role = "critic" if args.weights == "critic" else "generator"
        averaged = args.weights == "ema"
        if writes_adapter(args):
            write_adapter(args)
        elif args.layout is None:
            write_file(args, *identify_weights(args.input_path, role=role, averaged=averaged))
        else:
            model = source_model(args)
            weights = model.find_weights(args.input_path, role=role, averaged=averaged)
            write_folder(args, model, weights)
    except USER_ERRORS as error:
        return fail(error)
    except KeyboardInterrupt:
        log.warning("stopped; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
