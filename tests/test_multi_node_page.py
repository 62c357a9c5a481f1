"""docs/multi_node.md: its commands are what the launchers and parsers take, its errors are ours."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed.elastic.multiprocessing.api as processes
import torch.distributed.elastic.rendezvous.api as rendezvous
from torch.distributed.elastic.multiprocessing import errors
from torch.distributed.run import get_args_parser

import train
from scripts import make_tiny_world, this_host
from tests.documented import documented, script_of
from tests.sources import ROOT, sources
from tests.test_launch import TORCHRUN, TRAINER, Cluster, launch, own_address
from trainer.config import load
from utils import watch

MODULES = (rendezvous, errors, processes)
PAGE = "docs/multi_node.md"
COMMANDS = documented(PAGE)
OURS = [words for words in COMMANDS if "launch_torchrun.sh" in script_of(words)]


def check_training(words: Sequence[str], ranks: int) -> None:
    """The words after train.py are ones that it takes, and the batch divides over the ranks."""
    args = train.parser().parse_intermixed_args(words)
    config = load(ROOT / args.config_path, args.overrides)
    assert config.batch_size % (ranks * config.accumulation) == 0


def here(word: str) -> str:
    """Addresses of the page become this machine's."""
    return re.sub(r"10\.0\.0\.1|fd00:10::1", own_address(), word)


def test_the_page_shows_each_way_to_start() -> None:
    scripts = [script_of(words) for words in COMMANDS]
    assert sorted(set(scripts)) == [
        "launch_slurm.sh", "launch_torchrun.sh", "make_tiny_world.py", "this_host.py", "train.py",
    ]  # fmt: skip
    assert len(OURS) == 3


def test_torchrun_takes_the_command_for_two_hosts() -> None:
    (words,) = [words for words in COMMANDS if words[0] == "torchrun"]
    args = get_args_parser().parse_args(words[1:])
    assert (args.training_script, args.rdzv_backend, args.nnodes) == ("train.py", "c10d", "2")
    check_training(args.training_script_args, 2 * int(args.nproc_per_node))


@pytest.mark.parametrize("words", OURS, ids=[str(number) for number in range(len(OURS))])
def test_the_launch_script_makes_a_command_of_its_lines_that_torchrun_takes(
    words: list[str],
) -> None:
    at = words.index("bash")
    variables = dict(word.split("=", 1) for word in map(here, words[:at]))
    assert ROOT / words[at + 1] == TORCHRUN
    done = launch(*words[at + 2 :], NPROC_PER_NODE="8", DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    made = shlex.split(done.stdout)
    args = get_args_parser().parse_args(made[3:])
    assert made[1:3] == ["-m", "torch.distributed.run"]
    assert args.training_script == str(ROOT / "train.py")
    assert args.training_script_args == words[at + 2 :]
    assert args.nnodes == variables["NNODES"]
    check_training(args.training_script_args, 16)


def test_slurm_is_given_its_own_words_and_the_rest_reaches_the_launcher(tmp_path: Path) -> None:
    (words,) = [words for words in COMMANDS if words[0] == "sbatch"]
    at = words.index("scripts/launch_slurm.sh")
    assert words[1:at] == ["--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00"]
    cluster = Cluster(tmp_path, TRAINER)
    assert cluster.submit(*words[at + 1 :]).returncode == 0
    assert cluster.lines()[-1] == f"begun {' '.join(words[at + 1 :])}"
    check_training(words[at + 1 :], 16)


def test_the_checks_run(capsys: pytest.CaptureFixture[str]) -> None:
    (asked,) = [words for words in COMMANDS if script_of(words) == "this_host.py"]
    assert this_host.main([here(word) for word in asked[2:]]) == 0
    own, address, interface = capsys.readouterr().out.split()
    assert (own, address) == ("true", own_address())
    assert interface
    (made,) = [words for words in COMMANDS if script_of(words) == "make_tiny_world.py"]
    make_tiny_world.parser().parse_args(made[2:])


def rows(title: str) -> list[str]:
    """The first cells of the table that follows `title`."""
    text = (ROOT / PAGE).read_text(encoding="utf-8").partition(title)[2].lstrip()
    lines = text.partition("\n\n")[0].splitlines()[2:]
    return [line.split("|")[1] for line in lines]


def test_every_error_of_ours_on_the_page_is_one_that_is_raised() -> None:
    said = "".join(source.text for source in sources())
    said += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.sh"))
    joined = re.sub(r'"\s+f?"|" \\\n\s+"', "", said)  # texts that go on in the next line
    quoted = [re.search(r"`(.*)`", row) for row in rows("## What errors mean\n")]
    assert len(quoted) > 10
    missing = [found.group(1) for found in quoted if found and found.group(1) not in joined]
    assert missing == []


def test_every_error_of_torchrun_on_the_page_exists() -> None:
    named = re.findall(r"`(\w+(?:Error|Exception))`", "".join(rows("What others say:\n")))
    assert len(named) == 5
    assert [name for name in named if not any(hasattr(m, name) for m in MODULES)] == []


def test_the_page_tells_the_limits_that_the_code_has() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert f"every {watch.BEAT_S:g} seconds" in text
    assert f"no life for {watch.DEAD_BEATS * watch.BEAT_S:g} s" in text
    assert f"for {watch.URGENT_BEATS * watch.BEAT_S:g} s if a connection" in text
