"""What a run will take, told before it begins: memory, arithmetic, traffic and time per GPU.

Every figure comes from `trace_step`. A deep network is traced at two small depths, each role's cut
by the same number of layers: bytes, operations and seconds are linear in it, so they are extended
to the whole depth. Time is the mean over what a step draws (exit steps), memory the worst of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trainer.plan_encoders import encoder_bytes, wanted_parts, with_encoders
from trainer.plan_trace import Trace, World, trace_step
from trainer.run import Run
from utils.gpus import GPU, HIDDEN_BYTES, kernel_of, seconds, transfer_seconds
from utils.metering import Place, Tag

TURNS = 2  # micro-batches that are traced: the first, and one that finds gradients there
K = TypeVar("K")
SHORT = 3  # layers of the shallowest network in the shorter trace: a first, a last and one between


@dataclass(frozen=True)
class Cost:
    """What one part of a step costs on one GPU."""

    compute_s: float = 0.0
    transfer_s: float = 0.0
    flops: float = 0.0
    moved: float = 0.0  # bytes read and written
    sent: float = 0.0  # bytes to other ranks

    @property
    def seconds(self) -> float:
        """Weights are gathered while others are used: the slower of both counts."""
        return max(self.compute_s, self.transfer_s)

    def plus(self, other: Cost, factor: float = 1.0) -> Cost:
        """The sum with so much of another."""
        return Cost(*(a + factor * b for a, b in zip(_parts(self), _parts(other), strict=True)))

    def times(self, factor: float) -> Cost:
        """So much of it."""
        return Cost(*(factor * a for a in _parts(self)))


def _parts(cost: Cost) -> tuple[float, ...]:
    return (cost.compute_s, cost.transfer_s, cost.flops, cost.moved, cost.sent)


@dataclass(frozen=True, eq=False)
class Plan:
    """A run on some GPUs."""

    run: Run
    world: World
    gpu: GPU
    standing: Mapping[Tag, float]  # bytes per GPU that lie there all the time
    peak: Mapping[Tag, float]  # bytes per GPU at the worst moment, standing ones included
    peak_place: Place
    costs: Mapping[Place, Cost]  # of one pass through each phase; the mean over what is drawn
    sent: Mapping[tuple[str, int, int], float]  # bytes by (kind, ranks, step) in such a pass
    counts: Mapping[str, int]  # how often each phase comes in the whole run
    repeats: int  # steps of the run
    layers_traced: str  # which depths the figures come from

    @property
    def memory(self) -> float:
        """Bytes that a GPU needs."""
        return sum(self.peak.values()) + HIDDEN_BYTES

    @property
    def fits(self) -> bool:
        """Whether a GPU has them."""
        return self.memory <= self.gpu.memory

    def phase_seconds(self, phase: str) -> float:
        """Of one pass through a phase."""
        return sum(c.seconds for place, c in self.by_part().items() if place.phase == phase)

    def by_part(self) -> dict[Place, Cost]:
        """Costs of micro-batches and roles together: within a part all overlap."""
        found: dict[Place, Cost] = {}
        for place, cost in self.costs.items():
            key = place._replace(turn=0, role="")
            found[key] = found.get(key, Cost()).plus(cost)
        return found

    @property
    def run_seconds(self) -> float:
        """Of all steps; saving and showing not counted."""
        return sum(n * self.phase_seconds(phase) for phase, n in self.counts.items())

    @property
    def step_seconds(self) -> float:
        """The mean over the run's steps."""
        return self.run_seconds / self.repeats


def make_plan(run: Run, world: World, gpu: GPU) -> Plan:
    """Trace a step of `run` and work out what it takes. Raises what building the run raises."""
    wanted, traced = run.config, run
    if wanted.accumulation > TURNS:
        batch = TURNS * wanted.batch_size // wanted.accumulation
        traced = replace(run, config=replace(wanted, accumulation=TURNS, batch_size=batch))
    short, longer, factor = depths(traced)
    traces = [
        trace_step(short, world, "most"),
        trace_step(_one_turn(short), world, "least"),
        None if longer is None else trace_step(longer, world, "most"),
    ]
    encoders = encoder_bytes(run, wanted_parts(run))
    return extended(run, world, gpu, traces, factor, encoders)


