"""Alarms on a run's health: a pure function of the figures of all its probes.

An alarm rises after `patience` probes in a row beyond its limit, and falls after as many within a
limit that is drawn closer, so that it does not flicker. Figures are held against those of the
teacher's own clips (the reference) and against the run's own best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CLOSER = 1.2  # limits are so much closer for an alarm that is up than for one that is not
LEAST_RATE = 0.2  # of its full rate a role must learn with to be blamed for standing still

Figures = Mapping[str, float | None]  # None = measured, and not a finite number


@dataclass(frozen=True)
class Probe:
    """What one probe measured."""

    step: int
    figures: Figures


@dataclass(frozen=True)
class Alarm:
    """One that is up."""

    name: str
    since: int  # the step of the probe at which it rose
    seen: str  # the figures, in words, at the newest probe that saw it
    advice: str


@dataclass(frozen=True)
class Verdict:
    """What the probes so far say at the last of them."""

    alarms: tuple[Alarm, ...] = ()
    rose: tuple[str, ...] = ()  # names, at this very probe
    fell: tuple[str, ...] = ()


@dataclass(frozen=True)
class Past:
    """The probes up to one of them, and what the teacher's clips measure."""

    probes: Sequence[Probe]
    reference: Figures

    def now(self, name: str) -> float | None:
        """A figure of the last probe; None = not measured, or not finite."""
        return self.probes[-1].figures.get(name)

    def ratio(self, name: str) -> float | None:
        """The same as a multiple of the teacher's."""
        return _over(self.now(name), self.reference.get(name))

    def best_ratio(self, name: str) -> float:
        """The largest such multiple so far."""
        scale = self.reference.get(name)
        found = [_over(probe.figures.get(name), scale) for probe in self.probes]
        return max((value for value in found if value is not None), default=0.0)

    def least(self, name: str) -> float:
        """A figure's smallest value so far."""
        found = [probe.figures.get(name) for probe in self.probes]
        return min((value for value in found if value is not None), default=math.inf)


def _over(value: float | None, scale: float | None) -> float | None:
    return None if value is None or not scale else value / scale


# What is seen beyond a limit, in words, or None. `closer` is 1 for an alarm that is not up.
Sign = Callable[[Past, float], str | None]


@dataclass(frozen=True)
class Rule:
    """When an alarm rises, and what usually helps."""

    name: str
    sign: Sign
    advice: str
    spoils: bool = False  # whether the weights of before are worth more than those of now


def fading(names: Mapping[str, str]) -> Sign:
    """Figures far below the teacher's, or far below their own best and below the teacher's."""

    def sign(past: Past, closer: float) -> str | None:
        for name, words in names.items():
            ratio, best = past.ratio(name), past.best_ratio(name)
            if ratio is None:
                continue
            low = ratio < 0.4 * closer
            fell = ratio < 0.5 * best * closer and ratio < 0.7 * closer
            if low or fell:
                return f"{words} is {ratio:.0%} of the teacher's; its best was {best:.0%}"
        return None

    return sign


def saturated(past: Past, closer: float) -> str | None:
    """Colours, contrast or brightness far beyond the teacher's, or pixels that are clipped."""
    for name, words in (("chroma", "colour"), ("contrast", "contrast")):
        ratio = past.ratio(name)
        if ratio is not None and ratio > 1.0 + 0.5 / closer:
            return f"{words} is {ratio:.0%} of the teacher's"
    clipped, usual = past.now("clipped"), past.reference.get("clipped")
    if clipped is not None and usual is not None and clipped - usual > 0.15 / closer:
        return f"{clipped:.0%} of the pixels are black or white, of the teacher's {usual:.0%}"
    exposure, normal = past.now("exposure"), past.reference.get("exposure")
    scale = past.reference.get("contrast")
    if exposure is not None and normal is not None and scale:
        shift = (exposure - normal) / scale
        if abs(shift) > 0.75 / closer:
            way = "brighter" if shift > 0 else "darker"
            return f"clips are {way} than the teacher's by {abs(shift):.2f} of its contrast"
    return None


def learns(past: Past, role: str) -> bool:
    """Whether a role was to move at all since the probe before."""
    rate, updates = past.now(f"{role}_rate"), past.now(f"{role}_updates")
    return bool(updates) and rate is not None and rate >= LEAST_RATE


def lagging(past: Past, closer: float) -> str | None:
    """A critic that stands still, or knows the samples of before better than those of now."""
    moved = past.now("critic_change")
    if learns(past, "critic") and moved is not None and moved < 1e-6 * closer:
        updates = past.now("critic_updates") or 0.0
        return f"the critic's weights moved by {moved:.1e} of their size in {updates:.0f} updates"
    lag = past.now("critic_lag")
    if lag is not None and lag > 1.0 + 0.2 / closer:
        return f"the critic's loss is {lag:.2f} times as large on new samples as on replayed ones"
    return None


def diverging(past: Past, closer: float) -> str | None:
    """A critic that is far worse than it was, and than the teacher is on the same samples."""
    figures = past.probes[-1].figures
    if "critic_fresh" not in figures:
        return None
    loss, excess = figures["critic_fresh"], figures.get("critic_excess")
    if loss is None or excess is None:
        return "the critic's loss on the student's samples is not a finite number"
    least = past.least("critic_fresh")
    worse = excess > 1.0 + 0.75 / closer and loss > (1.0 + 0.75 / closer) * least
    if worse or excess > 1.0 + 2.0 / closer:
        return (
            f"the critic's loss is {loss:.3g}, {loss / max(least, 1e-12):.1f} times its least and "
            f"{excess:.1f} times the teacher's on the same samples"
        )
    return None


