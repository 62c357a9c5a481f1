"""Small training runs for tests: their configuration, running them, and reading what they leave."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.base import Trainer
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from utils.distributed import Session, distributed_session

COMMON = """
mixed_precision: false
latent_shape: [16, 5, 4, 4]
steps: 4
batch_size: 4
model_root: {root}/wan_models
logging: {{wandb: false}}
log_every: 1
save_every: 100
keep_checkpoints: 100
timeout_s: 60
"""

# Betas above 0 and a moving schedule, so that a resumed run needs every part of its state.
OPTIMIZER = "lr: 1.0e-3, betas: [0.5, 0.9], max_grad_norm: 1.0, schedule: linear, warmup_updates: 2"

ROLES = """
generator: {{model: Wan2.1-T2V-Tiny, OPTIMIZER}}
critic: {{OPTIMIZER}}
discriminator: {{OPTIMIZER}}
ema: {{decay: 0.5, start_step: 2}}
"""
CAUSAL = """
generator_type: causal
causal: {{num_frame_per_block: 2, independent_first_frame: true}}
"""
PROMPTS = "data: {{path: {root}/data/tiny/prompts.txt}}"
LATENTS = "data: {{path: {root}/data/tiny/latents}}"
PAIRS = "data: {{path: {root}/data/tiny/ode_pairs}}"
PENALTIES = "r1_weight: 0.1, r2_weight: 0.1, r1_sigma: 0.5, r2_sigma: 0.5"
RIVALS = f"adversarial: {{{{relativistic: true, {PENALTIES}}}}}"
SAMPLING = "sampling: {{steps: 2, cfg_scale: 2.0, solver: euler}}"

CONFIGS = {
    "dmd": f"""
trainer: score_distillation
loss: {{{{cfg_scale: 2.0, generator_every: 2}}}}
{PROMPTS}
""",
    "dmd_gan": f"""
trainer: score_distillation
loss: {{{{cfg_scale: 2.0, generator_every: 2, gan_weight: 0.5, {RIVALS}}}}}
{LATENTS}
""",
    "dmd_fdistill": f"""
trainer: score_distillation
loss: {{{{cfg_scale: 2.0, generator_every: 2, divergence: jensen_shannon, critic_pull: 0.1}}}}
{LATENTS}
""",
    "sid": f"""
trainer: score_distillation
distribution_loss: sid
loss: {{{{cfg_scale: 2.0, generator_every: 2}}}}
{PROMPTS}
""",
    "causvid": f"""
trainer: score_distillation
distribution_loss: causvid
loss: {{{{cfg_scale: 2.0, generator_every: 2}}}}
{LATENTS}
{CAUSAL}
""",
    "gan": f"""
trainer: gan
loss: {{{{generator_every: 2, discriminator_warmup_steps: 1, {RIVALS}}}}}
{LATENTS}
""",
    "gan_teacher": f"""
trainer: gan
loss: {{{{generator_every: 2, backbone: teacher}}}}
{LATENTS}
""",
    "ode": f"""
trainer: ode
{PAIRS}
{CAUSAL}
""",
    "consistency": f"""
trainer: ode
distribution_loss: consistency
loss: {{{{cfg_scale: 2.0}}}}
{LATENTS}
{CAUSAL}
""",
    "pdd": f"""
trainer: ode
distribution_loss: pdd
loss: {{{{cfg_scale: 2.0, grid: 8, calls: [2, 4], head_rate: 0.5}}}}
{PROMPTS}
""",
    "diffusion": f"""
trainer: diffusion
loss: {{{{caption_dropout: 0.5}}}}
{LATENTS}
{SAMPLING}
""",
    "causal_diffusion": f"""
trainer: diffusion
loss: {{{{caption_dropout: 0.5, clean_noise: 0.1}}}}
{LATENTS}
{SAMPLING}
{CAUSAL}
""",
    "self_forcing_dmd": f"""
trainer: score_distillation
loss: {{{{cfg_scale: 2.0, generator_every: 2}}}}
{PROMPTS}
{CAUSAL}
""",
    "self_forcing_sid": f"""
trainer: score_distillation
distribution_loss: sid
loss: {{{{cfg_scale: 2.0, generator_every: 2}}}}
{PROMPTS}
{CAUSAL}
""",
}
MUON = {
    "dmd": ("generator.muon_lr=0.01", "critic.muon_lr=0.02"),
    "diffusion": ("generator.muon_lr=0.01",),
}


def write_config(folder: Path, root: Path, name: str) -> Path:
    """Write <folder>/<name>.yaml, a small run of CONFIGS on the tiny world at `root`."""
    path = folder / f"{name}.yaml"
    text = (CONFIGS[name] + ROLES + COMMON).replace("OPTIMIZER", OPTIMIZER)
    path.write_text(text.format(root=root), encoding="utf-8")
    return path


def build(path: Path, logdir: Path, session: Session, *overrides: str) -> Trainer:
    """The trainer of a config file with `overrides`, as train.py builds it."""
    config = load(path, overrides)
    return build_trainer(config, session, RunOptions(logdir, path.stem, wandb=False))


@contextlib.contextmanager
def built(path: Path, logdir: Path, *overrides: str) -> Iterator[Trainer]:
    """A trainer on this one process, its process group open for the length of the body."""
    with distributed_session(timeout_s=60.0) as session:
        yield build(path, logdir, session, *overrides)


def run(path: Path, logdir: Path, *overrides: str) -> Path:
    """Train on this one process from start or checkpoint to the end; returns `logdir`."""
    with built(path, logdir, *overrides) as trainer:
        trainer.train()
    return logdir


def rows(logdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the machine."""
    lines = (logdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    machine = ("seconds_per_step", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in machine} for row in parsed]


def step_folder(logdir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return logdir / "checkpoints" / f"step_{step:06d}"


def read_state(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint by flat name: tensors whole, other values as they are."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        if isinstance(value, TensorStorageMetadata)
        else None
        for key, value in stored.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def unequal(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The names under which two checkpoints differ in any bit."""
    return sorted(
        key
        for key in left.keys() | right.keys()
        if not (key in left and key in right and _same(left[key], right[key]))
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


def assert_same_end(left: Path, right: Path, step: int) -> None:
    """The checkpoints of `step` are equal in every bit, and so are all metrics."""
    states = [read_state(step_folder(logdir, step)) for logdir in (left, right)]
    assert unequal(*states) == []
    assert rows(left) == rows(right)


def cut_after(logdir: Path, copy: Path, step: int) -> Path:
    """Copy a finished run as if it had been killed after `step` was saved, its log running on."""
    shutil.copytree(logdir, copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


def refusal(config: Path, folder: Path, *overrides: str) -> str:
    """What a run says that is not begun."""
    try:
        build(config, folder / "run", Session(0, 1, torch.device("cpu")), *overrides)
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError("the run was begun")
    gc.collect()  # the traceback held the data in a cycle; LMDB opens a folder only once
    assert not (folder / "run").exists()
    return message
