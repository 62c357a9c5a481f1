"""The composition root: from a Config to a Trainer, checks first, weights last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from model.adapters import parameter_names
from model.base import AlternatingConfig, Parts
from model.conditioning import ConditioningEncoder, ImageEncoder
from model.encoders.idle import Encoders
from model.encoders.vae import VideoVAE
from model.experts import SIDES, ExpertPair
from model.folders.loading import Placement, random_discriminator
from model.types import Rollout, Side
from model.wan.attention import use_kernel
from model.wan.heads import BIAS, WEIGHT
from pipeline.reuse import ReusedRollout
from trainer.agreement import check_same_run
from trainer.base import Trainer
from trainer.bases import Base, bases
from trainer.batches import BatchLoader
from trainer.config import Config
from trainer.health import HealthProbe, ProbeParts
from trainer.inputs import Inputs, check_inputs
from trainer.logdir import METRICS, Claim, LogdirPolicy, claim_logdir
from trainer.parts import TrainerParts
from trainer.registry import TRAINERS
from trainer.report import ReportPage
from trainer.roles import GatheredRollout, Role, build_roles, parameters_of, weights_of
from trainer.run import Run, resolve
from trainer.validation import Validator
from utils import checkpoint
from utils.compiling import say_where_graphs_are_kept
from utils.context_parallel import context_mesh
from utils.data.embeddings import EmbeddingReader
from utils.distributed import Session
from utils.float8 import store_float8
from utils.metrics import JsonLines, Tracker, uses_wandb
from utils.parallel import ParallelConfig, build_mesh
from utils.seeding import derive_seed
from utils.trackers import Apart, TensorBoard, WandB, check_tensorboard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run beside its configuration."""

    logdir: Path
    config_name: str
    save: bool = True
    visualize: bool = True
    wandb: bool = True
    wandb_folder: Path | None = None  # None = the log directory
    allow_change: bool = False  # continue although data, weights or settings have changed
    fresh: bool = False  # refuse a log directory that holds a run

    @property
    def policy(self) -> LogdirPolicy:
        """What may be done with the log directory."""
        return LogdirPolicy(allow_change=self.allow_change, fresh=self.fresh, saves=self.save)

    @property
    def flags(self) -> dict[str, object]:
        """What all ranks must agree on, as the command line calls it."""
        return {
            "--logdir": self.logdir,
            "--no_save": not self.save,
            "--no_visualize": not self.visualize,
            "--allow_config_change": self.allow_change,
            "--fresh": self.fresh,
        }


def build_trainer(config: Config, session: Session, options: RunOptions) -> Trainer:
    """Check everything, claim the log directory, load the networks, wire the trainer.

    Raises ConfigError, FileNotFoundError or ValueError for what its user can mend.
    """
    check_same_run(config, options.flags, session)
    return assemble(resolve(config), session, options)


def assemble(run: Run, session: Session, options: RunOptions) -> Trainer:
    """The same of a configuration that is resolved and that all ranks have."""
    config = run.config
    session = replace(session, group=config.parallel.context)
    if config.logging.tensorboard:
        check_tensorboard()
    inputs = check_inputs(run, session)
    claim = claim_logdir(run, inputs, session, options.logdir, options.policy)
    trackers = _build_trackers(config, session, options, claim)
    encoders = Encoders(session.device, config.parallel.offload_encoders)
    vae = _build_vae(run, encoders, options, inputs)
    encoder = build_encoder(run, encoders, run.compute, vae, inputs.embeddings)
    networks = build_networks(run, session)
    roles = build_trained(run, networks)
    parts = Parts(
        networks=networks,
        rollout=build_rollout(run, vae),
        sigmas=run.sampling.sigmas,
        shift=run.sampling.shift,
        layout=run.causal,
        experts=run.experts,
        parameters={name: list(role.parameters.values()) for name, role in roles.items()},
        takes_given=run.takes_given,
    )
    _announce(config, session, networks, roles)
    batches = BatchLoader(run, inputs.dataset, encoder, encoders, vae)
    wired = Wired(networks, batches, trackers, vae, _resumed_at(claim))
    trainer: Trainer = TRAINERS[config.trainer].load()(
        TrainerParts(
            run=run,
            session=session,
            method=run.method(config.loss, parts),
            roles=roles,
            batches=wired.batches,
            trackers=wired.trackers,
            validator=_build_validator(run, session, options, inputs, vae),
            logdir=options.logdir,
            save=options.save,
            claim=claim,
            health=_build_probe(run, session, options, inputs, wired),
        )
    )
    return trainer