def stalling(past: Past, closer: float) -> str | None:
    """Samples that no update changes."""
    moved = past.now("sample_change")
    if learns(past, "generator") and moved is not None and moved < 0.002 * closer:
        updates = past.now("generator_updates") or 0.0
        return (
            f"in {updates:.0f} updates samples changed by {moved:.2%} of the distance between two "
            f"clips"
        )
    return None


def drifting(past: Past, closer: float) -> str | None:
    """Clips that end otherwise than they begin, and more so than the teacher's."""
    drift, usual = past.now("drift"), past.reference.get("drift")
    if drift is None or usual is None or drift - usual <= 0.5 / closer:
        return None
    return (
        f"from its first quarter to its last a clip drifts by {drift:.2f} in brightness, contrast "
        f"or colour (a log ratio; the teacher's by {usual:.2f})"
    )


def broken(past: Past, closer: float) -> str | None:
    """Samples that are no numbers."""
    del closer
    figures = past.probes[-1].figures
    if "contrast" in figures and figures["contrast"] is None:
        return "samples are not finite numbers"
    return None


RULES = (
    Rule(
        "collapse",
        fading(
            {
                "diversity_seeds": "the difference between two seeds of a prompt",
                "diversity_prompts": "the difference between prompts",
                "prompt_effect": "how much more than seeds prompts change a clip",
            }
        ),
        "Go back to a checkpoint from before it. Let the critic keep up (more of its updates per "
        "generator update, loss.generator_every), lower the generator's learning rate, lower "
        "loss.cfg_scale, or add a GAN term on real clips.",
        spoils=True,
    ),
    Rule(
        "static",
        fading({"motion": "motion"}),
        "Go back to a checkpoint from before it. Score samples at higher noise levels "
        "(loss.timestep_shift), lower the generator's learning rate, and look for still clips "
        "among the prompts or the data.",
        spoils=True,
    ),
    Rule(
        "saturation",
        saturated,
        "Lower loss.cfg_scale or the generator's learning rate, let the critic move more often, or "
        "begin from a student of stored trajectories (trainer: ode).",
        spoils=True,
    ),
    Rule(
        "critic_lags",
        lagging,
        "Raise the critic's learning rate or loss.generator_every, so that it moves more often per "
        "generator update; see that it is trained at all.",
    ),
    Rule(
        "critic_diverges",
        diverging,
        "Go back to a checkpoint from before it. Lower the critic's learning rate or its "
        "max_grad_norm.",
        spoils=True,
    ),
    Rule(
        "generator_stalls",
        stalling,
        "Raise the generator's learning rate or max_grad_norm, and see that its gradient is not 0 "
        "and that the average follows it (ema.decay).",
    ),
    Rule(
        "drift",
        drifting,
        "Train on longer rollouts (causal.rollout_frames), keep a sink of first frames "
        "(causal.sink_size), or shorten the clips that are made.",
    ),
    Rule(
        "not_finite",
        broken,
        "Go back to the last checkpoint whose probe was finite, and lower the learning rates.",
        spoils=True,
    ),
)


def judge(probes: Sequence[Probe], reference: Figures, *, patience: int = 2) -> Verdict:
    """What probes in the order of their steps say at the last of them."""
    verdict = Verdict()
    seen, clear = dict.fromkeys(_NAMES, 0), dict.fromkeys(_NAMES, 0)
    for count in range(1, len(probes) + 1):
        past = Past(probes[:count], reference)
        up = {alarm.name: alarm for alarm in verdict.alarms}
        alarms, rose, fell = [], [], []
        for rule in RULES:
            before = up.get(rule.name)
            words = rule.sign(past, 1.0 if before is None else CLOSER)
            seen[rule.name] = seen[rule.name] + 1 if words else 0
            clear[rule.name] = 0 if words else clear[rule.name] + 1
            if before is None and seen[rule.name] >= patience:
                before = Alarm(rule.name, past.probes[-1].step, words or "", rule.advice)
                rose.append(rule.name)
            elif before is not None and clear[rule.name] >= patience:
                before = None
                fell.append(rule.name)
            if before is not None:
                alarms.append(Alarm(rule.name, before.since, words or before.seen, rule.advice))
        verdict = Verdict(tuple(alarms), tuple(rose), tuple(fell))
    return verdict


def well_until(probes: Sequence[Probe], verdict: Verdict, patience: int) -> int | None:
    """The step of the last probe before the signs of an alarm that has just risen; 0 = none is.

    None where none has risen of those whose weights are worth less than the ones before.
    """
    spoiling = {rule.name for rule in RULES if rule.spoils}
    if not spoiling.intersection(verdict.rose):
        return None
    before = probes[: -max(1, patience)]
    return before[-1].step if before else 0


_NAMES = [rule.name for rule in RULES]
_CLOSENESS = (
    "diversity_seeds", "diversity_prompts", "prompt_effect", "motion", "sharpness", "chroma",
    "contrast",
)  # fmt: skip


def score(probe: Probe, reference: Figures, alarms: Sequence[Alarm]) -> float | None:
    """How near a probe's clips are to the teacher's, from 0 to 1; None without a reference.

    The geometric mean of how near each figure is, as the smaller of it and the teacher's over the
    larger; halved for each alarm that is up.
    """
    past = Past([probe], reference)
    near = []
    for name in _CLOSENESS:
        if name in probe.figures and reference.get(name):
            ratio = past.ratio(name)
            near.append(0.0 if ratio is None or ratio <= 0.0 else min(ratio, 1.0 / ratio))
    if not near:
        return None
    mean = math.exp(sum(math.log(max(value, 1e-6)) for value in near) / len(near))
    return float(mean * 0.5 ** len(alarms))
