"""Every documented command line and every chain of them, read by the scripts that they call.

Running them takes minutes (tests/test_documented_commands.py, in the slow tier); here each line is
one that its script takes, with a configuration that is valid, and reads what is shipped or what a
line before it makes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from model.wan import block
from scripts import benchmark_rollout, compare_methods
from scripts.compare_methods import STAGES, Comparison, needed
from tests.documented import PAGES, documented
from tests.sources import ROOT
from trainer.config import load
from utils.config import ConfigError

# Flags that name what a script reads; and where it writes, with what it makes there by default.
READS = {
    "checkpoint_path", "config_path", "data_path", "input_path", "caption_path", "prompt_path",
    "teacher_config", "teacher_path", "student_config", "student_path", "run_folder",
    "initial_path", "extended_prompt_path",
}  # fmt: skip
WRITES = {"logdir", "output_path", "output_folder"}
MAKES = {"make_tiny_world.py": {"model_root", "data_path"}}
# What a user must have: releases of real size and data of their own.
OWN = ("wan_models/Wan2.1-T2V-1.3B", "wan_models/Wan2.1-T2V-14B", "data/", "vbench/")


def split(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The script that a line calls, and what it is given."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return Path(words[at]), list(words[at + 1 :])


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """A line as its script understands it. Fails the test if it does not."""
    script, rest = split(words)
    module = f"scripts.{script.stem}" if script.parent.name == "scripts" else script.stem
    parser: argparse.ArgumentParser = importlib.import_module(module).parser()
    try:
        return parser.parse_intermixed_args(rest)
    except SystemExit:
        pytest.fail(f"{script} does not take {rest}")


def paths(args: argparse.Namespace, names: set[str]) -> Iterator[str]:
    """The paths among some flags."""
    for name, value in vars(args).items():
        if name in names and value is not None:
            yield from map(str, value if isinstance(value, list) else [value])


def check_configuration(args: argparse.Namespace) -> None:
    """What a script would load is valid."""
    values = vars(args)
    for key in ("config_path", "teacher_config", "student_config"):
        if values.get(key):
            load(ROOT / values[key], values.get("overrides") or [])


def check_chain(lines: Sequence[Sequence[str]], made: set[str]) -> set[str]:
    """Each line is taken, and reads what is shipped or made before it. Returns all that is made."""
    for words in lines:
        args, script = parsed(words), split(words)[0].name
        check_configuration(args)
        makes = MAKES.get(script, set())
        for path in paths(args, READS - makes):
            known = (ROOT / path).exists() or path.startswith((*made, *OWN))
            there = known or any(other.startswith(f"{path}/") for other in made)
            assert there, f"{script}: nothing makes {path}"
        made |= set(paths(args, WRITES | makes))
    return made


def test_documented_commands_are_taken_and_read_what_is_shipped_or_made_before() -> None:
    lines = [words for page in PAGES for words in documented(page) if words[0] != "bash"]
    assert len(lines) > 20
    check_chain(lines, {"runs/quickstart"})  # README's first line makes it


def recorded_quickstart(folder: Path, *words: str) -> list[list[str]]:
    """The Python commands of scripts/quickstart.sh, which are noted in place of being run."""
    scripts = folder / "scripts"
    scripts.mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", scripts)
    (scripts / "setup_venv.sh").write_text(f'cd "{folder}"; export PATH="{folder}/bin:$PATH"\n')
    (folder / "bin").mkdir(exist_ok=True)
    note = "import json, sys; print(json.dumps(sys.argv[1:]), file=open('lines', 'a'))"
    stub = folder / "bin" / "python"
    stub.write_text(f'#!/usr/bin/env bash\n"{sys.executable}" -c "{note}" "$@"\n')
    stub.chmod(0o755)
    (folder / "lines").unlink(missing_ok=True)
    command = ["bash", str(scripts / "quickstart.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "lines").read_text().splitlines()]


@pytest.mark.parametrize("words", [(), ("--smoke", "--seed", "3")], ids=["whole", "smoke"])
def test_each_stage_of_the_quickstart_reads_what_an_earlier_one_makes(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    lines = recorded_quickstart(tmp_path, *words)
    assert [split(line)[0].name for line in lines] == [
        "make_tiny_world.py", "train.py", "convert_checkpoint.py", "train.py", "inference.py",
        "evaluate.py", "report.py",
    ]  # fmt: skip
    out = "runs/smoke-seed3" if words else "runs/quickstart"
    assert all(path.startswith(out) for path in check_chain(lines, set()))
    noted = (tmp_path / out / "timings.jsonl").read_text().splitlines()
    assert len(noted) == len(lines)


# ---- the comparison of methods


def comparison(folder: Path, *more: str) -> Comparison:
    words = ["--run_folder", str(folder / "quickstart"), "--output_folder", str(folder / "out")]
    return Comparison(compare_methods.parser().parse_args([*words, *more]))


class Commands:
    """Stands in for subprocess.run: notes lines, and fails from the n-th on."""

    def __init__(self, works: int = 1000) -> None:
        self.works = works
        self.lines: list[list[str]] = []

    def __call__(self, words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.lines.append(words[1:])
        return subprocess.CompletedProcess(words, int(len(self.lines) > self.works))


def test_the_recipe_of_every_method_is_a_chain_that_its_scripts_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    monkeypatch.setattr(compare_methods.subprocess, "run", commands)
    compare_methods.train(comparison(tmp_path), needed(list(STAGES)))
    names = [split(line)[0].name for line in commands.lines]
    assert names.count("train.py") == len(STAGES)
    assert names.count("generate_ode_pairs.py") == 1
    check_chain(commands.lines, {str(tmp_path / "quickstart")})


def test_a_recipe_goes_on_where_it_failed_and_a_finished_one_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = needed(["ode_dmd"])
    first, second, third = Commands(works=1), Commands(), Commands()
    monkeypatch.setattr(compare_methods.subprocess, "run", first)
    with pytest.raises(ConfigError, match="stopped with status 1; run this again to go on"):
        compare_methods.train(comparison(tmp_path), names)
    monkeypatch.setattr(compare_methods.subprocess, "run", second)
    compare_methods.train(comparison(tmp_path), names)
    assert first.lines[1] == second.lines[0]
    assert [split(line)[0].name for line in [first.lines[0], *second.lines]] == [
        "generate_ode_pairs.py", "train.py", "convert_checkpoint.py", "train.py",
    ]  # fmt: skip
    monkeypatch.setattr(compare_methods.subprocess, "run", third)
    compare_methods.train(comparison(tmp_path), names)
    assert third.lines == []
    with pytest.raises(ConfigError, match=r"holds runs of other settings \(seed was 0, is 7\)"):
        compare_methods.train(comparison(tmp_path, "--seed", "7"), names)


@pytest.mark.parametrize("variant", benchmark_rollout.VARIANTS)
def test_the_rollout_benchmark_measures_each_kind_of_cache(
    variant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(block, "attend_past", block.attend_past)  # given back after it
    words = ["--latent_shape", "16", "4", "4", "4", "--num_frame_per_block", "2"]
    assert benchmark_rollout.main([*words, "--variant", variant]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["seconds"] > 0.0
    assert measured["mib"] >= 0.0
