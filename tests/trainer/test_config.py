"""The root configuration: shipped files, the list of all keys, and the rules between values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from model.base import Method
from model.diffusion import Diffusion, DiffusionConfig
from model.dmd import DMD, DMDConfig
from model.gan import GAN
from model.ode import ODE
from tests.methods import methods
from trainer.config import (
    DEFAULT_CONFIG,
    RENAMED,
    Config,
    first_sigmas,
    load,
    method_class,
    problems,
)
from trainer.networks import TrainedNetworkConfig
from trainer.registry import TRAINERS
from utils.config import ConfigError

CONFIGS = DEFAULT_CONFIG.parent
GOLDEN = Path(__file__).parent / "config_keys.txt"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path != DEFAULT_CONFIG)

MINIMAL = """
trainer: score_distillation
steps: 10
batch_size: 4
generator: {model: a, lr: 1.0e-3}
data: {path: prompts.txt}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def keys(section: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def all_keys() -> list[str]:
    """Every key, those of `loss` once per method, as loss[method]."""
    found = [key for key in keys(Config()) if not key.startswith("loss.")]
    for method in methods():
        name = method.__module__.removeprefix("model.")
        found += [f"loss[{name}].{key}" for key in keys(method.config_class())]
    return sorted(found)


def test_every_key_of_a_released_section_is_on_the_list() -> None:
    """A new method is none until its first key is listed."""
    listed = GOLDEN.read_text().splitlines()
    released = {key.partition(".")[0] for key in listed}
    sections = {key: key.partition(".")[0] for key in all_keys()}
    found = [k for k, name in sections.items() if name in released or not name.startswith("loss[")]
    changes = difflib.unified_diff(listed, found, str(GOLDEN), "configuration", lineterm="")
    assert listed == found, "\n".join(changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_configuration_loads(path: Path) -> None:
    load(path)


@pytest.mark.parametrize(
    "path", [DEFAULT_CONFIG, *SHIPPED], ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_shipped_configuration_begins_with_a_comment(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_a_file_overrides_the_defaults_and_the_command_line_overrides_both(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "timestep_shift: 3.0\nseed: 1\n")
    config = load(minimal, ["seed=2", "loss.cfg_scale=2.5"])
    assert (config.timestep_shift, config.seed, config.loss) == (3.0, 2, DMDConfig(cfg_scale=2.5))


def test_the_loss_section_is_that_of_the_selected_method(minimal: Path) -> None:
    config = load(minimal, ["trainer=diffusion", "loss.caption_dropout=0.2"])
    assert config.loss == DiffusionConfig(caption_dropout=0.2)


def test_a_key_of_another_methods_loss_is_unknown(minimal: Path) -> None:
    assert error_of(minimal, "loss.caption_dropout=0.2").startswith(
        "command line: unknown key 'loss.caption_dropout'"
    )


def choices(trainer: str) -> str:
    """The methods of a trainer."""
    own = [cls.__module__.removeprefix("model.") for cls in methods() if cls.trainer == trainer]
    assert TRAINERS[trainer].usual in own
    return ", ".join(sorted(own))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_unknown_method_is_answered_with_those_of_the_trainer(
    minimal: Path, trainer: str
) -> None:
    message = error_of(minimal, f"trainer={trainer}", "distribution_loss=unheard_of")
    assert message == (
        "command line: distribution_loss: 'unheard_of' is unknown, choose one of "
        f"{choices(trainer)} (trainer: {trainer})"
    )


def test_a_misspelt_method_names_its_source_and_the_nearest(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "distribution_loss: dmdd\n")
    assert error_of(minimal) == (
        f"{minimal}: distribution_loss: 'dmdd' is unknown, choose one of causvid, dmd, "
        "phased_dmd, sid; did you mean 'dmd'? (trainer: score_distillation)"
    )


@pytest.mark.parametrize(
    ("trainer", "method"),
    [("score_distillation", "diffusion"), ("ode", "diffusion"), ("gan", "dmd"), ("ode", "gan")],
)
def test_a_method_of_another_trainer_is_no_distribution_loss(
    minimal: Path, trainer: str, method: str
) -> None:
    assert error_of(minimal, f"trainer={trainer}", f"distribution_loss={method}") == (
        f"command line: distribution_loss: '{method}' is unknown, choose one of "
        f"{choices(trainer)} (trainer: {trainer})"
    )


@pytest.mark.parametrize(
    ("trainer", "method"),
    [
        ("score_distillation", DMD),
        ("diffusion", Diffusion),
        ("gan", GAN),
        ("ode", ODE),
    ],
)
def test_a_trainer_has_a_method_that_it_takes_unless_told_otherwise(
    minimal: Path, trainer: str, method: type[Method]
) -> None:
    config = load(minimal, [f"trainer={trainer}"])
    assert method_class(config) is method
    assert isinstance(config.loss, method.config_class)


def test_an_unknown_trainer_lists_the_known_ones(minimal: Path) -> None:
    assert error_of(minimal, "trainer=difusion") == (
        "command line: trainer: 'difusion' is unknown, choose one of score_distillation, "
        "diffusion, gan, ode; did you mean 'diffusion'?"
    )


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("real_name", "teacher.model"),
        ("fake_name", "critic.model"),
        ("generator_name", "generator.model"),
        ("generator_ckpt", "generator.weights"),
        ("lr", "generator.lr"),
        ("lr_critic", "critic.lr"),
        ("dfake_gen_update_ratio", "loss.generator_every"),
        ("guidance_scale", "loss.cfg_scale, which is guidance_scale + 1"),
        ("image_or_video_shape", "latent_shape, [C, F, H, W] without the batch"),
        ("data_path", "data.path"),
        ("gradient_checkpointing", "parallel.activation_checkpoint=block"),
        ("ema_weight", "ema.decay"),
        ("max_iters", "steps"),
        ("num_frame_per_block", "causal.num_frame_per_block"),
        ("sid_alpha", "loss.alpha"),
        ("noise_augmentation_max_timestep", "loss.clean_noise, a noise level in [0, 1]"),
        ("discriminator_lr_multiplier", "discriminator.lr"),
    ],
)
def test_a_key_of_the_reference_is_answered_with_ours(minimal: Path, key: str, advice: str) -> None:
    assert error_of(minimal, f"{key}=1") == f"command line: unknown key '{key}': write {advice}"


def test_advice_names_keys_that_exist() -> None:
    known = {part for key in all_keys() for part in (key, key.split(".")[0])}
    known |= {re.sub(r"^loss\[\w+\]", "loss", key) for key in known}
    for key, advice in RENAMED.items():
        if not advice.startswith("nothing"):
            assert advice.split(" ")[0].split("=")[0].rstrip(",") in known, key


def test_missing_values_are_listed_together(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("trainer: diffusion\n")
    lines = error_of(path).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "batch_size",
        "data.path",
        "generator.lr",
        "steps",
    ]
    assert lines[0] == (
        f"batch_size: must be set, by one of: {DEFAULT_CONFIG}, {path}, command line"
    )


def test_several_bad_values_are_reported_together(minimal: Path) -> None:
    message = error_of(
        minimal, "steps=0", "denoising_step_list=[250,500]", "generator.lr=-1", "ema.decay=2"
    )
    assert message.splitlines() == [
        "steps: must be at least 1, got 0",
        "denoising_step_list: must fall strictly within (0, 1000], got [250, 500]",
        "generator.lr: must be positive and finite, got -1.0",
        "ema.decay: must lie in [0, 1), got 2.0",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", "batch_size: must be at least 1, got 0"),
        ("save_every=0", "save_every: must be at least 1, got 0"),
        ("keep_checkpoints=0", "keep_checkpoints: must be at least 1, got 0"),
        ("accumulation=3", "accumulation: 3 micro-batches must divide batch_size=4"),
        (
            "denoising_step_list=[750,500]",
            "denoising_step_list: must begin at 1000, pure noise, got [750, 500]",
        ),
        (
            "denoising_step_list=[1000,500,500]",
            "denoising_step_list: must fall strictly within (0, 1000], got [1000, 500, 500]",
        ),
        (
            "denoising_step_list=[]",
            "denoising_step_list: must fall strictly within (0, 1000], got []",
        ),
        (
            "denoising_step_list=[1000,0]",
            "denoising_step_list: must fall strictly within (0, 1000], got [1000, 0]",
        ),
        (
            "latent_shape=[21,60,104]",
            "latent_shape: must be [C, F, H, W], all positive, got [21, 60, 104]",
        ),
        ("critic.muon_lr=0", "critic.muon_lr: must be positive and finite, or null, got 0.0"),
        ("critic.betas=[0.9]", "critic.betas: must be two numbers in [0, 1), got [0.9]"),
        (
            "generator.betas=[0.9,1.0]",
            "generator.betas: must be two numbers in [0, 1), got [0.9, 1.0]",
        ),
        ("generator.max_grad_norm=0", "generator.max_grad_norm: must be positive, got 0.0"),
        ("sampling.steps=0", "sampling.steps: must be at least 1, got 0"),
        ("loss.generator_every=0", "loss.generator_every: must be at least 1, got 0"),
        ("loss.timestep_shift=-1", "loss.timestep_shift: must be positive, got -1.0"),
        (
            "loss.max_sigma=0.01",
            "loss.min_sigma and loss.max_sigma: must satisfy 0 < min <= max <= 1, "
            "got 0.02 and 0.01",
        ),
        ("loss.cfg_scale=nan", "loss.cfg_scale: must be finite, got nan"),
        ("timestep_shift=0", "timestep_shift: must be positive, got 0.0"),
        ("validation.every=-1", "validation.every: must be at least 0 (0 = never), got -1"),
        ("generator.lr=inf", "generator.lr: must be positive and finite, got inf"),
        (
            "critic.decay_from=1.5",
            "critic.decay_from: must lie in [0, 1], got 1.5",
        ),
        (
            "generator.model=null",
            "generator.model: must name a model folder (or teacher.model must)",
        ),
    ],
)
def test_an_impossible_value_is_told_with_what_is_allowed(
    minimal: Path, override: str, message: str
) -> None:
    assert error_of(minimal, override) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("causal.num_frame_per_block=4",),
            "causal.num_frame_per_block: a block of 4 frames must divide the 21 latent frames",
        ),
        (
            ("causal.independent_first_frame=true",),
            "causal.num_frame_per_block: a block of 3 frames must divide the 20 latent frames "
            "after the first",
        ),
        (
            ("causal.num_frame_per_block=0",),
            "causal.num_frame_per_block: a block of 0 frames must divide the 21 latent frames",
        ),
        (
            ("causal.local_attn_size=2",),
            "causal.local_attn_size: a window of 2 frames, 0 of them the video's first, is "
            "smaller than a block of 3",
        ),
        (
            ("causal.local_attn_size=6", "causal.sink_size=4"),
            "causal.local_attn_size: a window of 6 frames, 4 of them the video's first, is "
            "smaller than a block of 3",
        ),
        (("causal.sink_size=-1",), "causal.sink_size: must be at least 0, got -1"),
        (
            ("causal.given_first_frame=true",),
            "causal.given_first_frame: 1 given frames of 21 must end where a block ends: at one "
            "of 3, 6, 9, 12, 15, 18; set causal.independent_first_frame=true",
        ),
        (
            ("causal.rollout_frames=18",),
            "causal.rollout_frames: must be at least the 21 frames of latent_shape, got 18",
        ),
        (
            ("causal.rollout_frames=25",),
            "causal.rollout_frames: a block of 3 frames must divide the 25 latent frames",
        ),
        (
            ("causal.context_noise=100", "causal.remember=last_step"),
            "causal.context_noise: 100.0 has no effect with causal.remember: last_step, where no "
            "pass over clean blocks is made; set it to 0",
        ),
        (("causal.context_noise=1000",), "causal.context_noise: must lie in [0, 1000), got 1000.0"),
        (
            ("causal.gradient_frames=0",),
            "causal.gradient_frames: must hold the last block, 3 or more, or be null, got 0",
        ),
    ],
)
def test_blocks_that_do_not_come_out_even_are_told(
    minimal: Path, overrides: tuple[str, ...], message: str
) -> None:
    assert error_of(minimal, "generator_type=causal", *overrides) == message


