"""Train one student per method from the same tiny-world teacher; one table and one page of clips.

Every stage is a command of this repository that continues where it was interrupted, so this does
too. Writes rows.json, table.md, methods.html, methods.png and the log directories of all runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.generator import VideoGenerator
from pipeline.request import Request
from scripts.evaluate import LEAST_CLIPS, fingerprint, markdown, sample
from scripts.report import ROWS, methods_page
from trainer.config import Config, load
from trainer.serving import check_source, load_generator
from utils import start
from utils.claims import Claim
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.config import ConfigError
from utils.files import write_text
from utils.media.video import contact_sheet, save_mp4, save_png
from utils.metrics import read_metrics
from utils.records import read_mapping, read_rows
from utils.tiny_world.metrics import Exam
from utils.tiny_world.world import FPS

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 3  # captions on the page
STREAMED = 12  # clips whose first piece is timed
COLUMNS = (
    "method", "generator", "network_evaluations", "adherence", "validity", "both", "both_stderr",
    "diversity", "frechet_features", "frechet_latents", "train_seconds", "seconds_per_clip",
    "seconds_to_first",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One training run: a configuration, and where its start weights come from."""

    config: str  # in configs/tiny/
    start: str | None = None  # the stage whose averaged weights the generator starts from
    teacher: str | None = None  # the same for the teacher; None = the model folder's
    data: str = "prompts.txt"  # below the data folder


STAGES = {
    "dmd": Stage("dmd"),
    "dmd_gan": Stage("dmd_gan", data="latents"),
    "pdd": Stage("pdd"),
    "sid": Stage("sid"),
    "bidirectional_ode": Stage("bidirectional_ode", data="ode_pairs"),
    "gan": Stage("gan", start="bidirectional_ode", data="latents"),
    "ode": Stage("ode", data="ode_pairs"),
    "ode_dmd": Stage("self_forcing_dmd", start="ode"),
    "ode_sid": Stage("self_forcing_sid", start="ode"),
    "causvid": Stage("causvid", start="ode", data="latents"),
    "causal_diffusion": Stage("causal_diffusion", data="latents"),
    "consistency": Stage(
        "consistency", start="causal_diffusion", teacher="causal_diffusion", data="latents"
    ),
    "consistency_dmd": Stage("self_forcing_dmd", start="consistency"),
}
# What the table shows: the stage that ends a recipe, and its name.
METHODS = {
    "dmd": "DMD",
    "dmd_gan": "DMD + GAN",
    "pdd": "PDD",
    "sid": "SiD",
    "bidirectional_ode": "ODE regression, whole clips",
    "gan": "ODE regression, then GAN",
    "ode": "ODE regression, block by block",
    "ode_dmd": "ODE regression, then self-forcing DMD",
    "ode_sid": "ODE regression, then self-forcing SiD",
    "causvid": "ODE regression, then CausVid",
    "consistency": "causal consistency",
    "consistency_dmd": "causal consistency, then self-forcing DMD",
}
TEACHERS = {"teacher": "teacher, 50 steps", "causal_diffusion": "causal teacher, 50 steps a block"}


def parser() -> argparse.ArgumentParser:
    """The command line of compare_methods.py."""
    result = command_parser(__doc__)
    result.add_argument(
        "--run_folder", type=Path, default=Path("runs/quickstart"),
        help="what quickstart.sh made: its world and teacher are used",
    )  # fmt: skip
    result.add_argument("--output_folder", type=Path, default=Path("runs/methods"))
    result.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="NAME",
        help=f"some of: {', '.join(METHODS)}",
    )  # fmt: skip
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--clips", type=int, default=192, help="per row")
    result.add_argument("--pairs", type=int, default=2048, help="ODE pairs")
    result.add_argument("--steps", type=int, default=None, help="of every run; for a trial")
    return result


