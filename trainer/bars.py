"""Progress on a terminal: clips that are done, and how far the one in the making is."""

from __future__ import annotations

from tqdm import tqdm

from pipeline.protocol import Progress


class Bars:
    """Two lines: clips that are done, and the stage of the batch in the making."""

    def __init__(self, clips: int, *, shown: bool) -> None:
        self._clips = tqdm(total=clips, desc="clips", disable=not shown)
        self._stage = tqdm(desc="begin", position=1, leave=False, disable=not shown)
        self._name: str | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stage.close()
        self._clips.close()

    def inner(self, progress: Progress) -> None:
        """News of the batch in the making."""
        if progress.stage != self._name:
            self._name = progress.stage
            self._stage.reset(total=progress.total)
            self._stage.set_description_str(progress.stage, refresh=False)
        self._stage.update(progress.done - self._stage.n)

    def outer(self, clips: int) -> None:
        """So many more clips are written."""
        self._name = None
        self._clips.update(clips)
