"""What fits: other ways to lay the same run over the same GPUs, fastest first.

Only what does not change the result is varied: how weights are sharded, what is recomputed, how a
batch is cut. Each way is a plan of its own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from trainer.config import Config
from trainer.plan import Plan, make_plan
from trainer.plan_trace import World
from trainer.run import Run
from utils.gpus import GPU
from utils.parallel import ParallelConfig

log = logging.getLogger(__name__)

ENOUGH = 3  # ways that fit, after which slower ones are not looked at


def candidates(run: Run, world: World) -> Iterator[Config]:
    """Ways to lay `run`, those first that should be fastest: nothing is done twice in them."""
    config, samples = run.config, run.config.batch_size
    ways = itertools.product(
        _divisors(samples), _contexts(run, world), _recomputed(), _shardings(world)
    )
    for accumulation, context, recomputed, sharding in ways:
        share = accumulation * world.ranks
        if world.ranks % context or samples * context % share:
            continue
        changes: dict[str, Any] = {"activation_checkpoint": recomputed, "context": context}
        if recomputed == "none":
            changes |= {"checkpoint_every": 1, "offload_inputs": False}
        parallel = replace(config.parallel, **changes)
        laid: dict[str, Any] = {"accumulation": accumulation, "sharding_strategy": sharding}
        yield replace(config, parallel=parallel, **laid)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _contexts(run: Run, world: World) -> list[int]:
    """Numbers of ranks that can share a sample, fewest first."""
    _, _, height, width = run.latent_shape
    counts = {"tokens": run.model.latent.tokens((1, 1, height, width)), "ranks": world.per_node}
    counts |= {role: model.features.heads for role, model in run.models.items()}
    shared = range(1, world.per_node + 1)
    return [n for n in shared if all(count % n == 0 for count in counts.values())]


def _recomputed() -> list[str]:
    allowed = get_args(get_type_hints(ParallelConfig)["activation_checkpoint"])
    return sorted(allowed, key=("none", "selective", "block").index)


def _shardings(world: World) -> list[str]:
    allowed = get_args(get_type_hints(Config)["sharding_strategy"])
    alike = {"hybrid_full"} if world.nodes == 1 else set()  # as "full" on a single machine
    if world.ranks == 1:
        alike.add("none")  # a single rank shards nothing in any of them
    return [s for s in ("none", "hybrid_full", "full") if s in allowed and s not in alike]


def fitting(run: Run, world: World, gpu: GPU, ways: Sequence[Config]) -> list[Plan]:
    """Plans of the ways that fit, fastest first; of what is hopeless or slower, none."""
    found: list[Plan] = []
    hopeless: list[Config] = []
    for config in ways:
        if len(found) >= ENOUGH:
            break
        if any(_takes_no_less(config, other) for other in hopeless):
            continue
        plan = make_plan(replace(run, config=config), world, gpu)
        log.info("%s: %.1f GB, %.2f s", name_of(config), plan.memory / 1e9, plan.step_seconds)
        (found if plan.fits else hopeless).append(plan if plan.fits else config)  # type: ignore
    return sorted(found, key=lambda plan: plan.step_seconds)


def _takes_no_less(config: Config, hopeless: Config) -> bool:
    """Whether a way needs at least the memory of one that does not fit, for certain."""
    same = replace(config.parallel, activation_checkpoint="none") == replace(
        hopeless.parallel, activation_checkpoint="none"
    )
    order = _recomputed()
    keeps = order.index(config.parallel.activation_checkpoint) <= order.index(
        hopeless.parallel.activation_checkpoint
    )
    shardings = ("none", "hybrid_full", "full")
    wider = shardings.index(config.sharding_strategy) <= shardings.index(hopeless.sharding_strategy)
    return same and keeps and wider and config.accumulation <= hopeless.accumulation


def name_of(config: Config) -> str:
    """The keys in which ways differ."""
    words = [
        f"sharding_strategy={config.sharding_strategy}",
        f"accumulation={config.accumulation}",
        f"parallel.activation_checkpoint={config.parallel.activation_checkpoint}",
        f"parallel.context={config.parallel.context}",
    ]
    return " ".join(words)
