"""Alarms on sequences of figures: which one rises, when, what it says, and when it falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.utils.health.test_figures import clips
from utils.health.alarms import RULES, Probe, judge, score
from utils.health.figures import measure

REFERENCE = {
    "exposure": 0.45, "contrast": 0.2, "chroma": 0.07, "sharpness": 0.08, "clipped": 0.03,
    "motion": 0.034, "drift": 0.05, "diversity_seeds": 0.17, "diversity_prompts": 0.42,
    "prompt_effect": 2.5,
}  # fmt: skip
NETWORKS = {
    "generator_change": 1e-3, "generator_updates": 5.0, "generator_rate": 1.0,
    "critic_change": 5e-3, "critic_updates": 15.0, "critic_rate": 1.0, "critic_fresh": 0.3,
    "critic_excess": 0.98, "critic_lag": 1.02, "sample_change": 0.1,
}  # fmt: skip
HEALTHY = {**REFERENCE, **NETWORKS}

Changes = Mapping[str, float | None]


def probes(*changes: Changes) -> list[Probe]:
    """Probes every 10 steps, healthy but for what is said."""
    return [Probe(10 * (i + 1), {**HEALTHY, **change}) for i, change in enumerate(changes)]


def names(sequence: Sequence[Probe], patience: int = 2) -> list[str]:
    """The alarms that are up at the end."""
    return [alarm.name for alarm in judge(sequence, REFERENCE, patience=patience).alarms]


def test_a_healthy_run_raises_none() -> None:
    assert names(probes(*[{}] * 20)) == []


def test_an_early_student_that_is_paler_and_slower_than_its_teacher_raises_none() -> None:
    pale = {name: 0.72 * value for name, value in REFERENCE.items()}
    assert names(probes(pale, pale, pale, {})) == []


SICK: list[tuple[str, Changes]] = [
    ("collapse", {"diversity_seeds": 0.02}),
    ("collapse", {"diversity_prompts": 0.05}),
    ("collapse", {"prompt_effect": 1.1}),
    ("static", {"motion": 0.002}),
    ("saturation", {"chroma": 0.15}),
    ("saturation", {"contrast": 0.4}),
    ("saturation", {"clipped": 0.4}),
    ("saturation", {"exposure": 0.75}),
    ("saturation", {"exposure": 0.1}),
    ("critic_lags", {"critic_change": 0.0}),
    ("critic_lags", {"critic_lag": 1.25}),
    ("critic_diverges", {"critic_fresh": 0.6, "critic_excess": 2.0}),
    ("critic_diverges", {"critic_excess": 9.0}),
    ("critic_diverges", {"critic_fresh": None, "critic_excess": None}),
    ("generator_stalls", {"sample_change": 0.0}),
    ("drift", {"drift": 0.9}),
    ("not_finite", {"contrast": None}),
]


@pytest.mark.parametrize(("name", "sick"), SICK)
def test_each_sickness_raises_its_alarm_at_the_second_probe_and_no_other(
    name: str, sick: Changes
) -> None:
    assert names(probes({}, sick)) == []
    verdict = judge(probes({}, sick, sick), REFERENCE)
    assert [alarm.name for alarm in verdict.alarms] == [name]
    assert verdict.rose == (name,)
    assert verdict.alarms[0].since == 30
    assert verdict.alarms[0].seen
    assert verdict.alarms[0].advice


@pytest.mark.parametrize(("name", "sick"), SICK)
def test_it_falls_after_two_healthy_probes_and_is_told_once(name: str, sick: Changes) -> None:
    sequence = probes({}, sick, sick, sick, {}, {}, {})
    verdicts = [judge(sequence[: n + 1], REFERENCE) for n in range(len(sequence))]
    assert [verdict.rose for verdict in verdicts].count((name,)) == 1
    assert [verdict.fell for verdict in verdicts] == [(), (), (), (), (), (name,), ()]
    assert [len(verdict.alarms) for verdict in verdicts] == [0, 0, 1, 1, 1, 0, 0]


def test_every_rule_has_been_seen_to_rise() -> None:
    assert {rule.name for rule in RULES} == {name for name, _ in SICK}


def test_a_single_bad_probe_raises_nothing_and_patience_says_how_many_do() -> None:
    bad: Changes = {"motion": 0.0}
    assert names(probes(bad, {}, bad, {})) == []
    assert names(probes({}, bad), patience=1) == ["static"]
    assert names(probes(bad, bad, bad, {}), patience=4) == []


def test_a_figure_that_hovers_at_its_limit_does_not_flicker() -> None:
    around = [{"motion": REFERENCE["motion"] * (0.39 + 0.05 * (i % 2))} for i in range(20)]
    begun = probes({"motion": 0.001}, {"motion": 0.001}, *around)
    verdicts = [judge(begun[: n + 1], REFERENCE) for n in range(len(begun))]
    assert sum(len(verdict.rose) for verdict in verdicts) == 1
    assert sum(len(verdict.fell) for verdict in verdicts) == 0


def test_diversity_far_below_its_own_best_is_a_collapse_before_it_is_below_the_teachers() -> None:
    half = {"diversity_seeds": 0.5 * REFERENCE["diversity_seeds"]}
    full = {"diversity_seeds": 1.3 * REFERENCE["diversity_seeds"]}
    assert names(probes(half, half, half)) == []
    assert names(probes(full, half, half)) == ["collapse"]


def test_a_role_whose_rate_has_decayed_is_not_blamed_for_standing_still() -> None:
    still = {"sample_change": 0.0, "critic_change": 0.0}
    done = {**still, "generator_rate": 0.01, "critic_rate": 0.01}
    assert names(probes(done, done, done)) == []
    waiting = {"sample_change": 0.0, "generator_updates": 0.0}
    assert names(probes(waiting, waiting)) == []


def test_without_a_teacher_only_what_needs_none_is_judged() -> None:
    sick = {"diversity_seeds": 0.0, "motion": 0.0, "chroma": 9.0, "sample_change": 0.0}
    found = judge(probes(sick, sick), {})
    assert [alarm.name for alarm in found.alarms] == ["generator_stalls"]


def test_figures_that_were_not_measured_raise_nothing() -> None:
    assert names([Probe(n, {"exposure": 0.45}) for n in range(4)]) == []


def test_an_alarm_tells_the_newest_figures_and_since_when() -> None:
    sequence = probes({}, {"motion": 0.01}, {"motion": 0.01}, {"motion": 0.0034})
    (alarm,) = judge(sequence, REFERENCE).alarms
    assert alarm.seen == "motion is 10% of the teacher's; its best was 100%"
    assert alarm.since == 30


# ---- on videos


def of(video: float, **kinds: bool) -> Probe:
    """A probe of clips drawn by hand."""
    x = clips(8, frames=9, side=8, seed=1)
    if kinds.get("collapsed"):
        x = x[:1].expand(8, -1, -1, -1, -1)
    if kinds.get("still"):
        x = x[:, :, :1].expand(-1, -1, 9, -1, -1)
    if kinds.get("garish"):
        x = ((x - 0.5) * 4.0 + 0.5).clamp(0.0, 1.0)
    if kinds.get("fading"):
        x = x + 0.4 * (x.new_tensor(range(9)) / 8.0)[None, None, :, None, None]
    return Probe(int(video), measure(x, 2, pixels=True))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("collapsed", "collapse"), ("still", "static"), ("garish", "saturation"),
        ("fading", "drift"),
    ],
)  # fmt: skip
def test_videos_that_are_sick_raise_the_right_alarm_within_two_probes(kind: str, name: str) -> None:
    teacher = measure(clips(8, frames=9, side=8, seed=2), 2, pixels=True)
    found = judge([of(1), of(2, **{kind: True}), of(3, **{kind: True})], teacher)
    assert name in [alarm.name for alarm in found.alarms]
    assert judge([of(1), of(2), of(3)], teacher).alarms == ()


# ---- the score


def test_a_student_like_its_teacher_scores_1_and_each_alarm_halves_it() -> None:
    (probe,) = probes({})
    assert score(probe, REFERENCE, ()) == pytest.approx(1.0)
    alarms = judge(probes({"drift": 0.9}, {"drift": 0.9}), REFERENCE).alarms
    assert score(probe, REFERENCE, alarms) == pytest.approx(0.5)


def test_too_much_costs_as_much_as_too_little() -> None:
    more, less = (probes({"motion": factor * REFERENCE["motion"]})[0] for factor in (2.0, 0.5))
    expected = 0.5 ** (1 / 7)
    assert score(more, REFERENCE, ()) == pytest.approx(expected)
    assert score(less, REFERENCE, ()) == pytest.approx(expected)


def test_there_is_no_score_without_a_teacher_and_none_for_broken_clips() -> None:
    (probe,) = probes({"motion": None})
    assert score(probe, {}, ()) is None
    assert (score(probe, REFERENCE, ()) or 0.0) < 0.15
