"""Pictures of every kind become RGB, and frames are brought to size without distortion."""

from __future__ import annotations

import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile
from torch import Tensor

from utils.media import images
from utils.media.images import FORMATS, IMAGE_SUFFIXES, describe_fit, fit, read_image


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def colour(pixels: Tensor) -> list[int]:
    """The one colour of a picture."""
    assert bool((pixels == pixels[:, :1, :1]).all())
    return pixels[:, 0, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 100, 200, 51), [204, 224, 244]),
        ("LA", (0, 51), [204, 204, 204]),
        ("I;16", 257 * 77, [77, 77, 77]),
    ],
)
def test_every_kind_of_png_becomes_rgb(
    tmp_path: Path, mode: str, value: object, expected: list[int]
) -> None:
    path = saved(tmp_path / "a.png", Image.new(mode, (5, 3), value))  # type: ignore[arg-type]
    pixels = read_image(path)
    assert (pixels.shape, pixels.dtype) == ((3, 3, 5), torch.uint8)
    assert colour(pixels) == pytest.approx(expected, abs=1)


def test_palettes_keep_their_colours_and_their_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert colour(read_image(saved(tmp_path / "a.png", image))) == [200, 100, 50]
    path = saved(tmp_path / "b.png", image, transparency=1)
    assert colour(read_image(path)) == [255, 255, 255]


def test_print_colours_become_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    assert colour(read_image(path)) == pytest.approx([255, 0, 0], abs=6)


def test_a_picture_is_turned_as_its_exif_data_tell(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 16), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = read_image(saved(tmp_path / "a.png", image, exif=exif))
    assert pixels.shape == (3, 8, 16)
    assert (int(pixels[0, 4, 2]), int(pixels[0, 4, 13])) == (0, 255)


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), c) for c in ("red", "blue"))
    path = saved(tmp_path / "a.gif", first, save_all=True, append_images=[second])
    assert colour(read_image(path)) == [255, 0, 0]


def test_a_missing_picture_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a.png: no such image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("left", [0, 30, 0.5])
def test_a_torn_picture_names_its_file(tmp_path: Path, kind: str, left: float) -> None:
    noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(noise.numpy().astype(np.uint8)))
    content = path.read_bytes()
    path.write_bytes(content[: int(left if left != 0.5 else len(content) // 2)])
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: not readable as an image: ")
    assert len(str(caught.value).splitlines()) == 1


def test_sixteen_bits_of_grey_are_rounded_to_eight(tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = read_image(saved(tmp_path / "a.png", Image.fromarray(levels)))[0].numpy()
    assert np.array_equal(grey, (levels.astype(np.float64) * (255.0 / 65535.0)).round())


# ---- what nobody should open


POSTSCRIPT = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(ran) (w) file closefile
showpage
%%EOF
"""


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_postscript_is_refused_under_every_name_and_no_program_is_run_for_it(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(POSTSCRIPT, encoding="ascii")
    assert Image.open(path).format == "EPS"  # what Pillow would make of it
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == (
        f"{path}: not readable as an image: its content is none of PNG, JPEG, WEBP, BMP, GIF, TIFF"
    )


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA", "PDF", "JPEG2000", "SGI", "DDS"])
def test_formats_that_are_not_listed_are_refused_whatever_their_name(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path, format=kind)
    with pytest.raises(ValueError, match="its content is none of PNG, JPEG, "):
        read_image(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_listed_format_is_read_under_the_name_of_another(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 12), "white").save(path, format=kind)
    assert colour(read_image(path)) == [255, 255, 255]


def test_pictures_of_telephones_with_a_second_one_inside_are_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), c) for c in ("white", "black"))
    path = saved(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[second])
    assert colour(read_image(path)) == [255, 255, 255]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (32, 33)).save(path, format=kind)
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 33)
    assert read_image(path).shape == (3, 33, 32)
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 33 - 1)
    for name in ("load", "convert"):
        monkeypatch.setattr(ImageFile.ImageFile, name, lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == (
        f"{path}: has 33 x 32 pixels; at most 1055 are read, scale it down"
    )


@pytest.mark.parametrize(
    ("size", "said"), [((8193, 8192), "8192 x 8193"), ((30000, 30000), "too many")]
)
def test_a_small_file_that_claims_many_pixels_costs_no_memory(
    size: tuple[int, int], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    body = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(bytes(1000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header
        + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"has {said} pixels; at most 67108864 are read"):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# ---- sizes


def halves(height: int, width: int) -> Tensor:
    """White left of the middle, black right of it."""
    frame = torch.zeros(3, height, width, dtype=torch.uint8)
    frame[..., : width // 2] = 255
    return frame


def test_frames_of_the_right_size_are_not_touched() -> None:
    frames = torch.randint(256, (2, 3, 6, 8), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(fit(frames, (6, 8)), frames)


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 32), (15, 17)])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (8, 8), (9, 31)])
def test_the_middle_of_a_frame_stays_in_the_middle(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    fitted = fit(halves(shape[0], shape[1] // 2 * 2), size)
    assert fitted.shape == (3, *size)
    assert fitted.dtype == torch.uint8
    middle = size[1] // 2
    assert int(fitted[:, :, : middle - 4].min()) > 250
    assert int(fitted[:, :, middle + 5 :].max()) < 5


def test_shrinking_averages_instead_of_skipping() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    inner = fit(stripes, (8, 8))[..., 1:-1].float()
    assert (inner - 127.5).abs().max() < 8


def test_each_frame_of_a_clip_is_scaled_as_if_alone() -> None:
    frames = torch.randint(256, (2, 3, 3, 20, 30), generator=torch.Generator().manual_seed(0))
    clip = frames.byte()
    assert torch.equal(fit(clip, (16, 16))[1, 2], fit(clip[1, 2], (16, 16)))


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        ((1080, 1920), (480, 832), "1080 x 1920 scaled to 480 x 853, cropped to 480 x 832"),
        ((480, 853), (480, 832), "480 x 853 cropped to 480 x 832"),
        ((960, 1664), (480, 832), "960 x 1664 scaled to 480 x 832"),
        ((480, 832), (480, 832), "480 x 832 kept"),
    ],
)
def test_what_is_done_to_a_frame_is_told(
    shape: tuple[int, int], size: tuple[int, int], words: str
) -> None:
    assert describe_fit(shape, size) == f"{words} (height x width)"


@pytest.mark.parametrize("shape", [(90, 160), (64, 48), (33, 70)])
def test_lanczos_scales_as_pillow_does_and_crops_the_centre(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    height, width = 32, 64
    scale = max(width / shape[1], height / shape[0])
    size = (round(shape[1] * scale), round(shape[0] * scale))
    scaled = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    expected = np.array(scaled.crop((left, top, left + width, top + height)))
    found = fit(torch.from_numpy(pixels).permute(2, 0, 1), (height, width), "lanczos")
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))


def test_what_has_the_size_already_is_kept_by_every_way_of_scaling() -> None:
    pixels = torch.randint(256, (3, 32, 64), dtype=torch.uint8)
    assert torch.equal(fit(pixels, (32, 64), "lanczos"), pixels)
