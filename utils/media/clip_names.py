"""Names of clip files: readable ones from prompts, numbers, or those that VBench looks for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from utils.data.prompts import PromptItem
from utils.errors import UserError

MAX_STEM_BYTES = 200  # of a readable name; most file systems take 255 with what is appended
MAX_NAME_BYTES = 230  # of a VBench name; it is written under one that is up to 25 bytes longer
VBENCH_SAMPLES = 5
FLICKER_SAMPLES = 25  # of temporal_flickering, whose still clips VBench's filter takes out


def file_stem(prompt: str) -> str:
    """The first 100 characters of a prompt, as far as file systems take them."""
    allowed = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", prompt[:100])
    return allowed.encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip(" .") or "_"


def distinct(stems: Sequence[str]) -> list[str]:
    """The same file stems, later ones of a kind with their number appended."""
    used: set[str] = set()
    result = []
    for index, stem in enumerate(stems):
        while stem in used:
            stem = f"{stem}-{index}"  # noqa: PLW2901
        used.add(stem)
        result.append(stem)
    return result


def vbench_stem(prompt: str) -> str:
    """The whole prompt, by which VBench finds its clips. Raises ValueError if it names no file."""
    fault = None
    if "/" in prompt or any(ord(letter) < 32 for letter in prompt):
        fault = "holds '/' or a control character, which no file name can"
    elif len(f"{prompt}-00.mp4".encode()) > MAX_NAME_BYTES:
        fault = f"makes a file name of more than {MAX_NAME_BYTES} bytes"
    if fault:
        raise UserError(
            f"--vbench: the prompt '{prompt[:60]}{'...' if len(prompt) > 60 else ''}' {fault}, so "
            f"VBench could not find its clips; give short prompts, and the long ones as "
            f"--extended_prompt_path"
        )
    return prompt


def clip_stems(items: Sequence[PromptItem], *, by_index: bool, vbench: bool) -> list[str]:
    """What the file names of each item begin with, all different. Raises ValueError: vbench_stem.

    vbench: the titles themselves, which must then differ.
    """
    if vbench:
        return [vbench_stem(item.title) for item in items]
    if by_index:
        return [str(index) for index in range(len(items))]
    return distinct([file_stem(item.title) for item in items])


def default_samples(item: PromptItem, *, vbench: bool) -> int:
    """Clips per prompt unless a user tells otherwise."""
    if not vbench:
        return 1
    return FLICKER_SAMPLES if "temporal_flickering" in item.dimensions else VBENCH_SAMPLES
