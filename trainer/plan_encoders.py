"""What the encoders and the codec of a run take on each GPU, from their real modules, and when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from trainer.run import Run
from utils.metering import Place, Tag


def wanted_parts(run: Run) -> Iterator[str]:
    """Which encoders a run needs on its device, by the names of a model's parts.

    As the composition root decides; what only data can tell is assumed to be needed.
    """
    config, causal = run.config, run.config.causal
    if config.data.text_embeddings is None:
        yield "text_encoder"
    if run.model.images is not None and run.model.images.clip:
        yield "image_encoder"
    beginning = run.begins_with_given or causal.rollout_frames is not None
    if config.validation.every > 0 or beginning:
        yield "codec"


def with_encoders(
    peaks: Mapping[Place, Mapping[Tag, float]], encoders: Mapping[Tag, float], *, waiting: bool
) -> dict[Place, dict[Tag, float]]:
    """Peaks with encoders beside them: all of them, or where they are `waiting` in host memory
    those at which batches are encoded, for which they come and after which they go.
    """
    return {
        place: {**held, **(encoders if place.part == "data" or not waiting else {})}
        for place, held in peaks.items()
    }


def encoder_bytes(run: Run, parts: Iterable[str]) -> dict[Tag, float]:
    """Bytes of each of `parts`, in the dtype in which the run loads them."""
    outlines = run.model.outlines()
    found: dict[Tag, float] = {}
    for part in parts:
        if part in outlines:
            module = outlines[part](run.compute)
            tensors = [*module.parameters(), *module.buffers()]
            found[Tag(part, "encoders")] = float(sum(t.nbytes for t in tensors))
    return found
