"""Write an HTML page in one file: tables, charts and pictures, for light and dark screens, narrow and wide ones.

write_page(file, render_page("Title", [Section("Heading", [paragraph("Text."), table(["set", "accuracy"], rows)])]))

The page loads nothing: charts are SVG and pictures are data URIs. It has no script. Text is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from util.files import atomic_write
from util.plot import COLORS, GRID, INK, PALE_INK, SPINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_JPEG_QUALITY = 90
_NUMBER = re.compile(r"[-+±<>≤≥]?\s*\d.*|n/a|")  # cells of a column that is aligned to the right
# What the figures of util/plot are drawn in, as colors that follow the page.
_PAGE_COLORS = {
    "#000000": "currentColor",
    INK: "currentColor",
    COLORS[6]: "currentColor",
    PALE_INK: "var(--muted)",
    SPINE: "var(--spine)",
    GRID: "var(--grid)",
    COLORS[0]: "var(--blue)",
    COLORS[1]: "var(--orange)",
    COLORS[2]: "var(--green)",
}
_SMALLEST = 0.72  # of the size at which a chart was drawn: a narrower screen scrolls


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading. Each of `parts` is made by a function below, or is plain text."""

    heading: str
    parts: Sequence[str]


def render_page(title: str, sections: Sequence[Section], *, intro: str = "") -> str:
    """Return the HTML of a page.

    Args:
        title: the title of the window and the first heading.
        sections: the content. With more than three sections the page begins with links to them.
        intro: the paragraph below the title.
    """
    return str(_macro("page", title, sections, intro))


def write_page(file: Path, html: str) -> None:
    """Write a page atomically. Bytes of file names that are not UTF-8 are shown as backslash escapes."""
    with atomic_write(file) as partial:
        partial.write_bytes(html.encode("utf-8", "backslashreplace"))


def paragraph(text: str) -> Markup:
    """Return a paragraph of text."""
    return _macro("paragraph", text)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table. Columns of numbers are aligned to the right. A wide table scrolls in its own box."""
    cells = [[cell if isinstance(cell, Markup) else str(cell) for cell in row] for row in rows]
    numeric = [bool(cells) and all(map(_NUMBER.fullmatch, column)) for column in zip(*cells, strict=True)]
    return _macro("table", header, cells, numeric or [False] * len(header))


def chart(figure: Figure, caption: str = "") -> Markup:
    """Return a matplotlib figure as SVG. Text and axes follow the page's light or dark colors.

    Charts stand next to each other on a wide screen, and scroll on a screen where their text would be too small.
    """
    from matplotlib import rc_context

    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fixed"}):  # text as text; the same ids in every run
        figure.savefig(drawn, format="svg", transparent=True, metadata=no_metadata)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    # The ids that something refers to get a prefix of their own, and the others, equal in all figures, are removed.
    prefix = f"c{hashlib.sha256(svg.encode()).hexdigest()[:10]}-"
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    names = {first or second for first, second in used}
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in names else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
    for color, name in _PAGE_COLORS.items():
        svg = re.sub(color, name, svg, flags=re.IGNORECASE)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", svg)
    width = round(figure.get_figwidth() * 96)  # CSS pixels
    svg = svg.replace("<svg ", f'<svg role="img" style="min-width: {round(_SMALLEST * width)}px" ', 1)
    return _macro("chart", Markup(svg), width, caption)


def picture(image: np.ndarray, caption: str = "") -> Markup:
    """Return an image, (H, W, 3) RGB uint8, in its own size, with a caption that is its alternative text too."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    data = base64.b64encode(encoded.tobytes()).decode()
    return _macro("picture", data, image.shape[1], image.shape[0], caption)


def pictures(items: Sequence[Markup]) -> Markup:
    """Return pictures in rows that wrap at the width of the screen."""
    return _macro("pictures", items)


def _macro(name: str, *arguments: Any) -> Markup:
    """Return what a macro of the template makes of its arguments."""
    module = _ENVIRONMENT.get_template("html_page.html.jinja").module
    made: Markup = getattr(module, name)(*arguments)
    return made
