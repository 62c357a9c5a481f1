"""Encode all prompts that a run needs, once: with `data.text_embeddings`, no run loads the encoder.

The prompts are those of the configuration's data, its negative prompt and its validation prompts,
and those of --prompt_path. Each is encoded alone, as training does it, so the states are the same
to the bit. Any number of processes (torchrun) stores the same; what is stored already is left as it
is, so an interrupted call continues, and a later one adds prompts.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

from torch import Tensor
from tqdm import tqdm

from model.encoders.text import TextEncoder
from model.families.base import Model
from model.families.registry import check_model, find_model
from trainer.config import Config, compute_dtype, generator_model, load
from trainer.inputs import needed_prompts
from utils import start
from utils.claims import Claim
from utils.cli import USER_ERRORS, command_parser, fail, interruptible, start_logging
from utils.data.dataset import open_dataset
from utils.data.embeddings import (
    EmbeddingManifest,
    EmbeddingReader,
    EmbeddingWriter,
    by_shard,
)
from utils.distributed import Session, distributed_session
from utils.hashes import content_hash
from utils.records import MANIFEST

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "data/embeddings"
GROUP = 16  # prompts written at a time; a killed process loses at most so many


def parser() -> argparse.ArgumentParser:
    """The command line of precompute_prompts.py."""
    result = command_parser(__doc__)
    result.add_argument("--config_path", type=Path, required=True, help="the run's YAML file")
    result.add_argument(
        "--output_path", type=Path, default=None,
        help=f"default: data.text_embeddings of the configuration, or {DEFAULT_FOLDER}",
    )  # fmt: skip
    result.add_argument(
        "--prompt_path", type=Path, action="append", default=[],
        help="more prompts, as data.path of training; may be given several times",
    )  # fmt: skip
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def all_prompts(config: Config, more: Sequence[Path]) -> list[str]:
    """What a run with this configuration encodes, and the prompts of further files or folders."""
    prompts = needed_prompts(config, open_dataset(Path(config.data.path)))
    for dataset in map(open_dataset, more):
        prompts += [dataset.prompt(i) for i in range(len(dataset))]
    return prompts


def describe(config: Config, model: Model) -> EmbeddingManifest:
    """What the states depend on; reads the encoder's weights to tell them from others."""
    text, parts = model.text, model.parts
    return EmbeddingManifest(
        text_len=text.length,
        text_dim=text.width,
        dtype=str(compute_dtype(config)).removeprefix("torch."),
        encoder=content_hash(parts["text_encoder"]),
        tokenizer=content_hash(parts["tokenizer"]) if "tokenizer" in parts else "none",
    )


def claim(folder: Path, manifest: EmbeddingManifest) -> Claim:
    """What makes a folder a store of such states."""
    return Claim(
        folder, asdict(manifest), holds="text embeddings", flag="--output_path", file=MANIFEST,
        results="**/data.mdb",
    )  # fmt: skip


def encode(encoder: TextEncoder, prompt: str) -> Tensor:
    """The states of one prompt, [text_len, text_dim]."""
    states: Tensor = encoder([prompt])
    return states[0].cpu()


def run(prompts: Sequence[str], folder: Path, encoder: TextEncoder, session: Session) -> None:
    """Encode and store this process's share of prompts that are not stored yet."""
    shards = by_shard(prompts)
    mine = sorted(shards)[session.rank :: session.world_size]
    total = sum(len(shards[name]) for name in mine)
    with tqdm(total=total, desc="prompts", disable=not session.is_main) as bar:
        for name in mine:
            with EmbeddingWriter(folder / name) as writer:
                for first in range(0, len(shards[name]), GROUP):
                    states = {}
                    for prompt in shards[name][first : first + GROUP]:
                        states[prompt] = encode(encoder, prompt)
                        bar.update()
                    writer.put(states)


def report(
    needed: Sequence[str], added: Sequence[str], folder: Path, encoder: TextEncoder | None
) -> None:
    """Log the counts. encoder: None if nothing was added."""
    cut = [] if encoder is None else [encoder.tokens_cut(prompt) for prompt in added]
    distinct = len(set(needed))
    log.info(
        "%d prompts, %d of them duplicates; %d were in %s, %d are added by all processes together, "
        "of which %d were cut, by %d tokens in all",
        len(needed), len(needed) - distinct, distinct - len(added), folder, len(added),
        sum(tokens > 0 for tokens in cut), sum(cut),
    )  # fmt: skip


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Store what is missing; returns the exit status."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    try:
        config = load(args.config_path, args.overrides)
        folder = args.output_path or Path(config.data.text_embeddings or DEFAULT_FOLDER)
        model = find_model(Path(config.model_root), generator_model(config))
        check_model(model, weights=False)
        needed = all_prompts(config, args.prompt_path)
    except USER_ERRORS as error:
        return fail(error)
    with distributed_session(timeout_s=config.timeout_s) as session:
        start_logging(main_rank=session.is_main)
        try:
            read = model.parts["text_encoder"]
            log.info("reading %s to tell this text encoder from others", read)
            manifest = describe(config, model)
            claim(folder, manifest).take(session)
            with EmbeddingReader(folder) as reader:
                missing = reader.missing(needed)
            session.barrier()  # nobody reads any more
            encoder = None
            if missing:
                encoder = model.load_text_encoder(compute_dtype(config))
                encoder.to(session.device)
        except USER_ERRORS as error:
            return fail(error)
        if encoder is not None:
            try:
                with session.uneven_work():
                    run(missing, folder, encoder, session)
            except USER_ERRORS as error:
                return fail(error)
        if session.is_main:
            report(needed, missing, folder, encoder)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
