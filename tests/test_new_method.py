"""The new method of CONTRIBUTING.md, taken from the page: trained, resumed, sampled as it stands.

In a process of its own, since a class that was defined once stays among the methods.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.runs import assert_same_end, read_state, step_folder, unequal
from tests.sources import ROOT

NAME = "guidance_distillation"
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## A new method in one file\n")[2].partition("\n## ")[0]
# Everything below starts from this: the page's file as if it lay in model/.
PRELUDE = "import sys, model; model.__path__.append(sys.argv.pop(1)); "


def block(language: str) -> str:
    """The section's one block in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, flags=re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's file and nothing else."""
    path = tmp_path_factory.mktemp("method")
    (path / f"{NAME}.py").write_text(block("python"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's configuration, its relative folders found in the tiny world."""
    values = yaml.safe_load(block("yaml"))
    values["model_root"] = str(tiny_root / "wan_models")
    values["data"]["path"] = str(tiny_root / values["data"]["path"])
    path = tmp_path_factory.mktemp("config") / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def python(folder: Path, code: str, *words: object) -> str:
    """What `code` prints at the repository root, the folder's files being in model/."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


RUN = """
import importlib, json
for module, words in json.loads(sys.argv[1]):
    assert importlib.import_module(module).main(words) == 0, words
"""


def test_it_trains_resumes_bit_for_bit_and_is_sampled(
    folder: Path, config: Path, tmp_path: Path
) -> None:
    whole, parts, clips = tmp_path / "whole", tmp_path / "parts", tmp_path / "clips"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves right quickly\n", encoding="utf-8")
    same = ["--config_path", str(config)]
    commands = [
        ("train", [*same, "--logdir", str(whole)]),
        ("train", [*same, "--logdir", str(parts), "steps=2"]),
        ("train", [*same, "--logdir", str(parts)]),
        ("inference", [*same, "--checkpoint_path", str(whole), "--data_path", str(prompts),
                       "--output_folder", str(clips), "--fps", "8"]),
    ]  # fmt: skip
    python(folder, RUN, json.dumps(commands))
    assert_same_end(whole, parts, step=4)
    before, after = (read_state(step_folder(whole, step)) for step in (2, 4))
    moved = [key for key in unequal(before, after) if key.startswith("roles.")]
    assert moved
    assert all(key.startswith("roles.generator.") for key in moved)
    assert len(list(clips.glob("*.mp4"))) == 1


@pytest.mark.slow
def test_the_tests_of_methods_and_keys_take_it_as_they_are(folder: Path) -> None:
    code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    told = python(
        folder, code, "-p", "no:cacheprovider", "-k", f"{NAME} or list or those_of_the_trainer",
        "tests/model/test_method_contract.py", "tests/trainer/test_config.py", "-vv",
    )  # fmt: skip
    assert f"[{NAME}-whole] PASSED" in told
    assert f"[{NAME}-blocks] PASSED" in told
    assert "test_every_key_of_a_released_section_is_on_the_list PASSED" in told


def test_its_configuration_is_typed_and_checked_as_those_of_others(
    folder: Path, config: Path
) -> None:
    code = (
        "from pathlib import Path; from trainer.config import load\n"
        "path = Path(sys.argv[1])\n"
        "loss = load(path).loss\n"
        "print(type(loss).__name__, loss.cfg_scale, loss.timestep_shift)\n"
        "for word in ('loss.cfg_scal=1', 'loss.timestep_shift=0'):\n"
        "    try: load(path, [word])\n"
        "    except ValueError as error: print(error)"
    )
    assert python(folder, code, config).splitlines() == [
        "GuidanceDistillationConfig 2.0 5.0",
        "command line: unknown key 'loss.cfg_scal' (did you mean 'loss.cfg_scale'?)",
        "loss.timestep_shift: must be positive, got 0.0",
    ]
