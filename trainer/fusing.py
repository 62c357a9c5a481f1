"""Students with a head for each part of their path: what is served of one, and what is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from model.flow import shift
from model.folders.adapter_files import AdapterFile
from model.folders.heads import FusedHeads, GivenHeads, check_calls, refuse_heads
from model.wan.heads import count_heads
from trainer.run import Run
from trainer.student_facts import Facts
from utils.config import ConfigError
from utils.weights import Weights, WeightsError


def with_heads(weights: Weights, adapters: Iterable[AdapterFile]) -> Weights:
    """`weights` with the heads that one of `adapters` was trained with, in their own one's place.

    Raises WeightsError if there are several such.
    """
    found = [adapter for adapter in adapters if adapter.heads]
    if len(found) > 1:
        raise WeightsError(
            f"{found[1].path}: was trained with heads for the parts of a path, as "
            f"{found[0].path} was, and a student has one set of them; give one of the two"
        )
    return GivenHeads(weights, found[0].heads, plain=False) if found else weights


def served(run: Run, weights: Weights, adapters: Iterable[AdapterFile]) -> Weights:
    """What a run's generator is loaded from. Raises UserError if its heads are not the method's."""
    found = with_heads(weights, adapters)
    if run.heads_of("generator"):
        check_calls(found, len(run.sampling.sigmas))
    else:
        refuse_heads(found, who="generator")
    return found


def fused_student(
    weights: Weights, facts: Facts | None, steps: int | None
) -> tuple[Weights, Facts | None]:
    """What is written of a student in `steps`, None = as its run samples it; one head per step.

    Weights with one head for all are returned as they are. Raises UserError.
    """
    if not count_heads(weights.shapes()):
        if steps is not None:
            raise ConfigError(
                f"--fuse_steps {steps}: {weights.path} has one head for all noise levels, and "
                f"nothing to fuse; leave it out, or give a student of method pdd"
            )
        return weights, facts
    if facts is None or not facts.head_per_step:
        raise ConfigError(
            f"{weights.path}: has a head for each part of its path, and does not tell of its run, "
            f"so that their noise levels are not known; give the run's YAML with --config_path"
        )
    count = facts.steps if steps is None else steps
    levels = [shift(1.0 - n / count, facts.shift) for n in range(count)] if count > 0 else []
    fused = FusedHeads(weights, count, facts.shift)
    return fused, replace(facts, steps=count, sigmas=levels)


def check_naming(weights: Weights, words: Iterable[str | None]) -> None:
    """Raise ConfigError for names or layouts that have no place for one head per step."""
    if count_heads(weights.shapes()) and "diffusers" in words:
        raise ConfigError(
            f"{weights.path}: is a student with a last layer for each of its steps, of which a "
            f"transformer of diffusers has one; write it under official names"
        )