@dataclass(frozen=True)
class Comparison:
    """Where everything lies."""

    args: argparse.Namespace

    @property
    def world(self) -> Path:
        """The folder of the tiny world's data."""
        return self.args.run_folder / "data"

    def logdir(self, name: str) -> Path:
        """The log directory of a stage, or of the teacher."""
        return (self.args.run_folder if name == "teacher" else self.args.output_folder) / name

    def weights(self, stage: str) -> Path:
        """A stage's averaged weights as one file, for those that start from them."""
        return self.args.output_folder / f"{stage}.safetensors"

    def data(self, stage: Stage) -> Path:
        """What a stage trains on."""
        if stage.data == "ode_pairs":
            return self.args.output_folder / "ode_pairs"
        return self.world / stage.data

    def config_path(self, name: str) -> Path:
        """The configuration of a stage, or of the teacher."""
        stem = "diffusion" if name == "teacher" else STAGES[name].config
        return ROOT / "configs" / "tiny" / f"{stem}.yaml"

    @property
    def timings(self) -> Path:
        """What ran, for how long, and under which settings."""
        return self.args.output_folder / "timings.json"

    def settings(self) -> dict[str, Any]:
        """What all runs of an output folder share."""
        return {
            "seed": self.args.seed,
            "pairs": self.args.pairs,
            "steps": self.args.steps,
            "run_folder": str(self.args.run_folder),
        }

    def shared(self) -> list[str]:
        """What every command gets."""
        return [f"model_root={self.args.run_folder / 'wan_models'}", f"seed={self.args.seed}"]

    def overrides(self, name: str) -> list[str]:
        """The settings of a run that depend on where things lie."""
        if name == "teacher":
            return [*self.shared(), f"data.path={self.world / 'latents'}"]
        stage = STAGES[name]
        words = [*self.shared(), f"data.path={self.data(stage)}"]
        if stage.start is not None:
            words.append(f"generator.weights={self.weights(stage.start)}")
        if stage.teacher is not None:
            words.append(f"teacher.weights={self.weights(stage.teacher)}")
        if self.args.steps is not None:
            words.append(f"steps={self.args.steps}")
            if stage.config == "gan":  # or a trial might be all warm-up, which is refused
                words.append("loss.discriminator_warmup_steps=0")
        return words


def needed(methods: Sequence[str]) -> list[str]:
    """The stages that lead to some methods, each after what it starts from."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        stage = STAGES[name]
        for other in (stage.teacher, stage.start):
            if other is not None:
                visit(other)
        order[name] = None

    for name in methods:
        visit(name)
    return list(order)


def commands(comparison: Comparison, name: str) -> Iterator[tuple[str, list[str]]]:
    """What a stage runs, in order, each with what it is called in timings.json."""
    stage, args = STAGES[name], comparison.args
    python = [sys.executable]
    if stage.data == "ode_pairs":
        yield "ode_pairs", [
            *python, str(ROOT / "scripts" / "generate_ode_pairs.py"),
            "--config_path", str(comparison.config_path("teacher")),
            "--checkpoint_path", str(args.run_folder / "teacher"), "--use_ema",
            "--caption_path", str(comparison.world / "prompts.txt"),
            "--output_folder", str(comparison.data(stage)), "--num_pairs", str(args.pairs),
            "--batch_size", "64", "--seed", str(args.seed),
            *comparison.shared(),
        ]  # fmt: skip
    yield name, [
        *python, str(ROOT / "train.py"), "--config_path", str(comparison.config_path(name)),
        "--logdir", str(comparison.logdir(name)), *comparison.overrides(name),
    ]  # fmt: skip
    if any(name in (other.start, other.teacher) for other in STAGES.values()):
        yield f"{name} weights", [
            *python, str(ROOT / "convert_checkpoint.py"),
            "--input_path", str(comparison.logdir(name)),
            "--use_ema", "--overwrite", "--output_path", str(comparison.weights(name)),
        ]  # fmt: skip


def train(comparison: Comparison, names: Sequence[str]) -> None:
    """Run every stage that is not finished; what each command took is added up in timings.json.

    Raises ConfigError if the folder holds runs of other settings, or if a stage fails.
    """
    path = comparison.timings
    timings = read_mapping(path, "timings of runs") if path.is_file() else {}
    settings = comparison.settings()
    there = timings.get("settings", settings)
    Claim(comparison.args.output_folder, settings, holds="runs").compare(there)
    done = set(timings.get("finished", []))
    seconds: dict[str, float] = timings.get("seconds", {})
    for name in names:
        for what, words in commands(comparison, name):
            if what in done:
                continue
            print(f"\n== {what}\n   {' '.join(words)}", flush=True)
            start = time.monotonic()
            status = subprocess.run(words, check=False).returncode
            seconds[what] = seconds.get(what, 0.0) + time.monotonic() - start
            if status == 0:
                done.add(what)
            state = {"settings": settings, "finished": sorted(done), "seconds": seconds}
            write_text(path, json.dumps(state, indent=1))
            if status:
                raise ConfigError(f"{what}: stopped with status {status}; run this again to go on")


def train_seconds(comparison: Comparison, name: str) -> float:
    """What a method's runs took, those that it starts from included; the teacher's not."""
    total = 0.0
    for stage in needed([name]):
        previous = 0
        for row in read_metrics(comparison.logdir(stage) / "metrics.jsonl"):
            total += row["seconds_per_step"] * (row["step"] - previous)
            previous = int(row["step"])
        if STAGES[stage].data == "ode_pairs":
            known = read_mapping(comparison.timings, "timings of runs")
            total += known["seconds"]["ode_pairs"]
    return total


def load_row(comparison: Comparison, name: str) -> tuple[Config, VideoGenerator]:
    """A trained model behind its own pipeline."""
    config = load(comparison.config_path(name), comparison.overrides(name))
    source = check_source(config, comparison.logdir(name), use_ema=True)
    return config, load_generator(source, torch.device("cpu"))


def seconds_to_first(model: VideoGenerator, captions: Sequence[object]) -> float:
    """Mean seconds until a clip's first decoded frames are there, one clip at a time."""
    total = 0.0
    for i, caption in enumerate(captions):
        start = time.perf_counter()
        next(model.stream(Request(str(caption), 1, i)))
        total += time.perf_counter() - start
    return total / len(captions)


