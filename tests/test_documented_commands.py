"""Every command that the README shows is run, in miniature, in a copy of what a clone holds."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest

import train
from model.gan import GANConfig
from model.pdd import PDDConfig
from tests.documented import PAGES, documented, script_of
from tests.methods import methods
from trainer.config import (
    DEFAULT_CONFIG,
    Config,
    generator_model,
    load,
    method_class,
    method_name,
    method_needs,
)
from trainer.registry import TRAINERS
from utils.data.dataset import open_dataset

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SHIPPED = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path != DEFAULT_CONFIG]
MINIATURE = {
    "make_tiny_world.py": ["--clips", "64"],
    "train.py": ["steps=2", "batch_size=4", "log_every=1", "validation.every=2"],
    "evaluate.py": ["--clips", "4"],
    "inference.py": [],
    "convert_checkpoint.py": [],
    "generate_ode_pairs.py": ["--num_pairs", "8", "--steps", "4"],
    "precompute_prompts.py": [],
    "report.py": [],
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that sees the repository's files, but not its runs, models or data."""
    folder = tmp_path_factory.mktemp("clone")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in {line.split("/")[0] for line in names.splitlines()}:
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # dozens of commands, each of which imports torch
def test_the_commands_of_the_readme_run_one_after_the_other(clone: Path) -> None:
    every = [words for page in PAGES for words in documented(page)]
    commands = [words for words in every if script_of(words) in MINIATURE]
    local = [words for words in commands if "--nnodes" not in words]
    assert {script_of(words) for words in local} == set(MINIATURE)
    for words in local:
        run([*words, *MINIATURE[script_of(words)]], clone)
    assert len(list((clone / "videos" / "tiny").glob("*.mp4"))) == 6
    assert len(list((clone / "videos" / "long").glob("*.mp4"))) == 6
    assert len(list((clone / "videos" / "tiny_i2v").glob("*.mp4"))) == 6
    assert len(list((clone / "videos" / "vbench" / "videos").glob("*.mp4"))) == 30
    assert (clone / "runs" / "tiny" / "evaluation" / "table.md").is_file()
    serve(next(w for w in documented("README.md") if script_of(w) == "demo.py"), clone)