def extended(
    run: Run,
    world: World,
    gpu: GPU,
    traces: Sequence[Trace | None],
    factor: float,
    encoders: Mapping[Tag, float],
) -> Plan:
    """The plan of a run from its traces: shallow with the longest and with the shortest draws,
    and deeper with the longest, if there is one; factor: see `depths`.
    """
    most, least, deep = traces
    assert most is not None and least is not None, "two shallow traces are always taken"
    turns = run.config.accumulation
    worst, shortest = (_costs(t, gpu, run, world) for t in (most, least))
    standing = {tag: float(count) for tag, count in most.standing.items()}
    peaks = {p: peak.told(most.standing) for p, peak in most.peaks.items()}
    sent, whole, told = _sent(most, turns), worst, "all layers"
    if deep is not None:
        whole = _extend(worst, _costs(deep, gpu, run, world), factor)
        standing = _line(standing, deep.standing, factor)
        deeper = {p: peak.told(deep.standing) for p, peak in deep.peaks.items()}
        peaks = {p: _line(peaks[p], deeper.get(p, peaks[p]), factor) for p in peaks}
        sent = _line(sent, _sent(deep, turns), factor)
        told = f"two shallow networks, extended by {factor:.0f} times what the deeper has more"
    mean = {
        p: _mean(cost, worst.get(p, cost), shortest.get(p._replace(turn=0), cost))
        for p, cost in whole.items()
    }
    waiting = run.config.parallel.offload_encoders
    peaks = with_encoders(peaks, encoders, waiting=waiting)
    place = max(peaks, key=lambda p: sum(peaks[p].values()))
    return Plan(
        run=run,
        world=world,
        gpu=gpu,
        standing=standing if waiting else {**standing, **encoders},
        peak=peaks[place],
        peak_place=place,
        costs={p: cost.times(_of_turns(p, turns)) for p, cost in mean.items()},
        sent=sent,
        counts=most.phases,
        repeats=run.config.steps,
        layers_traced=told,
    )


def depths(run: Run) -> tuple[Run, Run | None, float]:
    """The run with shallow networks, with slightly deeper ones, and how often the difference fits.

    Every role is cut by as many layers, so all figures are linear in that number.
    """
    stride = run.config.parallel.checkpoint_every
    least = max(SHORT, 2 + run.config.parallel.prefetch)
    depth = min(model.features.layers for model in run.models.values())
    cut = (depth - least * stride) // stride * stride
    shallow = _cut(run, cut) if cut > stride else None
    deeper = _cut(run, cut - stride) if shallow is not None else None
    if shallow is None or deeper is None or run.config.discriminator.layers:
        return run, None, 0.0
    return shallow, deeper, cut / stride


def _cut(run: Run, layers: int) -> Run | None:
    models = {role: model.shortened(layers) for role, model in run.models.items()}
    kept = {role: model for role, model in models.items() if model is not None}
    return replace(run, models=kept) if len(kept) == len(models) else None


def _costs(trace: Trace, gpu: GPU, run: Run, world: World) -> dict[Place, Cost]:
    """What the parts of a traced step cost."""
    parallel = run.config.parallel
    kernel = kernel_of(gpu, parallel.attention)
    found: dict[Place, Cost] = defaultdict(Cost)
    for (place, work), count in trace.work.items():
        taken = seconds(work, gpu, kernel, compiled=parallel.compile)
        each = Cost(taken, 0.0, work.flops, work.moved)
        found[place] = found[place].plus(each, count)
    for (place, transfer), count in trace.transfers.items():
        taken = transfer_seconds(transfer, gpu, world.per_node)
        found[place] = found[place].plus(Cost(0.0, taken, 0.0, 0.0, transfer.sent), count)
    return dict(found)


def _one_turn(run: Run) -> Run:
    """The run with one micro-batch of the same size."""
    config = run.config
    return replace(
        run,
        config=replace(config, accumulation=1, batch_size=config.batch_size // config.accumulation),
    )


def _sent(trace: Trace, turns: int) -> dict[tuple[str, int, int], float]:
    found: dict[tuple[str, int, int], float] = defaultdict(float)
    for (place, transfer), count in trace.transfers.items():
        key = (transfer.kind, transfer.ranks, transfer.step)
        found[key] += transfer.sent * count * _of_turns(place, turns)
    return dict(found)


def _extend(short: dict[Place, Cost], deep: dict[Place, Cost], factor: float) -> dict[Place, Cost]:
    """`short`, and so many times what `deep` has more."""
    return {p: deep[p].times(factor).plus(short.get(p, Cost()), 1.0 - factor) for p in deep}


def _line(short: Mapping[K, float], deep: Mapping[K, float], factor: float) -> dict[K, float]:
    keys = dict.fromkeys([*short, *deep])
    values = {k: short.get(k, 0.0) + factor * (deep.get(k, 0.0) - short.get(k, 0.0)) for k in keys}
    return {k: max(0.0, value) for k, value in values.items()}


def _mean(whole: Cost, worst: Cost, shortest: Cost) -> Cost:
    """Halfway between the longest and the shortest draw: each further pass costs the same."""
    shares = (
        (b + s) / (2.0 * b) if b else 1.0
        for b, s in zip(_parts(worst), _parts(shortest), strict=True)
    )
    return Cost(*(a * share for a, share in zip(_parts(whole), shares, strict=True)))


def _of_turns(place: Place, turns: int) -> float:
    """How often a traced micro-batch comes in a phase: of many only the first and one were run."""
    if turns <= TURNS or place.part in ("clip", "optimizer", "average"):
        return 1.0
    return float(turns - 1) if place.turn == 0 else 1.0