def measure(
    comparison: Comparison, names: Sequence[str], known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """All rows; each is written as soon as it is there, and those `known` are not made again."""
    args, known = comparison.args, list(known)
    path = args.output_folder / "rows.json"
    _, teacher = load_row(comparison, "teacher")
    exam = Exam.draw(args.clips, args.seed, teacher.vae)
    sheets = {"real": exam.clips[:SHOWN]}
    rows: list[dict[str, Any]] = [{"method": "real clips, through the codec", **exam.judge_real()}]
    for name in tqdm(names, desc="rows"):
        config, model = load_row(comparison, name)
        title = {**METHODS, **TEACHERS}[name]
        facts: dict[str, Any] = {
            "method": title,
            "generator": config.generator_type,
            "network_evaluations": model.pipeline.network_evaluations(config.latent_shape[1]),
            "clips": args.clips,
            "seed": args.seed,
            "weights": fingerprint(model),
        }
        found = [row for row in known if all(row.get(k) == v for k, v in facts.items())]
        wanted = exam.captions[:SHOWN] if found else exam.captions
        model.latents([Request(str(exam.captions[0]), args.seed)])  # slow imports, warm-up
        clips, latents, seconds = sample(model, wanted, args.seed)
        sheets[title] = clips[:SHOWN]
        if found:
            rows.append(found[0])
            continue
        figures = exam.judge(clips, latents)
        times = {"seconds_per_clip": seconds}
        if name not in TEACHERS:
            times["train_seconds"] = train_seconds(comparison, name)
            times["seconds_to_first"] = seconds_to_first(model, exam.captions[:STREAMED])
            facts["commands"] = [
                " ".join(["python", *words[1:]]).replace(f"{ROOT}/", "")
                for stage in needed([name])
                for _, words in commands(comparison, stage)
            ]
        rows.append({**facts, **figures, **times})
        known.append(rows[-1])
        write_text(path, json.dumps(known, indent=1))
    show(args.output_folder, sheets, [str(caption) for caption in exam.captions[:SHOWN]])
    return rows


def show(folder: Path, sheets: dict[str, Tensor], captions: Sequence[str]) -> None:
    """The same captions by each method, as a picture and as one mp4 per clip."""
    clips = [sheet[i] for sheet in sheets.values() for i in range(len(captions))]
    labels = [name if i == 0 else captions[i] for name in sheets for i in range(len(captions))]
    picture = contact_sheet(clips, labels, columns=len(captions), frames=4, side=72)
    save_png(picture, folder / "methods.png")
    for number, sheet in enumerate(sheets.values()):
        for i, clip in enumerate(sheet):
            save_mp4(clip, folder / "clips" / f"{number}-{i}.mp4", fps=FPS)
    names = {"captions": list(captions), "methods": list(sheets)}
    write_text(folder / "clips" / "index.json", json.dumps(names, indent=1))


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write, print the table."""
    args = parser().parse_args(arguments)
    start_logging()
    comparison = Comparison(args)
    try:
        unknown = sorted(set(args.methods) - METHODS.keys())
        if unknown:
            raise ConfigError(f"--methods: {unknown} unknown, choose of {', '.join(METHODS)}")
        check_at_least(args, clips=LEAST_CLIPS, pairs=1, steps=1)
        args.output_folder.mkdir(parents=True, exist_ok=True)
        known = read_rows(args.output_folder / "rows.json", ROWS)  # before hours of training
        check_source(
            load(comparison.config_path("teacher"), comparison.overrides("teacher")),
            comparison.logdir("teacher"),
            use_ema=True,
        )
        stages = needed(args.methods)
        train(comparison, stages)
        teachers = [name for name in TEACHERS if name == "teacher" or name in stages]
        rows = measure(comparison, [*teachers, *args.methods], known)
        table = markdown(rows, COLUMNS)
        write_text(args.output_folder / "table.md", table)
        write_text(args.output_folder / "methods.html", methods_page(args.output_folder, table))
    except USER_ERRORS as error:
        return fail(error)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