@dataclass(frozen=True, eq=False)
class Wired:
    """What several parts of a trainer are made of."""

    networks: Mapping[str, nn.Module]
    batches: BatchLoader
    trackers: Sequence[Tracker]
    vae: VideoVAE | None
    resumed_at: int  # the step that the run goes on from


def _build_probe(
    run: Run, session: Session, options: RunOptions, inputs: Inputs, wired: Wired
) -> HealthProbe | None:
    if not run.config.health.every:
        return None
    return HealthProbe(
        ProbeParts(
            run=run,
            session=session,
            networks=wired.networks,
            items=inputs.probed,
            batches=wired.batches,
            trackers=wired.trackers,
            vae=wired.vae if options.visualize else None,
            logdir=options.logdir,
            resumed_at=wired.resumed_at,
        )
    )


def build_networks(run: Run, session: Session) -> dict[str, nn.Module]:
    """Every role's network, laid over the ranks; the discriminator last."""
    config, needs = run.config, run.needs
    if config.parallel.compile:
        say_where_graphs_are_kept()
    kept = Placement(
        device=session.device,
        storage=run.compute,
        compute=run.compute,
        mesh=build_mesh(session, config.sharding_strategy),  # once: each makes process groups
        parallel=config.parallel,
        context=context_mesh(session),
    )
    moved = replace(kept, storage=torch.float32)
    networks: dict[str, nn.Module] = {}
    for base in bases(run):
        settings = base.settings
        place = moved if settings is None else replace(kept, whole=settings.whole)
        networks |= _build_base(base, session, place)
    networks = {role: networks[role] for role in needs.networks}
    if needs.backbone is not None:
        networks["discriminator"] = random_discriminator(
            run.models[needs.backbone].features,
            config.discriminator,
            config.seed,
            replace(moved, compute=torch.float32, parallel=ParallelConfig(), context=None),
        )
    return networks


def _build_base(base: Base, session: Session, place: Placement) -> dict[str, nn.Module]:
    """A network with its adapters, as each of its roles calls it."""
    run, role, settings = base.run, base.roles[0], base.settings
    model = run.models[role]
    kept = _kept_experts(base)
    place = replace(place, adapters=base.ranks(), kept=kept)
    place = replace(place, heads=base.heads, plain=settings is not None)
    if role in run.offloaded and not place.adapters:  # whose own weights stay on the device
        place = replace(place, device=torch.device("cpu"))
    if run.random_init(role):
        network = model.random_network(run.config.seed, place)
    else:
        what = f"{role} {model.path}"
        network = model.load_network(run.weights(role), place, what=what)
    network.requires_grad_(settings is None)
    if "generator" in base.roles:
        run.divide(network)
    kernel = run.kernel(role, session.device, run.compute, grad=True)
    kernel = session.from_main(kernel)  # the fastest on one rank, so on all
    use_kernel(network, kernel, run.config.parallel.masked_attention)
    if settings is not None and settings.storage == "fp8":
        store_float8(network)
    base.give_values(network)
    for side in kept:
        weights_of(network).get_submodule(side).requires_grad_(False)
    if role in run.offloaded:
        assert isinstance(network, ExpertPair), "experts that take turns are a pair"
        network.take_turns(session.device)
    return dict(base.views(network))


def _kept_experts(base: Base) -> list[Side]:
    """Of two experts, those that no role of theirs moves."""
    if base.run.models[base.roles[0]].experts is None:
        return []
    moved = [base.run.needs.trained_sides.get(role, SIDES) for role in base.roles]
    return [side for side in SIDES if not any(side in sides for sides in moved)]


def build_trained(run: Run, networks: Mapping[str, nn.Module]) -> dict[str, Role]:
    """The roles that train a network or an adapter of their own in one; of two experts one each."""
    roles: dict[str, Role] = {}
    for name in run.needs.trained:
        network, own, rates = networks[name], None, None
        settings = run.config.trainable.get(name)
        if settings is not None and settings.adapter.rank is not None:
            own = parameter_names(weights_of(network), name)
            rates = {key: settings.adapter.rate for key in own if key.endswith(".b")}
        if run.heads_of(name):
            heads = {WEIGHT: run.needs.head_rate, BIAS: run.needs.head_rate}
            own, rates = own and [*own, *heads], {**(rates or {}), **heads}
        sides = run.needs.trained_sides.get(name, SIDES)
        roles |= build_roles(name, network, run.optimizer(name), own, rates, sides)
    return roles


