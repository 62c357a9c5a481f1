"""CausVid (arXiv:2412.07772): DMD on predictions from real videos, each block at its own noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.base import Needs
from model.dmd import DMD, DMDConfig


@dataclass(frozen=True)
class CausVidConfig(DMDConfig):
    """CausVid's own option."""

    teacher_forcing: bool = False  # blocks see the clean past; false = the noisy one

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        if self.walk == "euler":
            yield (
                "loss.walk: 'euler' has no meaning with causvid, whose student learns on videos "
                "with fresh noise; use renoise, or distribution_loss=dmd"
            )


class CausVid(DMD):
    """DMD's loss; only where samples come from differs."""

    config_class = CausVidConfig

    @classmethod
    def needs(cls, config: CausVidConfig) -> Needs:  # type: ignore[override]
        """As DMD, on samples that are made from real latents."""
        options = {"teacher_forcing": config.teacher_forcing}
        return replace(
            super().needs(config),
            latents=True,
            because="",
            rollout="data",
            rollout_options=options,
        )
