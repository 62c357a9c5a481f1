"""Turn a training checkpoint into one weight file with official names."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.loading import find_weights
from utils.cli import USER_ERRORS, fail, start_logging
from utils.weights import WeightsError, write_weights

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command line of convert_checkpoint.py."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument(
        "--input_path", type=Path, required=True, help="log directory, checkpoint or weight file"
    )
    result.add_argument("--output_path", type=Path, required=True, help=".safetensors or .pt")
    result.add_argument("--use_ema", "--ema", action="store_true", help="the averaged weights")
    result.add_argument("--dtype", choices=DTYPES, default=None, help="default: as stored")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    args = parser().parse_args(arguments)
    start_logging()
    try:
        if args.output_path.suffix not in (".safetensors", ".pt"):
            raise WeightsError(f"--output_path {args.output_path}: must end in .safetensors or .pt")
        weights = find_weights(args.input_path, averaged=args.use_ema)
        tensors = {name: weights.read(name) for name in sorted(weights.shapes())}
        if args.dtype is not None:
            tensors = {name: value.to(DTYPES[args.dtype]) for name, value in tensors.items()}
        source = {"source": str(weights.path), "weights": "ema" if args.use_ema else "generator"}
        write_weights(tensors, args.output_path, source)
    except USER_ERRORS as error:
        return fail(error)
    count = sum(value.numel() for value in tensors.values())
    log.info("%s: %d tensors, %d parameters", args.output_path, len(tensors), count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