@pytest.mark.parametrize("key", ["num_frame_per_block=4", "given_first_frame=true"])
def test_causal_settings_of_a_bidirectional_generator_are_refused(minimal: Path, key: str) -> None:
    name = key.partition("=")[0]
    assert error_of(minimal, f"causal.{key}") == (
        f"causal.{name}: has no effect without generator_type: causal"
    )


def test_rollout_settings_of_a_method_without_rollouts_are_refused(minimal: Path) -> None:
    words = ("generator_type=causal", "trainer=ode", "causal.last_step_only=true")
    assert error_of(minimal, *words) == (
        "causal.last_step_only: has no effect on method 'ode', without rollouts"
    )


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ((), "generator_type: causal"),
        (("generator_type=causal", "loss.teacher_forcing=false"), "loss.teacher_forcing"),
    ],
)
def test_noise_on_a_clean_past_that_nobody_sees_is_refused(
    minimal: Path, words: tuple[str, ...], missing: str
) -> None:
    message = error_of(minimal, "trainer=diffusion", "loss.clean_noise=0.5", *words)
    assert message.startswith("loss.clean_noise: ")
    assert message.endswith(f"has no effect without {missing}")


def test_a_generator_that_would_never_move_is_refused(minimal: Path) -> None:
    words = ("trainer=gan", "steps=5", "loss.discriminator_warmup_steps=5")
    assert error_of(minimal, *words) == (
        "loss.discriminator_warmup_steps: must be below steps=5, or the generator never moves; "
        "got 5"
    )


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("dmd", "gan_weight=-0.5", "loss.gan_weight: must be at least 0 and finite, got -0.5"),
        ("dmd", "gan_weight=inf", "loss.gan_weight: must be at least 0 and finite, got inf"),
        ("dmd", "critic_pull=1", "loss.critic_pull: must lie in [0, 1), got 1.0"),
        (
            "causvid",
            "adversarial.r1_weight=-1",
            "loss.adversarial.r1_weight: must be at least 0, got -1.0",
        ),
        (
            "dmd",
            "adversarial.r2_weight=nan",
            "loss.adversarial.r2_weight: must be at least 0, got nan",
        ),
        (
            "dmd",
            "adversarial.r1_sigma=0",
            "loss.adversarial.r1_sigma: must be positive, got 0.0",
        ),
        (
            "gan",
            "adversarial.r2_sigma=-1",
            "loss.adversarial.r2_sigma: must be positive, got -1.0",
        ),
        (
            "gan",
            "discriminator_warmup_steps=-1",
            "loss.discriminator_warmup_steps: must be at least 0, got -1",
        ),
        ("gan", "generator_every=0", "loss.generator_every: must be at least 1, got 0"),
        ("sid", "cfg_scale=inf", "loss.cfg_scale: must be finite, got inf"),
        ("consistency", "grid=0", "loss.grid: must be at least 1, got 0"),
        ("consistency", "timestep_shift=0", "loss.timestep_shift: must be positive, got 0.0"),
        ("diffusion", "clean_noise=1.5", "loss.clean_noise: must lie in [0, 1], got 1.5"),
        ("diffusion", "caption_dropout=-1", "loss.caption_dropout: must lie in [0, 1], got -1.0"),
    ],
)
def test_an_impossible_value_of_a_method_is_told_with_what_is_allowed(
    minimal: Path, method: str, override: str, message: str
) -> None:
    trainer = next(c.trainer for c in methods() if c.__module__ == f"model.{method}")
    words = (f"trainer={trainer}", f"distribution_loss={method}", f"loss.{override}")
    assert error_of(minimal, *words) == message