def serve(words: list[str], folder: Path) -> None:
    """Start the demo, read its page, stop it as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [port if before == "--port" else word for before, word in zip(["", *words], words)]  # noqa: B905
    server = subprocess.Popen(words, cwd=folder, env=environment(), stderr=subprocess.PIPE)
    try:
        page = ""
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
                break
            except OSError:
                assert server.poll() is None, server.stderr.read() if server.stderr else ""
                time.sleep(0.25)
        assert "<video" in page or "prompt" in page
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130)


def test_cluster_commands_name_configs_that_divide_over_their_ranks() -> None:
    commands = [words for words in documented("README.md") if "--nnodes" in words]
    names = []
    for words in commands:
        after = dict(pairwise(words))
        config = load(ROOT / after["--config_path"])
        ranks = int(after["--nnodes"]) * int(after["--nproc_per_node"])
        assert config.batch_size % (ranks * config.accumulation) == 0
        names.append(after["--config_path"])
    assert names == ["configs/dmd.yaml", "configs/self_forcing_14b_dmd.yaml"]


def test_the_headers_of_configurations_show_their_own_command() -> None:
    for path in SHIPPED:
        header = "".join(x[1:] for x in path.read_text().splitlines() if x.startswith("#"))
        words = header.partition("Command:")[2].replace("\\", " ").split()
        assert words[words.index("--config_path") + 1] == str(path.relative_to(ROOT)), path


def test_the_configuration_to_begin_with_needs_nothing_but_prompts() -> None:
    config = load(CONFIGS / "dmd.yaml")
    needs = method_needs(config)
    assert (method_name(config), config.generator_type) == ("dmd", "bidirectional")
    assert not (needs.latents or needs.trajectories)
    roles = (config.generator, config.critic, config.teacher)
    assert [role.model for role in roles] == ["Wan2.1-T2V-1.3B"] * 3
    larger = load(CONFIGS / "dmd.yaml", ["teacher.model=Wan2.1-T2V-14B"])
    assert (larger.generator, larger.critic) == (config.generator, config.critic)
    assert larger.teacher.model == "Wan2.1-T2V-14B"


def shrunk(config: Config, root: Path) -> list[str]:
    """The overrides that take any run down to the tiny world at `root`."""
    needs, blocks = method_needs(config), config.generator_type == "causal"
    name = generator_model(config)
    whole = "TI2V" in name  # whose latents are not Wan2.1's
    model = "Wan2.2-TI2V-Tiny" if whole else "Wan2.1-I2V-Tiny"
    model = model if "I2V" in name else "Wan2.1-T2V-Tiny"
    model = "Wan2.2-T2V-A14B-Tiny" if "A14B" in name else model
    given = config.causal.given_first_frame or config.data.image_share
    images = model == "Wan2.1-I2V-Tiny" or given
    latents = needs.latents or images
    kind = ("latents_16" if whole else "latents") if latents else "prompts.txt"
    toy = [
        f"model_root={root / 'wan_models'}",
        f"data.path={root / 'data' / 'tiny' / ('ode_pairs' if needs.trajectories else kind)}",
        f"latent_shape={'[48,5,2,2]' if whole else '[16,5,4,4]'}",
        "steps=1",
        "batch_size=2",
        "accumulation=1",
        "validation.every=0",
        "discriminator.layers=[]",
        "parallel.context=1",
    ]
    for role in needs.networks:
        toy += [f"{role}.model={model}", f"{role}.weights=null"]
        if role in config.networks:  # what other runs have left
            toy += [
                f"{role}.{key}" for key in ("adapters=[]", "weights_high=null", "weights_low=null")
            ]
    if blocks:
        toy += ["causal.num_frame_per_block=2", "causal.independent_first_frame=true"]
        toy += [] if config.causal.rollout_frames is None else ["causal.rollout_frames=7"]
        toy += [] if config.causal.local_attn_size is None else ["causal.local_attn_size=4"]
        toy += [] if config.causal.sink_size == 0 else ["causal.sink_size=1"]
    if isinstance(config.loss, PDDConfig) and config.loss.uncond_skips:
        toy += ["loss.uncond_skips=[0]"]  # the toy has no more than two blocks
    if isinstance(config.loss, GANConfig):
        toy += ["loss.discriminator_warmup_steps=0"]  # of one step nothing would be left
    return toy


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(CONFIGS)) for path in SHIPPED])
def test_every_shipped_configuration_takes_one_step_at_toy_size(
    path: Path, tiny_root: Path, experts_root: Path, tmp_path: Path
) -> None:
    config = load(path)
    toy = shrunk(config, experts_root if "A14B" in generator_model(config) else tiny_root)
    line = ["--config_path", str(path), "--logdir", str(tmp_path), "--disable-wandb", *toy]
    assert train.main(line) == 0
    assert (tmp_path / "checkpoints" / "step_000001").is_dir()


def test_prompts_that_a_shipped_configuration_names_are_shipped() -> None:
    named = {load(path).data.path for path in SHIPPED}
    own = [path for path in named if path.startswith("prompts/")]
    assert own
    assert all(len(open_dataset(ROOT / path)) > 0 for path in own)


def test_every_trainer_has_a_shipped_configuration_and_so_has_every_method() -> None:
    shipped = [load(path) for path in SHIPPED]
    assert {config.trainer for config in shipped} == set(TRAINERS)
    assert {method_class(config) for config in shipped} == set(methods())


def test_the_shell_commands_of_the_readme_are_scripts_that_parse() -> None:
    scripts = [words[1] for words in documented("README.md") if words[0] == "bash"]
    assert scripts == ["scripts/quickstart.sh", "scripts/test.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", "1e3", "12345678901234567"])
def test_the_quickstart_refuses_what_is_no_seed_before_it_does_anything(
    seed: str, tmp_path: Path
) -> None:
    script = ROOT / "scripts" / "quickstart.sh"
    words = ["bash", str(script), "--seed", seed, "--output_folder", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    said = f"error: --seed {seed}: must be a whole number of at most 15 digits\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quickstart_runs_in_miniature_and_its_second_call_does_nothing_twice(
    tmp_path: Path,
) -> None:
    words = ["bash", "scripts/quickstart.sh", "--smoke", "--output_folder", str(tmp_path / "out")]
    run(words, ROOT)
    summary = (tmp_path / "out" / "summary.json").stat().st_mtime_ns
    weights = (tmp_path / "out" / "student" / "checkpoints" / "latest").stat().st_mtime_ns
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 12
    run(words, ROOT)
    assert (tmp_path / "out" / "summary.json").stat().st_mtime_ns > summary
    assert (tmp_path / "out" / "student" / "checkpoints" / "latest").stat().st_mtime_ns == weights


def test_no_page_was_left_with_a_placeholder() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        f"{page.name}: {line}"
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.strip() in ("TABLE", "TODO", "TBD")
    ]
    assert not found
