"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.plan import Plan
from trainer.plan_fits import name_of
from trainer.plan_trace import World
from utils.gpus import GPU, HIDDEN_BYTES, kernel_of, uncounted
from utils.metering import Place, Tag

KINDS = ("weights", "gradients", "optimizer", "average", "gathered", "kv cache", "activations")
GB, TERA = 1e9, 1e12


def table(plan: Plan) -> str:
    """All of a plan, for a reader."""
    return "\n".join(
        [
            *_heading(plan),
            "",
            *_memory(plan),
            "",
            *_time(plan),
            "",
            *_traffic(plan),
            f"Source: {plan.layers_traced}.",
            *_notes(plan),
        ]
    )


def _notes(plan: Plan) -> list[str]:
    """What a reader of the figures must know beside them."""
    parallel = plan.run.config.parallel
    said = uncounted(plan.gpu, parallel.attention)
    notes = [] if said is None else [said]
    if parallel.offload_idle_expert:
        notes.append("Copies of experts from host memory take time that is not counted here.")
    return notes


def _heading(plan: Plan) -> list[str]:
    config, gpu = plan.run.config, plan.gpu
    fits = "fits" if plan.fits else "DOES NOT FIT"
    return [
        f"{where(plan.world, gpu)}: {fits}, {plan.memory / GB:.1f} of {gpu.memory / GB:.1f} GB "
        f"per GPU; {_duration(plan)}",
        f"{name_of(config)} batch_size={config.batch_size} latent_shape={config.latent_shape}",
    ]


def _duration(plan: Plan) -> str:
    if plan.repeats == 1:
        return f"{plan.step_seconds:.2f} s"
    hours = plan.run_seconds / 3600
    return f"{plan.step_seconds:.2f} s a step, {hours:.1f} h for {plan.repeats} steps"


def where(world: World, gpu: GPU) -> str:
    """The machines in words."""
    return f"{world.ranks} x {gpu.name} ({world.nodes} x {world.per_node})"


def _memory(plan: Plan) -> list[str]:
    """Rows of kinds, columns of roles, at the worst moment."""
    roles = [*list(dict.fromkeys(tag.role for tag in plan.peak if tag.role)), ""]
    kinds = [*KINDS, *sorted({tag.kind for tag in plan.peak} - set(KINDS))]
    head = ["GB per GPU", *(role or "all roles" for role in roles), "sum"]
    rows = []
    for kind in kinds:
        values = [plan.peak.get(Tag(role, kind), 0.0) / GB for role in roles]
        if sum(values) >= 0.005:
            rows.append([kind, *map(_number, values), _number(sum(values))])
    rows.append(["hidden", *[""] * len(roles), _number(HIDDEN_BYTES / GB)])
    rows.append(["sum", *[""] * len(roles), _number(plan.memory / GB)])
    place = plan.peak_place
    return [*columns([head, *rows]), f"The worst moment: {_name(place)}."]


def _time(plan: Plan) -> list[str]:
    head = ["part of a phase", "s", "compute s", "transfer s", "TFLOP", "GB moved", "GB sent"]
    rows = []
    for place, cost in plan.by_part().items():
        if not place.part and cost.seconds < 0.005:  # what lies between the parts
            continue
        numbers = (cost.seconds, cost.compute_s, cost.transfer_s)
        tera = (cost.flops / TERA, cost.moved / GB, cost.sent / GB)
        rows.append([_name(place), *map(_number, numbers), *(f"{v:.1f}" for v in tera)])
    counts = (
        f"{name}: {plan.phase_seconds(name):.2f} s, {count} times in the run"
        for name, count in plan.counts.items()
    )
    return [*columns([head, *rows]), "; ".join(counts) + "."]


def _traffic(plan: Plan) -> list[str]:
    if not plan.sent:
        return ["Nothing is sent between GPUs."]
    rows = [
        [kind, str(ranks), str(step), _number(count / GB)]
        for (kind, ranks, step), count in sorted(plan.sent.items())
    ]
    return columns([["GB sent per GPU in all phases, longest draw", "ranks", "apart", "GB"], *rows])


def _number(value: float) -> str:
    return f"{value:.2f}" if value else ""


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as lines with straight columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (word.rjust(width) for word, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def fits_table(plans: Sequence[Plan], world: World, gpu: GPU) -> str:
    """The ways that fit."""
    if not plans:
        return f"{where(world, gpu)}: nothing fits; use more GPUs, or fewer pixels or frames"
    rows = [[name_of(p.run.config), f"{p.memory / GB:.1f}", f"{p.step_seconds:.2f}"] for p in plans]
    head = [f"fits {where(world, gpu)}, fastest first", "GB", "s a step"]
    return "\n".join(columns([head, *rows]))


def as_json(plan: Plan) -> dict[str, Any]:
    """The figures of a plan, in bytes and seconds."""
    return {
        "gpu": plan.gpu.name,
        "gpus": plan.world.ranks,
        "gpus_per_node": plan.world.per_node,
        "fits": plan.fits,
        "memory_bytes": round(plan.memory),
        "gpu_memory_bytes": plan.gpu.memory,
        "hidden_bytes": HIDDEN_BYTES,
        "peak": _tags(plan.peak),
        "peak_at": _name(plan.peak_place),
        "standing": _tags(plan.standing),
        "parts": {_name(place): vars(cost) for place, cost in plan.by_part().items()},
        "sent_bytes": [
            {"kind": kind, "ranks": ranks, "apart": step, "bytes": round(count)}
            for (kind, ranks, step), count in plan.sent.items()
        ],
        "phases": dict(plan.counts),
        "step_seconds": plan.step_seconds,
        "run_seconds": plan.run_seconds,
        "traced": plan.layers_traced,
        "attention": kernel_of(plan.gpu, plan.run.config.parallel.attention),
        "notes": _notes(plan),
    }


def _tags(contents: Mapping[Tag, float]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for tag, count in contents.items():
        found.setdefault(tag.kind, Counter())[tag.role or "all"] += round(count)
    return {kind: dict(roles) for kind, roles in found.items()}


def _name(place: Place) -> str:
    if place.part.startswith(place.phase):
        return place.part
    return f"{place.phase} {place.part}".strip()