def test_a_value_that_is_none_of_a_few_lists_them(minimal: Path) -> None:
    assert error_of(minimal, "loss.divergence=kl") == (
        "command line: loss.divergence: Invalid value 'kl', expected one of ['reverse_kl', "
        "'forward_kl', 'jensen_shannon', 'softened_reverse_kl', 'neyman', 'hellinger', 'jeffreys']"
    )


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "cudnn", "flash3", "sage"])
def test_attention_kernels_are_taken_by_name(minimal: Path, kernel: str) -> None:
    assert load(minimal, [f"parallel.attention={kernel}"]).parallel.attention == kernel


@pytest.mark.parametrize(
    ("kernel", "hint"),
    [("flash4", "; did you mean 'flash'?"), ("cudn", "; did you mean 'cudnn'?"), ("xformers", "")],
)
def test_a_name_of_no_attention_kernel_is_answered_with_those_that_there_are(
    minimal: Path, kernel: str, hint: str
) -> None:
    assert error_of(minimal, f"parallel.attention={kernel}") == (
        "parallel.attention: must be one of auto, sdpa, cudnn, flash, efficient, math, flash2, "
        f"flash3, sage, got '{kernel}'{hint}"
    )


def test_the_optimizer_of_the_discriminator_is_checked_as_the_others(minimal: Path) -> None:
    assert error_of(minimal, "discriminator.lr=-1", "discriminator.betas=[0.9]").splitlines() == [
        "discriminator.lr: must be positive and finite, got -1.0",
        "discriminator.betas: must be two numbers in [0, 1), got [0.9]",
    ]


