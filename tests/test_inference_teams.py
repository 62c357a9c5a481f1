"""inference.py with several ranks to a clip: the clips of one rank, written once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import inference
from pipeline.generator import VideoGenerator
from tests.commands import no_weights, own_logging
from tests.ranks import run_on_ranks
from tests.runs import write_config
from utils.config import ConfigError
from utils.context_parallel import Ulysses
from utils.distributed import Session, distributed_session
from utils.media.manifest import claim_folder

__all__ = ["no_weights", "own_logging"]

PROMPTS = ("a red circle moves right", "a green bar moves up")
WINDOW = ("causal.local_attn_size=4", "causal.sink_size=1")
RELATIVE = ("causal.local_attn_size=3", "causal.relative_positions=true")
TOLERANCE = 1e-6  # relative to the largest latent, whichever way; measured: below 5e-7


@dataclass(frozen=True)
class World:
    """Configurations and weights of a miniature."""

    folder: Path
    weights: Path

    def words(self, output: Path, method: str, *more: str) -> list[str]:
        return [
            "--config_path", str(self.folder / f"{method}.yaml"),
            "--checkpoint_path", str(self.weights),
            "--data_path", str(self.folder / "prompts.txt"), "--output_folder", str(output), *more,
        ]  # fmt: skip


@dataclass
class Made:
    """What a rank made in one call."""

    latents: list[Tensor] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    exchanges: int = 0  # of tokens for heads, or back


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    folder = tmp_path_factory.mktemp("teams")
    for method in ("dmd", "diffusion", "self_forcing_dmd", "causal_diffusion"):
        write_config(folder, tiny_root, method)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return World(folder, tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")


@contextmanager
def watched() -> Iterator[Made]:
    """Fills with what this rank samples and writes."""
    made, sample, save = Made(), VideoGenerator.latents, inference.save_mp4
    exchange = Ulysses.all_to_all

    def sampled(self: VideoGenerator, *args: Any, **words: Any) -> Tensor:
        made.latents.append(sample(self, *args, **words))
        return made.latents[-1]

    def saved(clip: Tensor, path: Path, **words: Any) -> str:
        made.written.append(path.name)
        return save(clip, path, **words)

    def exchanged(self: Ulysses, x: Tensor) -> Tensor:
        made.exchanges += 1
        return exchange(self, x)

    with (
        patch.object(Ulysses, "all_to_all", exchanged),
        patch.object(VideoGenerator, "latents", sampled),
        patch.object(inference, "save_mp4", saved),
    ):
        yield made


def make_with(all_ranks: Session, lines: Sequence[Sequence[str]]) -> list[Made]:
    """Each command line in turn, within one process group."""
    found = []
    for line in lines:
        args = inference.parser().parse_intermixed_args(line)
        plan = inference.prepare(args)
        session = replace(all_ranks, group=plan.team.ranks)
        settings = inference.settings_of(args, plan)
        clips = inference.records(plan.jobs, args.output_folder)
        weights = plan.source.files
        whole = claim_folder(args.output_folder, settings, weights, clips, session)
        with watched() as made:
            inference.run(args, plan, session, whole)
        found.append(made)
    return found


def make_on_ranks(lines: Sequence[Sequence[str]]) -> list[Made]:
    with distributed_session(timeout_s=60.0) as all_ranks:
        return make_with(all_ranks, lines)


CASES: dict[str, tuple[str, ...]] = {
    "whole clips": ("dmd",),
    "guided": ("diffusion",),
    "cached": ("self_forcing_dmd",),
    "window": ("self_forcing_dmd", *WINDOW),
    "relative": ("self_forcing_dmd", *RELATIVE),
    "guided and cached": ("causal_diffusion",),
}
PAIRS = [(name, "--context=2") for name in CASES] + [
    (name, "--cfg_parallel") for name in ("guided", "guided and cached")
]
Runs = dict[tuple[str, str], list[Made]]  # of each case and flag, what each rank made


def make_all(
    world: World, folder: Path, ranks: int, cases: Sequence[tuple[str, str]], *more: str
) -> Runs:
    lines = [
        world.words(folder / f"{i}", *CASES[name], *flags.split(), *more)
        for i, (name, flags) in enumerate(cases)
    ]
    found = run_on_ranks(ranks, make_on_ranks, lines, timeout_s=200.0)
    return {case: [rank[i] for rank in found] for i, case in enumerate(cases)}


@pytest.fixture(scope="module")
def pairs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_all(world, tmp_path_factory.mktemp("pairs"), 2, PAIRS)


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every case on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    lines = [world.words(folder / name, *words) for name, words in CASES.items()]
    found = make_with(Session(0, 1, torch.device("cpu")), lines)
    return dict(zip(CASES, found, strict=True))


def check(team: list[Made], alone: list[Tensor]) -> None:
    first, *others = team
    for other in others:
        assert len(other.latents) == len(first.latents)
        for mine, theirs in zip(first.latents, other.latents, strict=True):
            assert torch.equal(mine, theirs), "ranks of a team have one result"
        assert other.written == []
    for mine, expected in zip(first.latents, alone, strict=True):
        error = float((mine - expected).abs().max() / expected.abs().max())
        print(f"{error:.1e}")
        assert error < TOLERANCE


@pytest.mark.parametrize("case", PAIRS, ids="-".join)
def test_two_ranks_to_a_clip_make_the_clip_of_one_and_one_of_them_writes_it(
    case: tuple[str, str], pairs: Runs, alone: dict[str, Made]
) -> None:
    check(pairs[case], alone[case[0]].latents)
    assert pairs[case][0].written == alone[case[0]].written
    assert all(bool(made.exchanges) is ("context" in case[1]) for made in pairs[case])


BOTH = ("guided and cached", "--context=2 --cfg_parallel")
TEAMS = ("cached", "--context=2")


@pytest.fixture(scope="module")
def fours(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_all(world, tmp_path_factory.mktemp("fours"), 4, [BOTH, TEAMS])


@pytest.mark.slow
def test_four_ranks_share_tokens_and_guidance_of_a_clip(
    fours: Runs, alone: dict[str, Made]
) -> None:
    check(fours[BOTH], alone[BOTH[0]].latents)
    assert fours[BOTH][0].written == alone[BOTH[0]].written


@pytest.mark.slow
def test_two_teams_of_two_ranks_divide_the_clips(fours: Runs, alone: dict[str, Made]) -> None:
    made, expected = fours[TEAMS], alone[TEAMS[0]]
    for team, number in ((made[:2], 0), (made[2:], 1)):
        check(team, expected.latents[number : number + 1])
        assert team[0].written == expected.written[number : number + 1]


@pytest.mark.slow
def test_a_whole_call_by_two_ranks_leaves_the_folder_of_one(world: World, tmp_path: Path) -> None:
    line = world.words(tmp_path / "two", "dmd", "--context", "2")
    assert run_on_ranks(2, inference.main, line) == [0, 0]
    assert inference.main(world.words(tmp_path / "one", "dmd")) == 0
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two")]
    assert names[0] == names[1]


def refused(world: World, folder: Path, ranks: int, method: str, *more: str) -> list[str]:
    """What is said of a call by so many ranks."""
    line = world.words(folder / "clips", method, *more)
    args = inference.parser().parse_intermixed_args(line)
    with (
        patch.dict("os.environ", {"WORLD_SIZE": str(ranks), "RANK": "0"}),
        pytest.raises(ConfigError) as caught,
    ):
        inference.prepare(args)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("ranks", "method", "words", "said"),
    [
        (1, "dmd", ("--context=0",), ["--context: must be at least 1, got 0"]),
        (
            1,
            "dmd",
            ("--context=2",),
            [
                "--context: 2 ranks must divide the 1 ranks of this host (torchrun "
                "--nproc_per_node); choose one of 1"
            ],
        ),
        (
            4,
            "dmd",
            ("--context=4",),
            [
                "--context: 4 ranks must divide the 2 attention heads of the generator; choose "
                "one of 1, 2"
            ],
        ),
        (
            2,
            "diffusion",
            ("--context=2", "--size=80x48"),
            [
                "--context: 2 ranks must divide the 15 tokens of a frame of 80 x 48 pixels; "
                "choose one of 1"
            ],
        ),
        (
            2,
            "diffusion",
            ("--context=2", "--cfg_parallel"),
            [
                "--cfg_parallel with --context 2: 4 ranks must divide the 2 ranks of this host "
                "(torchrun --nproc_per_node); choose one of 1, 2"
            ],
        ),
        *(
            (
                2,
                method,
                ("--cfg_parallel", *words),
                [
                    "--cfg_parallel: these clips are made without guidance, in one pass per "
                    "step; leave the flag out, or ask for a --cfg_scale other than 1 where the "
                    "model has one"
                ],
            )
            for method, words in (("dmd", ()), ("diffusion", ("--cfg_scale=1",)))
        ),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_team_that_cannot_make_the_clips_is_refused_before_weights_are_read(
    ranks: int,
    method: str,
    words: Sequence[str],
    said: list[str],
    world: World,
    tmp_path: Path,
) -> None:
    assert refused(world, tmp_path, ranks, method, *words) == said
