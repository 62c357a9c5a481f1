"""Prompts as users bring them: lists, folders, tables of public benchmarks, pairs with images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from utils import shipped
from utils.errors import NotFoundError, UserError
from utils.media.images import IMAGE_SUFFIXES

Rows = Iterator[tuple[int, Any]]  # a number for messages, and a text or a mapping

# Columns of a table, the first that is there; VBench says prompt_en, image_name and dimension.
PROMPT_KEYS = ("prompt_en", "prompt", "caption", "text")
IMAGE_KEYS = ("image_name", "image", "file_name")
LAST_SUFFIX = "_last"  # of the stem of a last image
NAMED = 5  # files that an error lists


@dataclass(frozen=True)
class Picture:
    """An image file, and the part of it that counts."""

    path: Path
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels; None = all
    origin: tuple[int, int] | None = None  # height and width of the file that `box` is drawn on


@dataclass(frozen=True)
class PromptItem:
    """One prompt with all that a list says of it."""

    text: str  # what a model is conditioned on
    title: str  # what names its files: the prompt as its list has it
    name: str = ""  # stem of its own file, if it has one
    image: Picture | None = None
    last_image: Picture | None = None  # of first-last-frame models
    dimensions: tuple[str, ...] = ()  # of VBench, that it is judged on

    @property
    def pictures(self) -> list[Picture]:
        """The images that there are, the first one first."""
        return [picture for picture in (self.image, self.last_image) if picture is not None]


def read_prompt_file(path: Path) -> list[str]:
    """One prompt per line, UTF-8; blank lines are skipped. Raises ValueError if none is left."""
    path = shipped.find(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such prompt file (one prompt per line)")
    prompts = [line.strip() for line in read_utf8(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one per line")
    return prompts


def read_prompt_folder(folder: Path) -> list[str]:
    """The whole content of each .txt file as one prompt, in the order of file names."""
    return [item.text for item in _folder(folder)]


def read_prompts(path: Path) -> list[PromptItem]:
    """The prompts of a list (.txt: one per line), a table (.json, .jsonl, .csv, .tsv) or a folder.

    Lists: as of VBench, MovieGenBench and T2V-CompBench. Tables: a column of PROMPT_KEYS, such as
    VBench_full_info.json has; their images (IMAGE_KEYS) lie beside them. Folders: of .txt files.
    Raises FileNotFoundError or ValueError that names the file and what was expected.
    """
    path = shipped.find(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file or folder of prompts")
    if path.suffix.lower() in TABLES:
        rows = TABLES[path.suffix.lower()](path, read_utf8(path))
        items = [_item(path, number, row) for number, row in rows]
        if not items:
            raise UserError(f"{path}: holds no prompt")
        return items
    return [PromptItem(text, text) for text in read_prompt_file(path)]


def read_image_prompts(path: Path, *, named_by_prompt: bool = False) -> list[PromptItem]:
    """Prompts with images: a folder of pairs, a folder with a crop list, or a table.

    Pairs are an image and a .txt of the same stem; <stem>_last.<suffix> is the image that a clip
    ends with. A crop list is one target_crop_info_<ratio>.json beside the folder <ratio>. A table
    names images that lie beside it. `named_by_prompt`: the stems of the images are their prompts,
    as in VBench-I2V, if no text lies beside them.
    Raises FileNotFoundError or ValueError that lists what has no partner.
    """
    path = shipped.find(path)
    if path.is_file() and path.suffix.lower() in TABLES:
        items = read_prompts(path)
    elif not path.is_dir():
        raise NotFoundError(
            f"{path}: no image prompts here; give a folder of images with a .txt of the same stem "
            f"each, or a table ({', '.join(TABLES)}) that names images beside it"
        )
    elif lists := sorted(path.glob("target_crop_info_*.json")):
        items = _crop_list(path, lists)
    else:
        return _pairs(path, named_by_prompt=named_by_prompt)
    _check_found(path, [item.image.path if item.image else None for item in items])
    return items


def with_extended(items: Sequence[PromptItem], path: Path, source: Path) -> list[PromptItem]:
    """The items, conditioned on the prompts at `path` but named as before.

    A file goes line by line; a folder holds .txt files under the names of those in `source`.
    Raises FileNotFoundError or ValueError unless each item has exactly one.
    """
    if path.is_dir():
        texts = {item.name: item.text for item in _folder(path)}
        absent = [item.name or item.title[:60] for item in items if item.name not in texts]
        if absent:
            raise UserError(
                f"--extended_prompt_path: {path} lacks {len(absent)} of the {len(items)} files "
                f"of {source}, or has them empty: {some(absent)}"
            )
        return [replace(item, text=texts[item.name]) for item in items]
    longer = read_prompts(path)
    if len(longer) != len(items):
        raise UserError(
            f"--extended_prompt_path: {path} has {len(longer)} prompts, {source} has "
            f"{len(items)}; they must match line by line"
        )
    return [replace(item, text=other.text) for item, other in zip(items, longer, strict=True)]


def merged(items: Iterable[PromptItem]) -> list[PromptItem]:
    """One item per title, with all its dimensions, in the order of first mention.

    Raises ValueError if a title stands for two texts or images.
    """
    result: dict[str, PromptItem] = {}
    for item in items:
        first = result.setdefault(item.title, item)
        if replace(first, dimensions=(), name="") != replace(item, dimensions=(), name=""):
            raise UserError(f"two prompts of the same words would share files: '{item.title}'")
        dimensions = tuple(dict.fromkeys(first.dimensions + item.dimensions))
        result[item.title] = replace(first, dimensions=dimensions)
    return list(result.values())


def read_utf8(path: Path) -> str:
    """A text file, less its byte order mark. Raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _folder(folder: Path) -> list[PromptItem]:
    files = _texts(folder)
    texts = {file.stem: read_utf8(file).strip() for file in files}
    items = [PromptItem(text, text, name) for name, text in texts.items() if text]
    if not items:
        raise UserError(
            f"{folder}: holds no prompt: {len(files)} .txt files, all empty; "
            f"expected .txt files with one prompt each, or LMDB shards"
        )
    return items


