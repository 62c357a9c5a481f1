"""Which roles share a network that none of them moves, and the adapters that each has on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from model.adapters import OnAdapters, RankOf, fill, pairs, start
from model.experts import SIDES
from model.folders.adapter_files import AdapterFile, check_adapter, read_adapter, refuse_heads
from model.folders.adapter_words import AdapterWord, parse
from model.wan.heads import BANK
from trainer.networks import NetworkConfig, TrainedNetworkConfig
from trainer.run import Run
from utils.config import ConfigError


@dataclass(frozen=True, eq=False)
class Base:
    """One network, and the roles whose it is: one that trains all of it, or some that share it."""

    run: Run
    roles: tuple[str, ...]

    @property
    def settings(self) -> NetworkConfig | None:
        """How it is used; None = its one role trains all of it."""
        return self.run.config.frozen(self.roles[0])

    @property
    def added(self) -> Mapping[AdapterWord, str]:
        """The adapters that some role adds as they are, and their names in the network."""
        words = [word for role in self.roles for word in _own(self.run, role).adapters]
        return {one: f"added{n}" for n, one in enumerate(dict.fromkeys(map(parse, words)))}

    @property
    def trained(self) -> list[str]:
        """The roles that train an adapter of it, which has the role's name."""
        return [role for role in self.roles if adapter_rank(self.run, role) is not None]

    @property
    def heads(self) -> int:
        """How many heads it has for the parts of the generator's path."""
        return self.run.heads_of("generator") if "generator" in self.roles else 0

    def names(self, role: str) -> tuple[str, ...]:
        """The adapters that are on where `role` calls it, its own last."""
        added = self.added
        held = (added[parse(word)] for word in _own(self.run, role).adapters)
        return (*held, role) if role in self.trained else tuple(held)

    def ranks(self) -> dict[str, RankOf]:
        """What each adapter adds to, before it has values."""
        found: dict[str, RankOf] = {}
        for one, name in self.added.items():
            found[name] = self._ranks_of(one)
        for role in self.trained:
            rank_of = self.run.config.trainable[role].adapter.rank_of
            found[role] = rank_of if self.run.models[role].experts is None else self._of_moved(role)
        return found

    def _of_moved(self, role: str) -> RankOf:
        """The ranks of an adapter of those of two experts that move."""
        rank_of = self.run.config.trainable[role].adapter.rank_of
        moved = self.run.needs.trained_sides.get(role, SIDES)
        return lambda layer: rank_of(layer) if layer.partition(".")[0] in moved else None

    def _ranks_of(self, added: AdapterWord) -> RankOf:
        """Of an adapter that is added as it is; where none is read, one that is not here is taken
        to be as those that the roles train, in every expert that it is for.
        """
        if self.run.reads_values or added.path.exists():
            return {name: pair.rank for name, pair in read_added(added).factors.items()}.get
        like = [self.run.config.trainable[role].adapter.rank_of for role in self.trained]
        if not like:
            raise ConfigError(
                f"adapter {added}: it is not here, and no role trains one that it could be like; "
                f"plan without it"
            )
        side = f"{added.expert}." if added.expert else ""
        return lambda layer: like[0](layer) if layer.startswith(side) else None

    def give_values(self, network: nn.Module) -> None:
        """Load or begin every adapter of `network`; those that are trained want a gradient."""
        model, read = network.model, self.run.reads_values
        assert isinstance(model, nn.Module), "a network keeps its weights in `model`"
        for _, name, pair in pairs(model):
            pair.requires_grad_(name in self.trained)
        if self.heads:
            model.get_submodule(BANK).requires_grad_(True)
        for one, name in self.added.items():
            if read:
                fill(model, name, read_added(one).factors, what=f"adapter {one.path}")
        for role in self.trained:
            begin = self.run.config.trainable[role].adapter.weights
            if read and begin is not None:
                given = read_adapter(Path(begin), role=role)
                fill(model, role, given.factors, what=f"{role}.adapter.weights {begin}")
            else:
                start(model, role, self.run.config.seed)

    def views(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """What each role calls."""
        for role in self.roles:
            names = self.names(role)
            yield role, OnAdapters(network, names) if names else network


def bases(run: Run) -> list[Base]:
    """All networks of a run, in the order of their first roles."""
    shared: dict[object, list[str]] = {}
    for role in run.needs.networks:
        settings = run.config.frozen(role)
        key: object = role
        if settings is not None:
            place = run.models[role].path.resolve()
            experts = (settings.experts, settings.weights_high, settings.weights_low)
            key = (place, settings.weights, experts, settings.storage, settings.whole)
        shared.setdefault(key, []).append(role)
    return [Base(run, tuple(roles)) for roles in shared.values()]


def adapter_rank(run: Run, role: str) -> int | None:
    """Of the adapter that `role` trains; None = it trains a whole network, or nothing."""
    settings = run.config.networks[role]
    return settings.adapter.rank if isinstance(settings, TrainedNetworkConfig) else None


def read_added(word: AdapterWord) -> AdapterFile:
    """What an adapter adds. Raises ConfigError if that is more than factors, or WeightsError."""
    found = word.read()
    refuse_heads(
        found,
        why="and roles that share a network cannot add them; merge it into the network first "
        "(convert_checkpoint.py), or go on training it (generator.adapter.weights)",
    )
    if found.diffs:
        raise ConfigError(
            f"{word.path}: adds to whole weights ({next(iter(found.diffs))}, ...), which roles "
            f"that share a network cannot do each for itself; merge it into the network first "
            f"(convert_checkpoint.py), and name the result as model or weights"
        )
    return found


def adapter_files(run: Run, role: str) -> Iterator[AdapterFile]:
    """What is added to the role's network before training, and what its own adapter begins with."""
    for word in _own(run, role).adapters:
        yield read_added(parse(word))
    settings = run.config.networks[role]
    if isinstance(settings, TrainedNetworkConfig) and settings.adapter.weights is not None:
        yield read_adapter(Path(settings.adapter.weights), role=role)


def check_adapters(run: Run) -> None:
    """Raise ConfigError or WeightsError unless every adapter that is named fits its network."""
    for role, model in run.models.items():
        files = list(adapter_files(run, role))
        if not files:
            continue
        shapes, settings = run.weights(role).shapes(), run.config.networks[role]
        for file in files:
            check_adapter(file, shapes, what=f"{role} {model.path}")
            if not run.heads_of(role):
                refuse_heads(file, why="which this run's method does not ask; begin without it")
        if isinstance(settings, TrainedNetworkConfig) and settings.adapter.weights is not None:
            matrices = (n.removesuffix(".weight") for n, shape in shapes.items() if len(shape) == 2)
            ranks = {layer: settings.adapter.rank_of(layer) for layer in matrices}
            _check_beginning(files[-1], ranks, f"{role}.adapter")


def _check_beginning(file: AdapterFile, ranks: Mapping[str, int | None], key: str) -> None:
    """Raise ConfigError unless `file` has the layers and ranks of what is to be trained."""
    wanted = {layer: rank for layer, rank in ranks.items() if rank is not None}
    found = {layer: pair.rank for layer, pair in file.factors.items()}
    if wanted != found:
        layers = sorted(wanted.keys() ^ found.keys())[:3]
        raise ConfigError(
            f"{key}.weights: {file.path} has {len(found)} layers of rank "
            f"{', '.join(map(str, sorted(set(found.values()))))}, and this run trains "
            f"{len(wanted)} of rank {', '.join(map(str, sorted(set(wanted.values()))))}"
            f"{f' (only one has {layers})' if layers else ''}; rank and targets must be those that "
            f"it was made with"
        )


def _own(run: Run, role: str) -> NetworkConfig | TrainedNetworkConfig:
    return run.config.networks[role]
