"""The building blocks of a page: text in, HTML out; pictures and videos inside of it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent.parent / "page"  # style and script, beside the demo's
KINDS = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".gif": "image/gif"}

Tone = Literal["good", "bad", "warn", "calm"]


def page(title: str, body: str) -> str:
    """A whole HTML page, with its style and script inside."""
    style = (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{style}</style></head>
<body><main>{body}</main>
<script>{script}</script></body></html>
"""


def text(value: object) -> str:
    """Anything as text that HTML shows as it is."""
    return html.escape(str(value))


def section(title: str, content: str, note: str = "") -> str:
    """A part of a page under a heading; nothing where it has no content. note: HTML."""
    if not content:
        return ""
    told = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{told}{content}</section>"


def folded(title: str, content: str, *, opened: bool = False) -> str:
    """Content that a click unfolds."""
    return (
        f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{content}</details>"
    )


def badge(words: str, tone: Tone) -> str:
    """A few words in a coloured pill."""
    return f'<span class="badge {tone}">{text(words)}</span>'


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Facts side by side, each (label, value, note)."""
    cells = "".join(
        f'<div class="tile"><div class="label">{text(label)}</div>'
        f'<div class="value">{text(value)}</div><div class="soft">{text(note)}</div></div>'
        for label, value, note in facts
    )
    return f'<div class="tiles">{cells}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Sequence[bool] = ()
) -> str:
    """Cells of HTML under headings of HTML; the first column to the left. marked: rows that are."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="marked"' if number < len(marked) and marked[number] else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def data_url(path: Path) -> str:
    """A picture or video as a URL that holds it."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{KINDS[path.suffix]};base64,{content}"


def video(path: Path, about: str) -> str:
    """A video that plays silently in a loop; a word where it is not there."""
    if not path.is_file():
        return '<span class="soft">not there</span>'
    return (
        f'<video autoplay loop muted playsinline aria-label="{text(about)}" '
        f'src="{data_url(path)}"></video>'
    )


def picture(path: Path, about: str) -> str:
    """An image."""
    return f'<img alt="{text(about)}" src="{data_url(path)}">'


def gallery(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Clips in columns under their names, a row per caption; on a phone rows wrap. HTML cells."""
    lines = []
    for caption, cells in rows.items():
        figures = "".join(
            f"<figure><figcaption>{name}</figcaption>{cell}</figure>"
            for name, cell in zip(columns, cells, strict=True)
        )
        lines.append(
            f'<div class="caption">{text(caption)}</div><div class="clips">{figures}</div>'
        )
    return f'<div class="gallery">{"".join(lines)}</div>'


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits that count; a dash for none."""
    if value is None:
        return "&ndash;"
    return text(f"{value:.{digits}g}")


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def settings_table(settings: Mapping[str, object]) -> str:
    """Settings by their dotted keys."""
    rows = [
        [f"<code>{text(key)}</code>", f"<code>{text(value)}</code>"]
        for key, value in settings.items()
    ]
    return table(["setting", "value"], rows)