def _pairs(folder: Path, *, named_by_prompt: bool) -> list[PromptItem]:
    images = _by_stem(folder)
    texts = {file.stem: read_utf8(file).strip() for file in _texts(folder)}
    if named_by_prompt and not texts:
        texts = {stem: stem for stem in images}
    last = {
        stem: path
        for stem, path in images.items()
        if stem not in texts and stem.removesuffix(LAST_SUFFIX) in images.keys() - {stem}
    }
    first = {stem: path for stem, path in images.items() if stem not in last}
    faults = {
        "images without a .txt": sorted(first.keys() - texts.keys()),
        "texts without an image": sorted(texts.keys() - first.keys()),
        "empty texts": sorted(stem for stem, text in texts.items() if not text),
    }
    found = [f"{len(stems)} {what} ({some(stems)})" for what, stems in faults.items() if stems]
    if found:
        raise UserError(f"{folder}: not all are pairs of an image and a text: {'; '.join(found)}")
    if not first:
        raise UserError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    ends = {stem.removesuffix(LAST_SUFFIX): Picture(path) for stem, path in last.items()}
    return [
        PromptItem(texts[stem], texts[stem], stem, Picture(path), ends.get(stem))
        for stem, path in first.items()
    ]


def _texts(folder: Path) -> list[Path]:
    """The .txt files of a folder, sorted, without hidden ones, as macOS leaves beside each."""
    return sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder. Raises ValueError if two have the same stem."""
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in images:
                raise UserError(
                    f"{folder}: {images[path.stem].name} and {path.name} would share one text; "
                    f"keep one of them"
                )
            images[path.stem] = path
    return images


def _crop_list(folder: Path, lists: Sequence[Path]) -> list[PromptItem]:
    if len(lists) > 1:
        raise UserError(
            f"{folder}: holds {len(lists)} crop lists ({some([p.name for p in lists])}); keep one"
        )
    (path,) = lists
    images = folder / path.stem.removeprefix("target_crop_info_")
    items = []
    for number, row in _json(path, read_utf8(path)):
        item = _item(path, number, row)
        if item.image is None:
            raise UserError(f"{path}: entry {number}: no file_name")
        origin = [row[key] for key in ("origin_height", "origin_width") if row.get(key)]
        if not all(isinstance(side, int) for side in origin):
            raise UserError(
                f"{path}: entry {number}: origin_height and origin_width must be whole numbers, "
                f"got {origin}"
            )
        picture = Picture(
            images / item.image.path.name,
            _box(row.get("target_crop"), f"{path}: entry {number}"),
            (origin[0], origin[1]) if len(origin) == 2 else None,
        )
        items.append(replace(item, image=picture))
    if not items:
        raise UserError(f"{path}: holds no prompt")
    return items


def _box(crop: Any, where: str) -> tuple[int, int, int, int] | None:
    if crop is None:
        return None
    try:
        left, top, right, bottom = (round(float(edge)) for edge in crop["target_bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        left = top = right = bottom = 0
    if not (0 <= left < right and 0 <= top < bottom):
        raise UserError(
            f"{where}: target_crop must hold target_bbox: [left, top, right, bottom], got {crop}"
        )
    return left, top, right, bottom


def _check_found(source: Path, images: Sequence[Path | None]) -> None:
    """Raise ValueError unless each is a file."""
    if None in images:
        raise UserError(f"{source}: names no images; it needs a column {' or '.join(IMAGE_KEYS)}")
    absent = [str(path) for path in images if path is not None and not path.is_file()]
    if absent:
        raise UserError(
            f"{source}: {len(absent)} of its {len(images)} images are missing: {some(absent)}"
        )


def _item(path: Path, number: int, row: Any) -> PromptItem:
    """One row of a table: a text alone, or a mapping with a text. `number` is for messages."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise UserError(f"{path}: entry {number} is neither a text nor a mapping: {row!r:.60}")
    key = next((key for key in PROMPT_KEYS if key in row), None)
    if key is None:
        raise UserError(
            f"{path}: entry {number} has no prompt; its keys are {sorted(map(str, row))}, "
            f"a prompt is looked for under {', '.join(PROMPT_KEYS)}"
        )
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}: entry {number}: '{key}' must be a text, got {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write halves of characters
        raise UserError(
            f"{path}: entry {number}: '{key}' has half a character at {error.start}: {text!r:.60}"
        ) from error
    image = next((row[name] for name in IMAGE_KEYS if row.get(name)), None)
    dimensions = row.get("dimension") or []
    if not isinstance(dimensions, str | list):
        raise UserError(f"{path}: entry {number}: 'dimension' is no list, but {dimensions!r:.60}")
    return PromptItem(
        text=text.strip(),
        title=text.strip(),
        name="" if image is None else Path(str(image)).stem,
        image=None if image is None else Picture(path.parent / str(image)),
        dimensions=(dimensions,) if isinstance(dimensions, str) else tuple(dimensions),
    )


def _json(path: Path, text: str) -> Rows:
    """The entries of a list; a mapping at the top is none."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, list):
        found = f"a mapping of {sorted(content)[:8]}" if isinstance(content, dict) else "a value"
        raise UserError(
            f"{path}: holds {found}, expected a list of prompts, or of mappings with one of "
            f"{', '.join(PROMPT_KEYS)}"
        )
    yield from enumerate(content, start=1)


def _json_lines(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error}") from error


def _separated(delimiter: str, path: Path, text: str) -> Rows:
    try:
        yield from enumerate(csv.DictReader(io.StringIO(text), delimiter=delimiter), start=1)
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table: {error}") from error


TABLES: dict[str, Callable[[Path, str], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": partial(_separated, ","),
    ".tsv": partial(_separated, "\t"),
}


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
