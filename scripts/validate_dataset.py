"""Read every record of a dataset and tell what it holds and what is damaged.

Takes what `data.path` of a training run takes: a folder of LMDB shards, a prompt file, or a folder
of .txt files. Exit status: 0 all is well, 1 something is damaged, 2 no record can be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

from torch import Tensor
from tqdm import tqdm

from utils import start
from utils.cli import USER_ERRORS, check_at_least, command_parser, fail, interruptible
from utils.data.dataset import open_dataset
from utils.data.shards import Shard, check_kinds, shard_paths
from utils.files import write_text


def parser() -> argparse.ArgumentParser:
    """The command line of validate_dataset.py."""
    result = command_parser(__doc__)
    result.add_argument("--data_path", type=Path, required=True, help="as data.path of training")
    result.add_argument("--json", type=Path, default=None, help="write all findings there as well")
    result.add_argument("--listed", type=int, default=20, help="damaged records that are printed")
    return result


@dataclass
class Findings:
    """What a dataset holds. `damaged` has one sentence per broken shard or record part."""

    records: int = 0
    shards: int = 0
    shapes: Counter[str] = field(default_factory=Counter)  # records by what they hold
    lengths: list[int] = field(default_factory=list)  # of prompts, in characters
    distinct: set[bytes] = field(default_factory=set)  # hashes of prompts
    damaged: list[str] = field(default_factory=list)

    def add_prompt(self, prompt: str) -> None:
        """Count one prompt."""
        self.lengths.append(len(prompt))
        self.distinct.add(hashlib.blake2b(prompt.encode(), digest_size=16).digest())

    def table(self) -> list[tuple[str, str]]:
        """What was found, as names and values."""
        lengths = self.lengths or [0]
        middle = f"{statistics.median(lengths):g}"
        return [
            ("shards", str(self.shards)),
            ("records", str(self.records)),
            *((shape, str(count)) for shape, count in sorted(self.shapes.items())),
            ("prompt characters", f"{min(lengths)} to {max(lengths)}, median {middle}"),
            ("repeated prompts", str(len(self.lengths) - len(self.distinct))),
            ("damaged", str(len(self.damaged))),
        ]


def check_shards(paths: Sequence[Path]) -> Findings:
    """Read every record of all shards; a shard that cannot be opened does not hide the others."""
    found, shards = Findings(), []
    for path in paths:
        try:
            shards.append(Shard(path))
        except ValueError as error:
            found.damaged.append(str(error))
    found.shards = len(shards)
    filled = [shard for shard in shards if shard.rows]
    try:
        check_kinds(filled)
    except ValueError as error:
        found.damaged.append(str(error))
    with tqdm(total=sum(shard.rows for shard in filled), desc="records") as bar:
        for shard in filled:
            for row in range(shard.rows):
                check_record(shard, row, found)
                bar.update()
    return found


def check_record(shard: Shard, row: int, found: Findings) -> None:
    """Read all that one record holds."""
    found.records += 1
    found.shapes[describe(shard)] += 1
    readers: dict[str, Callable[[int], Tensor]] = {
        "latents": shard.latents,
        "trajectories": shard.trajectory,
        "images": shard.image,
    }
    try:
        prompt = shard.prompt(row)
        found.add_prompt(prompt)
        if not prompt.strip():
            found.damaged.append(f"{shard.path}: 'prompts_{row}_data' is an empty prompt")
    except ValueError as error:
        found.damaged.append(str(error))
    for kind in shard.kinds:
        try:
            values = readers[kind](row)
        except ValueError as error:
            found.damaged.append(str(error))
            continue
        if not bool(values.isfinite().all()):
            found.damaged.append(f"{shard.path}: '{kind}_{row}_data' holds values not finite")


def describe(shard: Shard) -> str:
    """What each record of a shard holds, in words."""
    words = [f"{kind} {' x '.join(map(str, shape))}" for kind, shape in shard.shapes.items()]
    return ", ".join(words) or "prompts alone"


def check_prompts(path: Path) -> Findings:
    """Count the prompts of a file or a folder. Raises ValueError or OSError if it is damaged."""
    dataset = open_dataset(path)
    found = Findings(records=len(dataset))
    found.shapes["prompts alone"] = len(dataset)
    for index in range(len(dataset)):
        found.add_prompt(dataset.prompt(index))
    return found


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Check a dataset; returns the exit status."""
    args = parser().parse_args(arguments)
    paths = shard_paths(args.data_path)
    try:
        check_at_least(args, listed=0)
        found = check_shards(paths) if paths else check_prompts(args.data_path)
        if args.json is not None:
            report = {"summary": dict(found.table()), "damaged": found.damaged}
            write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    except USER_ERRORS as error:
        return fail(error)
    width = max(len(name) for name, _ in found.table())
    for name, value in found.table():
        print(f"{name:{width}}  {value}")
    for sentence in found.damaged[: args.listed]:
        print(f"damaged: {sentence}")
    if len(found.damaged) > args.listed:
        print(f"and {len(found.damaged) - args.listed} more; --json lists all")
    return 2 if not found.records else 1 if found.damaged else 0


if __name__ == "__main__":
    sys.exit(start.run(main))
