"""What the encoders and the codec of a run take on each GPU, from their real modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.run import Run
from utils.metering import Tag


def wanted_parts(run: Run) -> Iterator[str]:
    """Which encoders a run keeps on its device, by the names of a model's parts.

    As the composition root decides; what only data can tell is assumed to be needed.
    """
    config, causal = run.config, run.config.causal
    if config.parallel.offload_encoders:
        return  # they come while nothing else is there
    if config.data.text_embeddings is None:
        yield "text_encoder"
    if run.model.images is not None and run.model.images.clip:
        yield "image_encoder"
    beginning = run.begins_with_given or causal.rollout_frames is not None
    if config.validation.every > 0 or beginning:
        yield "codec"


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