def test_random_weights_and_given_weights_exclude_each_other(minimal: Path) -> None:
    assert error_of(minimal, "generator.random_init=true", "generator.weights=w.pt") == (
        "generator.weights: cannot be given together with generator.random_init"
    )


def test_a_sound_configuration_has_no_problem(minimal: Path) -> None:
    assert list(problems(load(minimal))) == []


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"generator": "g"}, ("g", "g", "g")),
        ({"generator": "g", "teacher": "t"}, ("g", "t", "t")),
        ({"teacher": "t"}, ("t", "t", "t")),
        ({"generator": "g", "teacher": "t", "critic": "c"}, ("g", "c", "t")),
    ],
)
def test_roles_without_a_model_take_the_nearest_one(
    models: dict[str, str], expected: tuple[str, str, str]
) -> None:
    config = Config()
    config = replace(
        config,
        generator=TrainedNetworkConfig(model=models.get("generator")),
        critic=TrainedNetworkConfig(model=models.get("critic")),
        teacher=replace(config.teacher, model=models.get("teacher")),
    )
    roles = ("generator", "critic", "teacher")
    assert tuple(config.model_of(role) for role in roles) == expected


FIRST = "first_block_step_list"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("generator_type=causal", f"{FIRST}=[750,500]"),
            f"{FIRST}: must begin at 1000, pure noise, got [750, 500]",
        ),
        (
            ("generator_type=causal", f"{FIRST}=[]"),
            f"{FIRST}: must fall strictly within (0, 1000], got []",
        ),
        (
            (f"{FIRST}=[1000,500]",),
            f"{FIRST}: [1000, 500] has no effect without generator_type: causal, whose videos are "
            f"made in blocks; set denoising_step_list",
        ),
        (
            ("generator_type=causal", "trainer=diffusion", f"{FIRST}=[1000,500]"),
            f"{FIRST}: has no effect on method 'diffusion', which is sampled by sampling.steps",
        ),
        (
            ("generator_type=causal", "trainer=ode", f"{FIRST}=[1000,500]"),
            f"{FIRST}: has no effect on method 'ode', whose pairs hold one list of steps for all "
            f"blocks; set it in the run that follows",
        ),
        (
            (
                "generator_type=causal",
                "causal.num_frame_per_block=1",
                "causal.given_first_frame=true",
                "trainer=score_distillation",
                f"{FIRST}=[1000,500]",
            ),
            f"{FIRST}: has no effect where all videos begin with a given block; set it to null",
        ),
    ],
)
def test_steps_of_a_first_block_are_refused_where_no_few_steps_make_one(
    minimal: Path, overrides: tuple[str, ...], message: str
) -> None:
    assert error_of(minimal, *overrides) == message


def test_steps_of_a_first_block_are_noise_levels_as_all_others(minimal: Path) -> None:
    words = ["generator_type=causal", "trainer=score_distillation", "denoising_step_list=[1000]"]
    config = load(minimal, [*words, f"{FIRST}=[1000,500]"])
    assert first_sigmas(config) == pytest.approx([1.0, 5 / 6])
    assert first_sigmas(load(minimal, words)) is None


def test_blocks_that_no_rollout_taught_to_be_remembered_noisy_are_refused(minimal: Path) -> None:
    words = ("generator_type=causal", "causal.remember=last_step", "trainer=ode")
    assert error_of(minimal, *words) == (
        "causal.remember: has no effect on method 'ode', without rollouts"
    )
