"""The root configuration: the five selectors, the sections, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING

from model.base import Method, MethodConfig, Needs
from model.diffusion import DiffusionConfig
from model.discriminator import DiscriminatorConfig
from model.dmd import DMDConfig
from model.experts import boundary_problems
from model.flow import step_problems, step_sigmas
from model.options.ida import IDAConfig
from model.wan.kernels import AUTO, KERNELS
from pipeline.blocks import ROLLOUT_KEYS, CausalConfig
from pipeline.build import ADJUSTABLE
from pipeline.teacher import SamplingConfig
from trainer.data import DataConfig
from trainer.faults import FaultsConfig
from trainer.networks import (
    NetworkConfig,
    TrainedNetworkConfig,
    expert_problems,
    head_problems,
    optimizer_problems,
)
from trainer.registry import TRAINERS, find_method
from trainer.renamed import RENAMED
from utils import shipped
from utils.config import ConfigError, Layer, chosen, load_config, nearest, read_overrides, read_yaml
from utils.ema import EMAConfig
from utils.errors import UserError
from utils.health.settings import HealthConfig
from utils.optim import OptimizerConfig
from utils.parallel import ParallelConfig

DEFAULT_CONFIG = shipped.ROOT / "configs" / "default_config.yaml"


@dataclass(frozen=True)
class ValidationConfig:
    """Pictures of the model's samples while it trains, under averaged weights."""

    every: int = 0  # outer steps; 0 = never
    prompts: str | None = None  # file with one prompt per line; None = the data's first prompts
    count: int = 8


@dataclass(frozen=True)
class LoggingConfig:
    """Where numbers go beside <logdir>/metrics.jsonl."""

    wandb: bool | None = None  # None = if you are logged in there
    # None = WANDB_MODE, else online; a run that cannot reach W&B goes on offline.
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    project: str = "fewstep"
    tensorboard: bool = False  # event files in <logdir>/tensorboard


