"""The configuration, resolved once: what all that is built asks, in place of the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from model.base import Method, Needs
from model.encoders.vae import VideoVAE
from model.experts import SIDES, ExpertLevels, ExpertPair, side_of
from model.families.base import Model
from model.families.registry import find_model
from model.folders.adapter_files import read_adapter
from model.folders.heads import CopiedHead, GivenHeads, refuse_heads
from model.types import Denoiser, Rollout
from model.wan import kernels
from model.wan.heads import count_heads
from pipeline.blocks import CausalConfig
from pipeline.build import ADJUSTABLE, ROLLOUTS, SAMPLERS, Sampling
from pipeline.protocol import InferencePipeline
from trainer.config import Config, causal_config, first_sigmas, method_class, sigmas
from trainer.experts import gate, loss_levels, offloads, open_models
from trainer.networks import TrainedNetworkConfig
from utils.optim import OptimizerConfig
from utils.weights import JoinedWeights, Weights, WeightsError

log = logging.getLogger(__name__)

Shape = tuple[int, int, int, int]  # [C, F, H, W]


@dataclass(frozen=True, eq=False)
class Run:
    """What a configuration means, and the models that it names. Made by `resolve`."""

    config: Config
    method: type[Method]
    needs: Needs
    sampling: Sampling
    compute: torch.dtype  # what networks compute in, in training
    latent_shape: Shape  # of the samples, unless the data has shapes of its own
    models: Mapping[str, Model]  # per role that is a denoiser
    gate: float | None = None  # where the generator's experts meet; None = it has one network
    experts: ExpertLevels | None = None  # whose noise levels losses are at; None = one network's
    offloaded: Sequence[str] = ()  # roles of two experts, of which the idle one waits on the host

    @property
    def model(self) -> Model:
        """The generator's."""
        return self.models["generator"]

    @property
    def causal(self) -> CausalConfig | None:
        """How the generator's videos fall into blocks; None = it is bidirectional."""
        return self.sampling.causal

    @property
    def method_name(self) -> str:
        """The method, by its file in model/."""
        return self.method.__module__.rpartition(".")[2]

    @property
    def reads_images(self) -> bool:
        """Whether networks are conditioned on images that lie beside the noisy latents."""
        return self.model.images is not None and self.model.images.how == "channels"

    @property
    def takes_given(self) -> bool:
        """Whether networks take a given first latent frame in its place, clean (TI2V)."""
        return self.model.images is not None and self.model.images.how == "frame"

    @property
    def given_share(self) -> float:
        """Share of the batches that begin with a first latent frame of the data."""
        share = self.config.data.image_share
        if share is not None:
            return share
        return 1.0 if self.config.causal.given_first_frame else 0.0

    @property
    def begins_with_given(self) -> bool:
        """Whether any samples begin with an image or a latent frame of the data."""
        return self.reads_images or self.given_share > 0.0

    @property
    def always_begins(self) -> bool:
        """Whether all of them do."""
        return self.reads_images or self.given_share == 1.0

    def random_init(self, role: str) -> bool:
        """Whether a role begins with random weights."""
        settings = self.config.networks[role]
        return isinstance(settings, TrainedNetworkConfig) and settings.random_init

    @property
    def reads_values(self) -> bool:
        """Whether networks are given values; a plan knows how much they take without any."""
        return True

    def weights(self, role: str) -> Weights:
        """Where a role begins: its own weights, or those of its model folder.

        Of a checkpoint with several networks a critic that is trained whole takes the critic, if
        there is one, and every other role the generator. Heads of a path begin as copies. Raises
        WeightsError for heads that nobody would ask.
        """
        found, heads = self.plain_weights(role), self.heads_of(role)
        if not heads:
            refuse_heads(found, who=role)
            return found
        plain = self.config.frozen(role) is not None
        begin = self.config.generator.adapter.weights
        if begin is not None:  # an adapter to go on with, and the heads that it has, if any
            given = read_adapter(Path(begin)).heads
            found = GivenHeads(found, given, plain=plain) if given else found
        held = count_heads(found.shapes())
        if not held:
            return CopiedHead(found, heads, plain=plain)
        if held != heads:
            raise WeightsError(
                f"{role}: {found.path} has {held} heads for the parts of a path, and loss.grid "
                f"asks for {heads}; set loss.grid={held}, or begin with weights of one head"
            )
        return found

    def heads_of(self, role: str) -> int:
        """How many heads a role's network has for the parts of its path; 0 = one for all."""
        return self.needs.heads if role == "generator" else 0

    def plain_weights(self, role: str) -> Weights:
        """The same, as they are stored."""
        settings, model = self.config.networks[role], self.models[role]
        own = {"high": settings.weights_high, "low": settings.weights_low}
        if model.experts is None or not any(own.values()):
            return self._found(role, model, settings.weights)
        parts: dict[str, Weights] = {
            side: self._found(role, model.only(side), own[side] or settings.weights)
            for side in SIDES
        }
        return JoinedWeights(model.path, parts)

    def made_weights(self, path: Path, *, averaged: bool | None) -> Weights:
        """The generator at `path`, both experts; one that a run kept is what the run began with.

        averaged: see Model.find_weights.
        """
        model, moved = self.model, self.needs.trained_sides.get("generator", SIDES)
        if model.experts is None or len(moved) == len(SIDES):
            return model.find_weights(path, averaged=averaged)
        try:
            return model.find_weights(path, averaged=averaged)  # a folder, or a file of both
        except WeightsError as error:
            log.info("%s; the other expert is the generator's", error)
        settings = self.config.generator
        own = {"high": settings.weights_high, "low": settings.weights_low}
        parts: dict[str, Weights] = {
            side: model.only(side).find_weights(path, averaged=averaged)
            if side in moved
            else self._found("generator", model.only(side), own[side] or settings.weights)
            for side in SIDES
        }
        return JoinedWeights(path, parts)

    def divide(self, network: nn.Module) -> None:
        """Let the generator's two experts meet where they do in sampling. In place.

        Losses say which expert they ask.
        """
        if isinstance(network, ExpertPair) and self.gate is not None:
            network.boundary = self.gate

    def _found(self, role: str, model: Model, own: str | None) -> Weights:
        if own is None:
            return model.find_weights()
        if role == "critic" and self.config.frozen(role) is None:
            try:
                return model.find_weights(Path(own), role="critic")
            except WeightsError:  # else the generator, or what is wrong with it
                found = model.find_weights(Path(own))
                log.warning("critic.weights: %s holds no critic; its generator is taken", own)
                return found
        return model.find_weights(Path(own))

    def optimizer(self, role: str) -> OptimizerConfig:
        """How a trained role's weights move."""
        return self.config.optimizers[role]

    def kernel(self, role: str, device: torch.device, dtype: torch.dtype, *, grad: bool) -> str:
        """The attention kernel of a role, which losses pass through if `grad`. Raises UserError."""
        model = self.models[role]
        shape = kernels.Shape(
            tokens=model.latent.tokens(self.latent_shape),
            heads=max(1, model.features.heads // self.config.parallel.context),
            head_dim=model.features.width // model.features.heads,
        )
        return kernels.chosen(self.config.parallel.attention, shape, device, dtype, grad=grad)

    def check_kernel(self, device: torch.device, dtype: torch.dtype, *, grad: bool) -> None:
        """Raise UserError unless the kernel that was asked for by name works here."""
        if self.config.parallel.attention != kernels.AUTO:  # which is measured, and always found
            self.kernel("generator", device, dtype, grad=grad)

    def rollout(self, vae: VideoVAE | None) -> Rollout | None:
        """What makes samples of the generator in training, if the method needs them."""
        if self.needs.rollout is None:
            return None
        sampling = replace(self.sampling, vae=vae)
        return ROLLOUTS[self.needs.rollout](sampling, **self.needs.rollout_options)

    @property
    def few_steps(self) -> list[float]:
        """Noise levels of the few steps that the generator makes: of one expert its own alone."""
        levels, gate = list(self.sampling.sigmas), self.gate
        if gate is None or self.model.experts is not None:
            return levels
        return [sigma for sigma in levels if side_of(sigma, gate) == self.config.generator.experts]

    def pipeline(self, net: Denoiser) -> InferencePipeline:
        """What samples the generator."""
        return SAMPLERS[self.needs.sampler](net, replace(self.sampling, sigmas=self.few_steps))


def resolve(
    config: Config,
    roles: Sequence[str] | None = None,
    find: Callable[[Path, str], Model] = find_model,
) -> Run:
    """Find out what `config` means, and open the models of `roles`; None = all that it needs.

    find: what opens a model, from the folder of all and its name. Nothing heavy is read. Raises
    UserError or FileNotFoundError for models that are not there.
    """
    method = method_class(config)
    needs = method.needs(config.loss)
    channels, frames, height, width = config.latent_shape
    opened = open_models(config, roles or needs.networks, find)
    few_steps = None if needs.sampler in ADJUSTABLE else sigmas(config)
    meet = gate(config, needs, opened["generator"], few_steps)
    if meet is not None:  # so that it is stored
        config = replace(config, sampling=replace(config.sampling, boundary=meet))
    return Run(
        config=config,
        method=method,
        needs=needs,
        sampling=Sampling(
            sigmas(config),
            causal_config(config),
            config.sampling,
            gate=config.sampling.boundary,
            first_sigmas=first_sigmas(config),
            shift=config.timestep_shift,
        ),
        compute=torch.bfloat16 if config.mixed_precision else torch.float32,
        latent_shape=(channels, frames, height, width),
        models={role: found.model for role, found in opened.items()},
        gate=meet,
        experts=None if roles else loss_levels(config, needs, opened, few_steps),
        offloaded=() if roles else offloads(config, opened),
    )
