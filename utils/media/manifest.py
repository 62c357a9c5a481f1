"""What a folder of clips was made from, so that others can repeat it, and who may add to it."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils.claims import Claim
from utils.config import ConfigError
from utils.distributed import Session
from utils.files import write_text
from utils.hashes import sha256_of
from utils.media.clip_files import absent, forget_notes, noted, whole_clips
from utils.media.video import Extent
from utils.records import MANIFEST, DamagedError, from_json, read_mapping
from utils.weights import INDEX_SUFFIX

ROOT = Path(__file__).resolve().parent.parent.parent
# What samples, encoders and files depend on.
PACKAGES = (
    "torch", "transformers", "tokenizers", "diffusers", "safetensors", "numpy", "pillow", "imageio",
    "imageio-ffmpeg",
)  # fmt: skip
# How folders were made that do not say it.
OLDER = {"vae": "full", "tiny_vae_sha256": None}


@dataclass(frozen=True)
class ClipRecord:
    """One clip: everything that it alone depends on."""

    file: str  # below the manifest's folder
    prompt: str  # as its list has it; it names the file
    conditioning_prompt: str  # what the model read
    seed: int
    sample: int  # number among the clips of its prompt, from 0
    height: int  # of the model's pixels; small clips are written enlarged
    width: int
    images: list[str]  # files that it begins and ends with, as they were given
    images_sha256: list[str]
    sha256: str | None = field(default=None, compare=False)  # of the file; None = not written yet


# Where safetensors files are whose folder stands for them: adapters, and the experts of a pair.
_FOLDERS = ("*.safetensors", "*_noise_model/*.safetensors", "transformer*/*.safetensors")


def weight_files(path: Path) -> dict[str, Path]:
    """The files behind weights, by name.

    path: a weight file, an index of shards, a training checkpoint, or the folder of an adapter or
    of two experts.
    """
    if (path / ".metadata").is_file():
        data = [file for file in sorted(path.iterdir()) if file.suffix == ".distcp"]
        return {file.name: file for file in [path / ".metadata", *data]}
    if path.is_dir():
        found = [file for pattern in _FOLDERS for file in sorted(path.glob(pattern))]
        return {file.relative_to(path).as_posix(): file for file in found}
    if path.name.endswith(INDEX_SUFFIX):
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return {name: path.parent / name for name in [path.name, *sorted(set(shards))]}
    return {path.name: path}


def adapter_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The files behind adapters, under the numbers that the adapters have among each other."""
    return {
        f"adapters/{number}/{name}": file
        for number, path in enumerate(paths)
        for name, file in weight_files(path).items()
    }


