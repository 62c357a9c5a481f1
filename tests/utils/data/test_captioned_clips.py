"""Files of encoded clips, those of other systems among them."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.data.captioned_clips import read_encoded_clips


def test_files_of_old_torch_versions_are_read(tmp_path: Path) -> None:
    latents = torch.arange(2.0 * 16 * 4 * 4).view(1, 2, 16, 4, 4)
    path = tmp_path / "a.pt"
    torch.save({"a red circle": latents}, path, _use_new_zipfile_serialization=False)
    (clip,) = read_encoded_clips(path)
    assert clip.prompt == "a red circle"
    assert torch.equal(clip.latents, latents[0].transpose(0, 1))
