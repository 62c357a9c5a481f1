"""Adapters: what roles that share one frozen network train in its place (LoRA, arXiv:2106.09685).

How a layer computes with them is in model/wan/adapted.py; how they are written, in
model/folders/adapter_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from model.types import FULL_ATTENTION, Conditioning, Context, Prediction
from model.wan.adapted import CHILD, LowRankPair, add_pair
from utils.errors import UserError
from utils.seeding import generator
from utils.weights import fill_weights

RankOf = Callable[[str], int | None]  # the rank of a layer's pair, by its name; None = it has none
IMAGE_LAYERS = ("k_img", "v_img", "img_emb")  # that no common file of adapters has


@dataclass(frozen=True)
class AdapterConfig:
    """What a role trains of a frozen network that others share."""

    rank: int | None = None  # of every addition; None = the whole network is trained
    alpha: float | None = None  # the factor b learns alpha / rank times as fast; None = rank
    # The matrices of attention and feed-forward of every block; or beside them those that read
    # text and noise levels, and the last one.
    targets: Literal["blocks", "blocks+embeddings"] = "blocks"
    weights: str | None = None  # an adapter that it begins with: a file, or a run that trained one

    @property
    def rate(self) -> float:
        """How fast b learns, as a multiple of the learning rate."""
        if self.rank is None or self.alpha is None:
            return 1.0
        return self.alpha / self.rank

    def rank_of(self, layer: str) -> int | None:
        """See RankOf."""
        parts = layer.split(".")
        wanted = "blocks" in parts or self.targets == "blocks+embeddings"
        return self.rank if wanted and not set(parts) & set(IMAGE_LAYERS) else None

    def problems(self, role: str) -> Iterator[str]:
        """What is impossible about these settings of `role`, one line each."""
        key = f"{role}.adapter"
        if self.rank is None:
            usual = AdapterConfig()
            for name in ("alpha", "targets", "weights"):
                if getattr(self, name) != getattr(usual, name):
                    yield f"{key}.{name}: has no effect without {key}.rank"
            return
        if self.rank < 1:
            yield f"{key}.rank: must be at least 1, or null to train the whole network"
        if self.alpha is not None and not 0.0 < self.alpha < math.inf:
            yield f"{key}.alpha: must be positive and finite, or null, got {self.alpha}"


class OnAdapters(nn.Module):
    """A Denoiser: a network with some of its adapters on, in this order."""

    def __init__(self, base: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.base = base
        self.names = names

    @property
    def model(self) -> nn.Module:
        """What holds the weights, of all who share the network."""
        model = self.base.model
        assert isinstance(model, nn.Module), "a network keeps its weights in `model`"
        return model

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """See model.types.Denoiser."""
        context = replace(context, adapters=(*self.names, *context.adapters))
        prediction: Prediction = self.base(x, sigma, conditioning, context=context)
        return prediction


def declare(model: nn.Module, adapters: Mapping[str, RankOf]) -> None:
    """Give the linear layers of `model` pairs without values, by the adapter's name. In place.

    An adapter may have none in it, being another expert's. Raises UserError for a network that
    cannot compute with any.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for adapter, rank_of in adapters.items():
        ranks = {name: rank for name in linear if (rank := rank_of(name)) is not None}
        if not getattr(model, "takes_adapters", False):
            raise UserError(
                f"{type(model).__name__}: this network has no layers that take adapters; "
                f"set {adapter}.adapter.rank=null to train it whole"
            )
        for name, rank in ranks.items():
            add_pair(linear[name], adapter, rank)


def pairs(model: nn.Module) -> Iterator[tuple[str, str, LowRankPair]]:
    """All pairs in `model`: their layer, their adapter, and they themselves."""
    for path, module in model.named_modules():
        if isinstance(module, LowRankPair):
            layer, child, adapter = path.rsplit(".", 2)
            assert child == CHILD
            yield layer, adapter, module


def parameter_names(model: nn.Module, adapter: str | None = None) -> list[str]:
    """The names in `model` of an adapter's weights; None = of all adapters'."""
    return [
        f"{layer}.{CHILD}.{name}.{factor}"
        for layer, name, _ in pairs(model)
        for factor in ("a", "b")
        if adapter in (None, name)
    ]


def start(model: nn.Module, adapter: str, seed: int) -> None:
    """Begin: a uniform in +-1 / sqrt(in), b zero, so that nothing is added yet. In place.

    The same for any number of ranks.
    """

    def value(name: str, shape: torch.Size) -> Tensor:
        if name.endswith(".b"):
            return torch.zeros(shape)
        drawn = torch.rand(shape, generator=generator(seed, "adapter", name))
        return (2.0 * drawn - 1.0) / math.sqrt(shape[1])

    fill_weights(model, value, parameter_names(model, adapter))


def fill(
    model: nn.Module, adapter: str, factors: Mapping[str, tuple[Tensor, Tensor]], *, what: str
) -> None:
    """Set an adapter to `factors`, a [r, in] and b [out, r] by layer. In place.

    Raises UserError, about `what`, unless layers and shapes are exactly the adapter's.
    """
    own = {layer: pair for layer, name, pair in pairs(model) if name == adapter}
    missing, extra = sorted(own.keys() - factors.keys()), sorted(factors.keys() - own.keys())
    shapes = [
        f"{layer}.{factor} is {tuple(given.shape)}, expected {tuple(wanted.shape)}"
        for layer in own.keys() & factors.keys()
        for factor, given, wanted in zip(
            "ab", factors[layer], (own[layer].a, own[layer].b), strict=True
        )
        if given.shape != wanted.shape
    ]
    if missing or extra or shapes:
        raise UserError(
            f"{what} does not fit: {len(missing)} layers missing {missing[:3]}, {len(extra)} "
            f"unexpected {extra[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}; rank "
            f"and targets must be those that it was made with"
        )

    def value(name: str, shape: torch.Size) -> Tensor:
        layer, _, _, factor = name.rsplit(".", 3)
        return factors[layer][("a", "b").index(factor)].reshape(shape)

    fill_weights(model, value, parameter_names(model, adapter))


def install(
    model: nn.Module, adapter: str, factors: Mapping[str, tuple[Tensor, Tensor]], *, what: str
) -> None:
    """Add an adapter to a network that is loaded, and not laid over ranks. In place.

    factors: a [r, in] and b [out, r] by layer. Raises UserError, about `what`, if they do not fit.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    unknown = sorted(factors.keys() - linear.keys())
    if unknown:
        raise UserError(
            f"{what}: {len(unknown)} of its {len(factors)} layers are not in this network "
            f"{unknown[:3]}; is it for another model?"
        )
    for layer, (a, _) in factors.items():
        add_pair(linear[layer], adapter, a.shape[0])
    fill(model, adapter, factors, what=what)
    for _, name, pair in pairs(model):
        if name == adapter:
            pair.requires_grad_(False)