@dataclass(frozen=True)
class Config:
    """One run, all of it."""

    trainer: Literal["score_distillation", "diffusion", "gan", "ode"] = MISSING
    distribution_loss: str | None = None  # a method's file in model/; None = the usual
    generator_type: Literal["bidirectional", "causal"] = "bidirectional"
    denoising_step_list: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])
    # Of the block that a causal generator's videos begin with; None = as all others.
    first_block_step_list: list[int] | None = None
    # full: over all ranks; hybrid_full: over those of a node; none: each holds whole networks.
    sharding_strategy: Literal["full", "hybrid_full", "none"] = "full"

    seed: int = 0
    steps: int = MISSING  # outer steps; training stops here
    batch_size: int = MISSING  # samples per update, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches per update
    mixed_precision: bool = True  # bf16 compute over fp32 weights; false = fp32 throughout
    timestep_shift: float = 5.0  # applied to denoising_step_list
    latent_shape: list[int] = field(default_factory=lambda: [16, 21, 60, 104])  # C, F, H, W
    model_root: str = "wan_models"

    generator: TrainedNetworkConfig = field(default_factory=TrainedNetworkConfig)
    critic: TrainedNetworkConfig = field(default_factory=lambda: TrainedNetworkConfig(lr=4e-7))
    teacher: NetworkConfig = field(default_factory=NetworkConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)  # of generator_type: causal
    loss: MethodConfig = field(default_factory=DMDConfig)
    data: DataConfig = field(default_factory=DataConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    log_every: int = 10  # outer steps between reads of the metrics
    save_every: int = 200  # outer steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # the newest; older ones are deleted but for those that follow
    keep_every: int = 0  # checkpoints of steps that it divides stay for ever; 0 = none
    keep_best: int = 0  # how many stay for their health score (<logdir>/health.jsonl)
    save_in_background: bool = True  # from a copy in host memory, while training goes on
    save_failures: int = 3  # so many saves in a row may fail before the run stops
    timeout_s: float = 1800.0  # how long a rank waits for another before it raises

    @property
    def trainable(self) -> dict[str, TrainedNetworkConfig]:
        """The settings of each denoiser that can be trained, by role."""
        return {"generator": self.generator, "critic": self.critic}

    @property
    def networks(self) -> dict[str, NetworkConfig | TrainedNetworkConfig]:
        """The settings of each role that is a denoiser."""
        return {**self.trainable, "teacher": self.teacher}

    def frozen(self, role: str) -> NetworkConfig | None:
        """The network that `role` uses as it is, beside an adapter if any; None = it trains all."""
        own = self.networks[role]
        if isinstance(own, NetworkConfig):
            return own
        if own.adapter.rank is None:
            return None
        teacher = self.teacher
        return NetworkConfig(
            model=self.model_of(role),
            weights=own.weights,
            experts=own.experts,
            weights_high=own.weights_high,
            weights_low=own.weights_low,
            storage=teacher.storage if own.storage is None else own.storage,
            sharded=teacher.sharded if own.sharded is None else own.sharded,
            adapters=own.adapters,
        )

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """How the weights of each role that can be trained move."""
        return {**self.trainable, "discriminator": self.discriminator}

    def model_of(self, role: str) -> str:
        """The model folder or name of a role; the teacher's is the default of the others'."""
        if role == "generator":
            return self.generator.model or self.teacher.model or ""
        teacher = self.teacher.model or self.model_of("generator")
        return teacher if role == "teacher" else self.critic.model or teacher


# A run may be continued with other values of these; every other key is part of what it is. Rates
# and clipping are what a run that diverges is mended with.
CHANGEABLE = (
    "steps", "log_every", "save_every", "keep_checkpoints", "keep_every", "keep_best",
    "save_in_background", "save_failures", "timeout_s", "model_root",
    "data.path", "data.text_embeddings", "data.max_damaged", "accumulation", "sharding_strategy",
    "teacher.sharded", "generator.sharded", "critic.sharded",
    "loss.batched_guidance", "parallel", "validation", "health", "logging", "faults",
    "generator.lr", "critic.lr", "discriminator.lr", "generator.max_grad_norm",
    "critic.max_grad_norm", "discriminator.max_grad_norm",
    "sampling.steps", "sampling.cfg_scale", "sampling.cfg_scale_low", "sampling.timestep_shift",
    "sampling.solver",
)  # fmt: skip


def method_class(config: Config) -> type[Method]:
    """The class of the run's method."""
    return find_method(config.trainer, config.distribution_loss)


def method_name(config: Config) -> str:
    """The run's method, by its file in model/."""
    return method_class(config).__module__.rpartition(".")[2]


def method_needs(config: Config) -> Needs:
    """What the run's method must be given."""
    return method_class(config).needs(config.loss)


def load(config_path: Path, overrides: Sequence[str] = ()) -> Config:
    """default_config.yaml <- `config_path` <- key=value words, typed and checked.

    Raises ConfigError with one line per problem.
    """
    layers = [
        read_yaml(DEFAULT_CONFIG),
        read_yaml(shipped.find(config_path)),
        read_overrides(overrides),
    ]
    config = load_config(_schema(layers), layers, RENAMED)
    found = list(problems(config))
    if found:
        raise ConfigError("\n".join(found))
    return config


def read_run(path: Path) -> Config:
    """A run's config.yaml, of this version or an older one, whose new keys have their defaults.

    Raises ConfigError for what this version does not know.
    """
    layers = [read_yaml(path)]
    return load_config(_schema(layers), layers, RENAMED)


def _schema(layers: Sequence[Layer]) -> Config:
    """The root schema, its `loss` typed by the method that the layers select."""
    trainer, source = chosen(layers, "trainer")
    if trainer is None:
        trainer = "score_distillation"  # the typed merge says that it must be set
    if trainer not in TRAINERS:
        near = nearest(str(trainer), list(TRAINERS))
        hint = f"; did you mean '{near}'?" if near else ""
        allowed = ", ".join(TRAINERS)
        raise ConfigError(
            f"{source}: trainer: '{trainer}' is unknown, choose one of {allowed}{hint}"
        )
    loss, source = chosen(layers, "distribution_loss")
    try:
        method = find_method(str(trainer), None if loss is None else str(loss))
    except UserError as error:
        raise ConfigError(f"{source}: {error} (trainer: {trainer})") from error
    return Config(loss=method.config_class())


def problems(config: Config) -> Iterator[str]:
    """What no run could do, one line each; independent of files and of the number of ranks."""
    counts = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "log_every": config.log_every,
        "save_every": config.save_every,
        "keep_checkpoints": config.keep_checkpoints,
        "save_failures": config.save_failures,
        "sampling.steps": config.sampling.steps,
        "validation.count": config.validation.count,
    }
    yield from (f"{k}: must be at least 1, got {v}" for k, v in counts.items() if v < 1)
    if config.batch_size % max(1, config.accumulation):
        yield (
            f"accumulation: {config.accumulation} micro-batches must divide "
            f"batch_size={config.batch_size}"
        )
    yield from step_problems("denoising_step_list", config.denoising_step_list)
    yield from _first_block_problems(config)
    if len(config.latent_shape) != 4 or min(config.latent_shape) < 1:
        yield f"latent_shape: must be [C, F, H, W], all positive, got {config.latent_shape}"
    shifts = {
        "timestep_shift": config.timestep_shift,
        "sampling.timestep_shift": config.sampling.timestep_shift,
        "timeout_s": config.timeout_s,
    }
    yield from (f"{k}: must be positive, got {v}" for k, v in shifts.items() if not v > 0)
    yield from boundary_problems("sampling.boundary", config.sampling.boundary)
    if config.validation.every < 0:
        yield f"validation.every: must be at least 0 (0 = never), got {config.validation.every}"
    kept = {"keep_every": config.keep_every, "keep_best": config.keep_best}
    yield from (f"{k}: must be at least 0 (0 = none), got {v}" for k, v in kept.items() if v < 0)
    yield from config.health.problems()
    yield from _role_problems(config)
    if len(config.latent_shape) == 4:
        yield from _causal_problems(config)
        yield from config.data.problems(causal_config(config), config.latent_shape[1])
    if config.causal.given_first_frame and config.data.image_share is not None:
        yield "data.image_share: causal.given_first_frame=true says 1 already; set one of them"
    noisy = isinstance(config.loss, DiffusionConfig) and config.loss.given_noise
    if noisy and not config.data.image_share:
        yield "loss.given_noise: has no effect without data.image_share"
    if not 0.0 <= config.ema.decay < 1.0:
        yield f"ema.decay: must lie in [0, 1), got {config.ema.decay}"
    yield from config.parallel.problems()
    yield from config.faults.problems()
    yield from _attention_problems(config.parallel.attention)
    yield from config.loss.problems()
    causal = config.generator_type == "causal"
    yield from config.loss.run_problems(steps=config.steps, causal=causal)
    yield from config.loss.list_problems(config.denoising_step_list)
    if config.generator.model is None and config.teacher.model is None:
        yield "generator.model: must name a model folder (or teacher.model must)"