def build_rollout(run: Run, vae: VideoVAE | None) -> Rollout | None:
    """What makes samples of the generator, if the method needs them."""
    rollout, loss = run.rollout(vae), run.config.loss
    if rollout is None:
        return None
    if run.config.parallel.keep_gathered:
        rollout = GatheredRollout(rollout)
    reuses = isinstance(loss, AlternatingConfig) and loss.reuse_rollout
    return ReusedRollout(rollout) if reuses else rollout


def _build_vae(
    run: Run, encoders: Encoders, options: RunOptions, inputs: Inputs
) -> VideoVAE | None:
    """The autoencoder, if the run decodes or encodes anything."""
    causal, held = run.config.causal, next(iter(inputs.dataset.buckets))
    wanted = (
        options.visualize and run.config.validation.every > 0,
        options.visualize and run.config.health.every > 0,
        run.reads_images,
        causal.rollout_frames is not None,
        run.given_share > 0.0 and not run.needs.trajectories and held.latents is None,
    )
    if not any(wanted):
        return None
    return encoders.codec(lambda device: run.model.load_codec(device, run.compute))


def build_encoder(
    run: Run,
    encoders: Encoders,
    dtype: torch.dtype,
    vae: VideoVAE | None,
    embeddings: EmbeddingReader | None = None,
) -> ConditioningEncoder:
    """What encodes the prompts, and for an image-to-video model the images.

    vae: needed by image-to-video models. embeddings: prompts that are encoded already; with them
    no text encoder is loaded.
    """
    encode: Callable[[list[str]], Tensor] = embeddings or encoders.encoder(
        run.model.load_text_encoder(dtype)
    )
    images = None
    if run.reads_images:
        assert vae is not None, "an image-to-video model needs the VAE"
        clip = run.model.load_image_encoder(dtype)
        images = ImageEncoder(None if clip is None else encoders.encoder(clip), vae)
    return ConditioningEncoder(
        encode,
        negative_prompt=run.config.data.negative_prompt,
        device=encoders.device,
        images=images,
    )


def _build_validator(
    run: Run, session: Session, options: RunOptions, inputs: Inputs, vae: VideoVAE | None
) -> Validator | None:
    if not options.visualize or not run.config.validation.every:
        return None
    assert vae is not None, "validation decodes what it samples"
    return Validator(run, inputs.shown, vae, options.logdir / "samples", session)


def _build_trackers(
    config: Config, session: Session, options: RunOptions, claim: Claim
) -> list[Tracker]:
    if not session.is_main:
        return []
    resumed_at = _resumed_at(claim)
    trackers: list[Tracker] = [JsonLines(options.logdir / METRICS, resumed_at=resumed_at)]
    words = config.logging
    if words.tensorboard:
        folder = options.logdir / "tensorboard"
        trackers.append(Apart("TensorBoard", partial(TensorBoard, folder, resumed_at=resumed_at)))
    if uses_wandb(words.wandb, disabled=not options.wandb, mode=words.wandb_mode):
        make = partial(
            WandB,
            project=words.project,
            folder=options.wandb_folder or options.logdir,
            name=f"{options.config_name}-{options.logdir.resolve().name}",
            identity=f"{derive_seed(str(options.logdir.resolve())):016x}",
            config=asdict(config),
            mode=words.wandb_mode,
        )
        trackers.append(Apart("Weights & Biases", make))
    trackers.append(ReportPage(config, session, options.logdir, resumed_at=resumed_at))
    return trackers


def _resumed_at(claim: Claim) -> int:
    """The step that the run goes on from."""
    return checkpoint.step_of(claim.resume_from) if claim.resume_from else 0


def _announce(
    config: Config,
    session: Session,
    networks: Mapping[str, nn.Module],
    roles: Mapping[str, Role],
) -> None:
    if not session.is_main:
        return
    for role, network in networks.items():
        own = parameters_of(roles, role).values()
        log.info(
            "%s: %.3f M parameters, of which it trains %.3f M",
            role,
            sum(p.numel() for p in network.parameters()) / 1e6,
            sum(p.numel() for p in own) / 1e6,
        )
    shared: dict[int, list[str]] = {}
    for role, network in networks.items():
        shared.setdefault(id(network.model), []).append(role)
    for group in shared.values():
        if len(group) > 1:
            log.info("%s share one network, which stays as it is", " and ".join(group))
    log.info(
        "mesh: %s over %d ranks (%d to a sample) on %s, %s",
        config.sharding_strategy,
        session.world_size,
        session.group,
        session.device.type,
        "bf16" if config.mixed_precision else "fp32",
    )
    log.info(
        "%d steps of %d samples, %d micro-batches each",
        config.steps,
        config.batch_size,
        config.accumulation,
    )
