"""What a benchmark reports: one row per configuration, as JSON and as a line of a table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from trainer.plan import Plan, make_plan
from trainer.plan_inference import plan_clips
from trainer.plan_trace import World, trace_step
from trainer.run import Run
from utils.gpus import find_device


@dataclass(frozen=True)
class Prediction:
    """What the plan says of a configuration on a device; None = it says nothing."""

    step_s: float | None = None  # of a training step, or of a clip in the network
    peak_gib: float | None = None  # per device
    tflop: float | None = None  # of a step or a clip, per device; what is run again included
    first_frame_s: float | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Row:
    """One configuration as it was measured. None = it was not, and `notes` says why."""

    name: str
    mode: str  # train or inference
    method: str
    device: str
    ranks: int
    dtype: str
    parameters: int  # of the generator
    latent_shape: Sequence[int]
    samples: int  # per step over all ranks, or clips
    rounds: int  # steps or clips that were timed
    step_s: float  # median of a training step, or of a clip in the network
    samples_per_s: float
    model_tflop: float | None  # mean of a step or clip, per device
    mfu: float | None  # of the dense peak
    peak_tflop_s: float
    peak_source: str
    peak_gib: float | None = None  # memory per device
    data_wait_s: float | None = None  # median of a step
    save_stall_s: float | None = None
    first_frame_s: float | None = None  # prompt to the first decoded frames
    fps: float | None = None  # decoded pixel frames per second of a whole clip
    traffic_gib: float | None = None  # that a rank receives in a step; see traffic.py
    traffic_formula_gib: float | None = None
    plain_s: float | None = None  # median of the same by plain.py
    plain_ratio: float | None = None  # median of ours / plain, round by round
    plain_cpu_ratio: float | None = None  # the same of CPU seconds, which neighbours disturb less
    plain_difference: float | None = None  # largest relative difference of losses or latents
    prediction: Prediction = field(default_factory=Prediction)
    notes: Sequence[str] = ()

    def json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def predicted(run: Run, row: Row) -> Prediction:
    """The plan's figures for what `row` was measured on; on a CPU memory of training alone.

    No process group may be open: a plan pretends to have one.
    """
    gpu = find_device(row.device)
    world = World(row.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", row.ranks)))
    if gpu is None:
        if row.mode == "inference":
            return Prediction()
        trace = trace_step(run, world, "most", on_gpu=False)
        return Prediction(peak_gib=max(peak.total for peak in trace.peaks.values()) / 2**30)
    if row.mode == "inference":
        plan = plan_clips(run, gpu, row.samples)
        network, decode = plan.phase_seconds("denoise"), plan.phase_seconds("decode")
        frames = run.model.latent.pixel_frames(run.latent_shape[1])
        return Prediction(
            step_s=network,
            peak_gib=plan.memory / 2**30,
            tflop=_tflop(plan),
            fps=frames / (network + decode),
        )
    plan = make_plan(run, world, gpu)
    return Prediction(step_s=plan.step_seconds, peak_gib=plan.memory / 2**30, tflop=_tflop(plan))


def _tflop(plan: Plan) -> float:
    """Of one pass through every phase."""
    return sum(cost.flops for cost in plan.costs.values()) / 1e12


def number(value: float | None, form: str = ".3g", scale: float = 1.0) -> str:
    """A figure of the table, or a dash."""
    return "-" if value is None else format(scale * value, form)


def _train_cells(row: Row) -> dict[str, str]:
    plan = row.prediction
    return {
        "s / step": number(row.step_s, ".4g"),
        "plan": number(plan.step_s),
        "plain": number(row.plain_s, ".4g"),
        "ours / plain": number(row.plain_ratio, ".3f"),
        "of CPU time": number(row.plain_cpu_ratio, ".3f"),
        "samples / s": number(row.samples_per_s),
        "peak GiB": number(row.peak_gib),
        "plan GiB": number(plan.peak_gib),
        "TFLOP": number(row.model_tflop),
        "plan TFLOP": number(plan.tflop),
        "MFU": number(row.mfu, ".1%"),
        "data wait ms": number(row.data_wait_s, ".2f", 1e3),
        "save s": number(row.save_stall_s),
        "traffic GiB": number(row.traffic_gib),
        "by formula": number(row.traffic_formula_gib),
    }


def _inference_cells(row: Row) -> dict[str, str]:
    plan = row.prediction
    return {
        "network s / clip": number(row.step_s, ".4g"),
        "plan": number(plan.step_s),
        "plain": number(row.plain_s, ".4g"),
        "ours / plain": number(row.plain_ratio, ".3f"),
        "of CPU time": number(row.plain_cpu_ratio, ".3f"),
        "first frame s": number(row.first_frame_s),
        "plan first s": number(plan.first_frame_s),
        "frames / s": number(row.fps),
        "plan fps": number(plan.fps),
        "peak GiB": number(row.peak_gib),
        "plan GiB": number(plan.peak_gib),
        "TFLOP": number(row.model_tflop),
        "MFU": number(row.mfu, ".1%"),
    }


def table(rows: Sequence[Row]) -> str:
    """All rows of one mode, as a Markdown table."""
    cells = [
        {
            "configuration": f"{row.name} {row.method} {row.dtype} x{row.ranks}",
            **(_train_cells(row) if row.mode == "train" else _inference_cells(row)),
        }
        for row in rows
    ]
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(line.values()) for line in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
