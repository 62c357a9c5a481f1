"""Measure a tiny-world teacher and student: one table, a contact sheet, plots of their runs.

Every figure comes from clips that are sampled here and judged in closed form. Writes
rows.json (a row is kept as soon as it is measured, so an interrupted call continues), table.md,
contact_sheet.png, comparison clips under clips/, and plots of each run's metrics.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.build import SAMPLERS, Sampling
from pipeline.generator import VideoGenerator
from pipeline.protocol import InferencePipeline
from pipeline.request import Pixels, Request
from scripts.report import ROWS
from trainer.config import Config, causal_config, first_sigmas, load, method_needs, sigmas
from trainer.serving import check_source, load_generator
from utils import start
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
from utils.media.video import contact_sheet, save_mp4, save_png, to_unit
from utils.plots import plot_run
from utils.records import read_rows
from utils.tiny_world.checker import read_attributes
from utils.tiny_world.metrics import Exam
from utils.tiny_world.world import FPS, Caption

BATCH = 64
LEAST_CLIPS = 2  # one has no spread
SOLVER2_SHIFT = 1.0  # of teacher_solver2; of 1, 1.5, 2 and 3 the best in 4 steps: a fair rival
SHOWN = 6  # captions on the contact sheet and in the report
# A column without any figure is left out.
COLUMNS = (
    "sampler", "steps", "cfg_scale", "network_evaluations", "adherence", "validity", "both",
    "both_stderr", "psnr_db", "contrast", "diversity", "frechet_features", "frechet_latents",
    "first_frame_db", "seconds_per_clip",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way of sampling one of the two models."""

    sampler: str  # teacher_euler, teacher_solver2 or student
    steps: int
    cfg_scale: float


def parser() -> argparse.ArgumentParser:
    """The command line of evaluate.py."""
    result = command_parser(__doc__)
    for role in ("teacher", "student"):
        result.add_argument(f"--{role}_config", type=Path, required=True)
        result.add_argument(f"--{role}_path", type=Path, required=True, help="log directory")
    result.add_argument("--output_folder", type=Path, required=True)
    result.add_argument("--clips", type=int, default=192, help="per row")
    result.add_argument("--seed", type=int, default=1)
    result.add_argument(
        "--i2v", action="store_true",
        help="clips begin with real first frames, of models where images are optional",
    )  # fmt: skip
    result.add_argument("--solver2_shift", type=float, default=SOLVER2_SHIFT)
    result.add_argument("overrides", nargs="*", metavar="key=value", help="for both configs")
    return result


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that measure nothing."""
    check_at_least(args, clips=LEAST_CLIPS)
    if not (math.isfinite(args.solver2_shift) and args.solver2_shift > 0.0):
        raise ConfigError(f"--solver2_shift: must be above 0, got {args.solver2_shift}")


def table_rows(config: Config) -> list[Row]:
    """What is measured: the teacher from many steps to few, guided and not, and the student."""
    guided = config.sampling.cfg_scale
    teacher = [
        Row(f"teacher_{solver}", steps, scale)
        for solver in ("euler", "solver2")
        for scale in (guided, 1.0)
        for steps in (50, 8, 4, 2)
    ]
    return [*teacher, *(Row("student", steps, 1.0) for steps in (4, 2, 1))]


def possible_rows(configs: Mapping[str, Config]) -> list[Row]:
    """The rows, without those of more steps than the student has."""
    most = len(configs["student"].denoising_step_list)
    rows = table_rows(configs["teacher"])
    return [row for row in rows if row.sampler != "student" or row.steps <= most]


def pipeline_for(
    row: Row, config: Config, generator_: VideoGenerator, solver2_shift: float
) -> InferencePipeline:
    """The sampler that a row names."""
    causal = causal_config(config)
    if row.sampler == "student":
        # Fewer steps take the leading noise levels that the student was trained at, evenly.
        levels, kind = sigmas(config), method_needs(config).sampler
        stride = len(levels) // row.steps
        first = first_sigmas(config)
        if first is not None and stride > 1:  # as few steps as all other blocks
            first = first[:: max(1, len(first) // row.steps)]
        return SAMPLERS[kind](
            generator_.network,
            Sampling(levels[::stride], causal, first_sigmas=first, shift=config.timestep_shift),
        )
    second, known = row.sampler == "teacher_solver2", generator_.capabilities.sampling
    sampling = replace(
        known or config.sampling,  # of two experts it says where they meet
        steps=row.steps,
        cfg_scale=row.cfg_scale,
        cfg_scale_low=None if row.cfg_scale == 1.0 else config.sampling.cfg_scale_low,
        timestep_shift=solver2_shift if second else config.sampling.timestep_shift,
        solver="unipc" if second else "euler",
    )
    return SAMPLERS["many_step"](generator_.network, Sampling(causal=causal, many_step=sampling))


def sample(
    source: VideoGenerator,
    captions: Sequence[Caption],
    seed: int,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Clips [N, 3, P, S, S] in [0, 1], latents [N, C, F, H, W], and seconds per clip.

    first: [N, 3, S, S] in [0, 1], what the clips begin with; None = a text-to-video model.
    """
    images = [None] * len(captions) if first is None else [begin_with(image) for image in first]
    requests = [
        Request(str(caption), seed, i, first_image=image)
        for i, (caption, image) in enumerate(zip(captions, images, strict=True))
    ]
    clips, latents = [], []
    start = time.perf_counter()
    for begin in range(0, len(requests), BATCH):
        made = source.latents(requests[begin : begin + BATCH])
        clips.append(to_unit(source.vae.decode_to_pixel(made)))
        latents.append(made)
    seconds = (time.perf_counter() - start) / len(requests)
    return torch.cat(clips), torch.cat(latents), seconds


