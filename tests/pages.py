"""HTML pages as tests look at them: well formed, whole in one file, and what they say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "link"}
SHAPES = {"line", "polyline", "circle"}  # closed in place


class Page(HTMLParser):
    """A parsed page: its words, what it loads, and whether its tags fit."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(content)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.sources += [value or "" for name, value in attrs if name == "src"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES | VOID, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> within {self._open}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that a reader sees, in one line."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        """How many there are of a tag."""
        return sum(name == tag for name, _ in self.tags)


def read_page(content: str) -> Page:
    """A page that must be whole: nothing is loaded from anywhere."""
    page = Page(content)
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", content.replace("http://www.w3.org", ""))
    assert not any(tag == "link" for tag, _ in page.tags)
    assert "@import" not in content
    return page