def code_revision(root: Path = ROOT) -> dict[str, Any] | None:
    """The commit at `root` and whether tracked files differ from it; None outside a checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"revision": commit, "dirty": bool(changes)}


def _git(root: Path, *words: str) -> str | None:
    """What git says, or None where it is not installed or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment(device: torch.device) -> dict[str, Any]:
    """The code, the packages and the kind of device of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"code": code_revision(), "packages": package_versions(), "device": name}


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, Python's among them; None = not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def claim_folder(
    folder: Path,
    settings: Mapping[str, Any],
    weights: Sequence[Path],
    clips: Sequence[ClipRecord],
    session: Session,
) -> frozenset[str]:
    """Write settings.json and the manifest of clips to be made, on the main rank. Collective.

    Returns, on every rank, the names of those that are there and whole: the others, among them
    damaged ones, are to be made. settings: what all clips share, fit for JSON, `frames` among it.
    weights: the network's, see `weight_files`, then those of each adapter on it. Raises
    ConfigError, on all ranks, if the folder holds clips of other settings, weights, prompts or
    images, or if ranks found different weights.
    """
    found = sorted(set(session.gather(", ".join(map(str, weights)))))
    if len(found) > 1:
        raise ConfigError(f"a run goes on saving: ranks found {found}; begin again")
    claim = Claim(folder, settings, holds="clips", older=OLDER)
    whole: set[str] = set()
    session.on_main(lambda: whole.update(_begin(claim, weights, clips, session.device)))
    return frozenset(json.loads(session.from_main(json.dumps(sorted(whole)))))


def finish_manifest(folder: Path, written: Iterable[Mapping[str, str]]) -> None:
    """Note in the manifest the clips that were made, and that all are there, if they are.

    written: of each rank the SHA-256 of its clips, by file, see `ClipNotes`.
    """
    manifest = _read(folder)
    clips = manifest["clips"]
    for digests in written:
        clips = _with_digests(clips, digests)
    complete = not absent(folder, (clip.file for clip in clips))
    _write(folder, {**manifest, "complete": complete, "clips": clips})
    forget_notes(folder)


def _with_digests(
    clips: Sequence[ClipRecord], digests: Mapping[str, str] | Mapping[str, str | None]
) -> list[ClipRecord]:
    return [replace(clip, sha256=digests.get(clip.file, clip.sha256)) for clip in clips]


def _read(folder: Path) -> dict[str, Any]:
    """A folder's manifest; empty where there is none. Raises ConfigError if it is damaged."""
    path, what = folder / MANIFEST, "a manifest of clips"
    if not path.is_file():
        return {}
    manifest = read_mapping(path, what)
    try:
        return {**manifest, "clips": [from_json(c, ClipRecord) for c in manifest["clips"]]}
    except (DamagedError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not {what}: {error}") from error


def _begin(
    claim: Claim, weights: Sequence[Path], clips: Sequence[ClipRecord], device: torch.device
) -> set[str]:
    """What `claim_folder` does on the main rank; returns the clips that are there and whole."""
    claim.check()
    folder, before = claim.folder, _read(claim.folder)
    earlier = _with_digests(before.get("clips", ()), noted(folder))
    every = _continued(folder, earlier, clips)
    digests = sha256_of(weight_files(weights[0]) | adapter_files(weights[1:]))
    if before.get("weights_sha256", digests) != digests:
        told = " or ".join(map(str, weights))
        raise ConfigError(
            f"--output_folder {folder}: holds clips of other weights: {told} has changed since; "
            f"use another folder"
        )
    made_by, here = before.get("made_by", []), environment(device)
    known = {clip.file: clip.sha256 for clip in earlier if clip.sha256 is not None}
    frames = int(str(claim.settings.get("frames", 1)))
    extents = {clip.file: Extent(frames, clip.height, clip.width) for clip in clips}
    whole = whole_clips(folder, extents, known)
    if here not in made_by and len(whole) < len(clips):
        made_by = [*made_by, here]
    claim.begin()
    shared = {"complete": False, **claim.settings, "weights_sha256": digests}
    every = _with_digests(every, known | dict.fromkeys(extents) | whole)
    _write(folder, {**shared, "made_by": made_by, "clips": every})
    forget_notes(folder)
    return set(whole)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    lines = [asdict(clip) for clip in manifest["clips"]]
    text = json.dumps({**manifest, "clips": lines}, indent=1, ensure_ascii=False)
    write_text(folder / MANIFEST, text + "\n")


def _continued(
    folder: Path, before: Sequence[ClipRecord], clips: Sequence[ClipRecord]
) -> list[ClipRecord]:
    """`clips`, and after them others of an earlier call that are in the folder.

    Raises ConfigError if a file that exists is not the clip that is wanted under its name.
    """
    known = {clip.file: clip for clip in before}
    there = [clip for clip in clips if (folder / clip.file).is_file()]
    for clip in there:
        if known.get(clip.file) != clip:
            raise ConfigError(
                f"--output_folder {folder}: {clip.file} is another clip than this call makes "
                f"({_difference(known.get(clip.file), clip)}); use another folder"
            )
    wanted = {clip.file for clip in clips}
    others = [clip for clip in before if clip.file not in wanted]
    return [*clips, *(clip for clip in others if (folder / clip.file).is_file())]


def _difference(old: ClipRecord | None, new: ClipRecord) -> str:
    if old is None:
        return f"{MANIFEST} does not know it"
    was, is_ = asdict(replace(old, sha256=None)), asdict(replace(new, sha256=None))
    return "; ".join(f"{k} was {was[k]!r:.80}, is {is_[k]!r:.80}" for k in was if was[k] != is_[k])