def begin_with(image: Tensor) -> Pixels:
    """An image [3, S, S] in [0, 1] as a request has it."""
    return Pixels((2.0 * image - 1.0)[:, None])


def fingerprint(source: VideoGenerator) -> str:
    """A hash of a network's weights: rows of other weights are not reused."""
    digest = hashlib.blake2b(digest_size=8)
    for _, value in sorted(source.network.state_dict().items()):
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_models(args: argparse.Namespace, configs: dict[str, Config]) -> dict[str, VideoGenerator]:
    """Teacher and student with their averaged weights; both are checked before one is loaded."""
    paths = {"teacher": args.teacher_path, "student": args.student_path}
    sources = {
        role: check_source(config, paths[role], use_ema=None) for role, config in configs.items()
    }
    device = torch.device("cpu")
    return {role: load_generator(sources[role], device) for role in configs}


def measure(
    args: argparse.Namespace,
    configs: dict[str, Config],
    models: dict[str, VideoGenerator],
    known: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """All rows; each is written as soon as it is there, beside those `known` of earlier calls."""
    known = list(known)
    exam = Exam.draw(args.clips, args.seed, models["teacher"].vae)
    captions, images = exam.captions, args.i2v or models["teacher"].encoder.reads_images
    first = exam.first if images else None
    for model in models.values():  # the first call pays for slow imports and warm-up
        sample(model, captions[:1], args.seed, None if first is None else first[:1])

    path = args.output_folder / "rows.json"
    prints = {role: fingerprint(model) for role, model in models.items()}
    ceiling = exam.judge_real()
    if images:
        ceiling["first_frame_db"] = exam.first_frame_db(exam.clips)
    rows: list[dict[str, Any]] = [{"sampler": "real_codec", "clips": args.clips, **ceiling}]
    sheets = {"real": exam.clips[:SHOWN]}
    for row in tqdm(possible_rows(configs), desc="rows"):
        role = "student" if row.sampler == "student" else "teacher"
        source = models[role]
        pipeline = pipeline_for(row, configs[role], source, args.solver2_shift)
        facts = {
            "sampler": row.sampler,
            "steps": row.steps,
            "cfg_scale": row.cfg_scale,
            "network_evaluations": pipeline.network_evaluations(configs[role].latent_shape[1]),
            "solver2_shift": args.solver2_shift if row.sampler == "teacher_solver2" else None,
            "clips": args.clips,
            "seed": args.seed,
            "weights": prints[role],
            "i2v": args.i2v or None,  # as of rows of before this choice
        }
        found = [old for old in known if all(old.get(k) == v for k, v in facts.items())]
        shown = row in shown_rows(configs["teacher"])
        if found:
            rows.append(found[0])
        if shown or not found:
            source = replace(source, pipeline=pipeline)
            count = args.clips if not found else SHOWN
            given = None if first is None else first[:count]
            clips, latents, seconds = sample(source, captions[:count], args.seed, given)
            if shown:
                sheets[f"{role} {row.steps} steps"] = clips[:SHOWN]
            if not found:
                figures = exam.judge(clips, latents)
                if images:
                    figures["first_frame_db"] = exam.first_frame_db(clips)
                rows.append({**facts, **figures, "seconds_per_clip": seconds})
                known.append(rows[-1])
                write_text(path, json.dumps(known, indent=1))
    write_text(path, json.dumps(rows, indent=1))
    show(args.output_folder, sheets, captions[:SHOWN])
    return rows


def shown_rows(config: Config) -> list[Row]:
    """The rows whose clips are shown side by side."""
    guided = config.sampling.cfg_scale
    return [
        Row("teacher_euler", 50, guided),
        Row("teacher_euler", 4, guided),
        Row("student", 4, 1.0),
    ]


def show(folder: Path, sheets: dict[str, Tensor], captions: Sequence[Caption]) -> None:
    """Write the same captions by each sampler: one PNG, and one mp4 per clip."""
    clips = [sheet[i] for i in range(len(captions)) for sheet in sheets.values()]
    labels = [f"{name}: {caption}" for caption in captions for name in sheets]
    page = contact_sheet(clips, labels, columns=len(sheets), frames=4, side=64)
    save_png(page, folder / "contact_sheet.png")
    for name, sheet in sheets.items():
        for i, clip in enumerate(sheet):
            save_mp4(clip, folder / "clips" / f"{name.replace(' ', '_')}-{i}.mp4", fps=FPS)
    faults = {name: read_attributes(sheet).faults(captions) for name, sheet in sheets.items()}
    names = {
        "captions": [str(caption) for caption in captions],
        "samplers": list(sheets),
        "faults": faults,  # of each clip, none if it is as it should be
    }
    write_text(folder / "clips" / "index.json", json.dumps(names, indent=1))


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as a Markdown table: shares in percent."""
    shares = {"adherence", "validity", "both", "both_stderr"}
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]

    def cell(row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        if value is None:
            return ""
        if name in shares:
            return f"{100.0 * value:.1f}"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row, name) for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print the table."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    try:
        check_arguments(args)
        configs = {
            "teacher": load(args.teacher_config, args.overrides),
            "student": load(args.student_config, args.overrides),
        }
        args.output_folder.mkdir(parents=True, exist_ok=True)
        known = read_rows(args.output_folder / "rows.json", ROWS)
        rows = measure(args, configs, load_models(args, configs), known)
        table = markdown(rows)
        write_text(args.output_folder / "table.md", table)
        for role in configs:
            metrics = getattr(args, f"{role}_path") / "metrics.jsonl"
            if metrics.is_file():
                plot_run(metrics, args.output_folder / f"{role}_run.png", title=f"{role} run")
    except USER_ERRORS as error:
        return fail(error)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
