"""Two experts out of any two denoisers, for worlds in closed form."""

from __future__ import annotations

from torch import Tensor, nn

from model.experts import ExpertPair
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction


class Expert(nn.Module):
    """Any denoiser as an expert; it has weights if `net` is a module."""

    def __init__(self, net: Denoiser) -> None:
        super().__init__()
        self.model = net if isinstance(net, nn.Module) else nn.Module()
        self._net = [net]  # no second name of its weights

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """What `net` says."""
        return self._net[0](x, sigma, conditioning, context=context)


def paired(high: Denoiser, low: Denoiser, boundary: float = 0.875) -> ExpertPair:
    """The pair of two denoisers."""
    return ExpertPair(Expert(high), Expert(low), boundary)