def _first_block_problems(config: Config) -> Iterator[str]:
    """Steps of a first block where there is none that is made in few steps."""
    key, steps = "first_block_step_list", config.first_block_step_list
    if steps is None:
        return
    yield from step_problems(key, steps)
    if config.generator_type != "causal":
        yield (
            f"{key}: {steps} has no effect without generator_type: causal, whose videos are made "
            f"in blocks; set denoising_step_list"
        )
        return
    needs, name = method_needs(config), method_name(config)
    if needs.sampler in ADJUSTABLE:
        yield f"{key}: has no effect on method '{name}', which is sampled by sampling.steps"
    elif needs.trajectories:
        yield (
            f"{key}: has no effect on method '{name}', whose pairs hold one list of steps for all "
            f"blocks; set it in the run that follows"
        )
    elif config.causal.given_first_frame or config.data.image_share == 1.0:
        yield f"{key}: has no effect where all videos begin with a given block; set it to null"


def _attention_problems(kernel: str) -> Iterator[str]:
    """Names of no attention kernel; whether one works here is found out on the device."""
    names = (AUTO, *KERNELS)
    if kernel not in names:
        near = nearest(kernel, list(names))
        hint = f"; did you mean '{near}'?" if near else ""
        yield f"parallel.attention: must be one of {', '.join(names)}, got '{kernel}'{hint}"


