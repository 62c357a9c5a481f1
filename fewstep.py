"""The installed commands, by name. Each begins before its own imports, which take seconds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from utils import start

COMMANDS = {
    "fewstep-train": "train",
    "fewstep-inference": "inference",
    "fewstep-demo": "demo",
    "fewstep-convert": "convert_checkpoint",
    "fewstep-make-tiny-world": "scripts.make_tiny_world",
    "fewstep-compute-vae-latent": "scripts.compute_vae_latent",
    "fewstep-create-lmdb-14b-shards": "scripts.create_lmdb_14b_shards",
    "fewstep-validate-dataset": "scripts.validate_dataset",
    "fewstep-precompute-prompts": "scripts.precompute_prompts",
    "fewstep-generate-ode-pairs": "scripts.generate_ode_pairs",
    "fewstep-evaluate": "scripts.evaluate",
    "fewstep-report": "scripts.report",
    "fewstep-compare-methods": "scripts.compare_methods",
    "fewstep-compare-adapters": "scripts.compare_adapters",
    "fewstep-benchmark": "scripts.benchmark",
    "fewstep-benchmark-rollout": "scripts.benchmark_rollout",
    "fewstep-benchmark-saving": "scripts.benchmark_saving",
    "fewstep-benchmark-threads": "scripts.benchmark_threads",
}


def main() -> int:
    """Run the command under whose name this process was started; returns the exit status."""
    start.begin()
    command = importlib.import_module(COMMANDS[Path(sys.argv[0]).stem])
    return start.run(command.main)