def _causal_problems(config: Config) -> Iterator[str]:
    """Impossible layouts, and settings that would have no effect."""
    layout, usual = config.causal, CausalConfig()
    set_ = [f.name for f in fields(usual) if getattr(layout, f.name) != getattr(usual, f.name)]
    if config.generator_type != "causal":
        if set_:
            yield f"causal.{set_[0]}: has no effect without generator_type: causal"
        return
    yield from layout.problems(config.latent_shape[1])
    idle = [name for name in set_ if name in ROLLOUT_KEYS]
    if idle and method_needs(config).rollout != "simulation":
        yield f"causal.{idle[0]}: has no effect on method '{method_name(config)}', without rollouts"


def _role_problems(config: Config) -> Iterator[str]:
    for role, network in config.networks.items():
        frozen = config.frozen(role)
        if frozen is not None and frozen.storage is not None and frozen.sharded:
            yield (
                f"{role}.storage: {frozen.storage} needs whole weights on each rank, since a row's "
                f"scale belongs to all of it; set {role}.sharded=false, or {role}.storage=null"
            )
        yield from expert_problems(role, network)
        if isinstance(network, TrainedNetworkConfig):
            yield from network.problems(role)
    pull = config.loss.critic_pull if isinstance(config.loss, IDAConfig) else 0.0
    if pull and any(own.adapter.rank is not None for own in config.trainable.values()):
        yield (
            f"loss.critic_pull: {pull} moves weights toward weights, and the average of an "
            f"adapter's factors is not that of what they add; set it to 0, or train whole networks"
        )
    shares = any(own.adapter.rank is not None for own in config.trainable.values())
    idle = [name for name in ("storage", "sharded") if getattr(config.teacher, name) is not None]
    if idle and not shares and "teacher" not in method_needs(config).networks:
        yield f"teacher.{idle[0]}: has no effect on method '{method_name(config)}', without teacher"
    if method_needs(config).heads:
        yield from head_problems(method_name(config), config.generator)
    for name, settings in config.optimizers.items():
        yield from optimizer_problems(name, settings)
    for name, trained in config.trainable.items():
        if trained.random_init and trained.weights is not None:
            yield f"{name}.weights: cannot be given together with {name}.random_init"
    hidden = config.discriminator.ffn_dim
    if hidden is not None and hidden < 1:
        yield f"discriminator.ffn_dim: must be at least 1, or null, got {hidden}"


def causal_config(config: Config) -> CausalConfig | None:
    """How the generator's videos fall into blocks; None = it is bidirectional."""
    return config.causal if config.generator_type == "causal" else None


def sigmas(config: Config) -> list[float]:
    """Noise levels of the few steps."""
    return step_sigmas(config.denoising_step_list, config.timestep_shift)


def first_sigmas(config: Config) -> list[float] | None:
    """Noise levels of the first block's few steps; None = those of all blocks."""
    steps = config.first_block_step_list
    return None if steps is None else step_sigmas(steps, config.timestep_shift)


def generator_model(config: Config) -> str:
    """The generator's model folder or name."""
    return config.model_of("generator")


def compute_dtype(config: Config) -> torch.dtype:
    """What networks compute in, in training."""
    return torch.bfloat16 if config.mixed_precision else torch.float32
