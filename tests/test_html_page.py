import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from util.html_page import Section, chart, paragraph, picture, pictures, render_page, table, write_page

HOSTILE = "<script>document.title = 'hurt'</script> & \"quoted\" ' x"


def drawn_figure(values: tuple[int, ...] = (1, 3, 2)) -> Figure:
    figure = Figure(figsize=(5, 3))
    axes = figure.add_subplot()
    axes.plot(values, color="#0072B2", label="a line", clip_on=True)
    axes.plot([0, 2], [2, 2], marker="o", color="#333333")
    axes.set_xlabel("Steps & more")
    return figure


class Checker(HTMLParser):
    """Collects tags, ids and what refers to other files, and checks that tags are closed in order."""

    EMPTY = ("meta", "img", "link", "br", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    image = np.full((40, 60, 3), (200, 30, 90), np.uint8)
    sections = [
        Section("Numbers", [paragraph(HOSTILE), table(["set", "rate"], [["LFW", "0.5 ± 0.1"], [HOSTILE, "n/a"]])]),
        Section("Charts", [chart(drawn_figure(), HOSTILE), chart(drawn_figure((3, 1, 1)))]),
        Section("Pictures", [pictures([picture(image, HOSTILE), picture(image)])]),
        Section(HOSTILE, ["plain text"]),
    ]
    return render_page(HOSTILE, sections, intro="What it is.")


def test_page_is_well_formed_and_names_no_other_file(page):
    checked = Checker(page)
    assert "script" not in checked.tags
    assert {"table", "svg", "img", "nav"} <= set(checked.tags)
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in checked.links)
    assert len(set(checked.ids)) == len(checked.ids)
    references = re.findall(r"url\(#([^)]+)\)", page) + [link[1:] for link in checked.links if link[0] == "#"]
    assert len(references) > 10 and set(references) <= set(checked.ids)


def test_text_is_escaped_everywhere(page):
    assert HOSTILE not in page and "<script" not in page
    # Title twice, link, heading, paragraph, cell, two captions, the alternative text of a picture.
    assert page.count("&lt;script&gt;") == 9


def test_table_aligns_columns_of_numbers_to_the_right():
    html = table(["name", "value", "mixed"], [["a", "-1.5", "1"], ["b", "≤ 3 %", "one"]])
    assert re.findall(r"<th [^>]*>", html) == [
        '<th scope="col">',
        '<th scope="col" class="number">',
        '<th scope="col">',
    ]
    assert re.findall(r"<td[^>]*>([^<]*)", html) == ["a", "-1.5", "1", "b", "≤ 3 %", "one"]
    assert "<td" not in table(["name"], [])


def test_chart_follows_the_colors_of_the_page():
    svg = chart(drawn_figure())
    assert "#333333" not in svg and "#0072b2" not in svg.lower()
    assert "currentColor" in svg and "var(--blue)" in svg
    assert "Steps &amp; more" in svg and "DejaVu" not in svg
    assert svg == chart(drawn_figure())  # the same in every run


def test_picture_shows_the_pixels_in_rgb():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :, 0] = 250
    html = picture(image, "red")
    encoded = re.search(r"base64,([^\"]+)", html)[1]
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels.shape == image.shape and np.abs(pixels.astype(int) - image).max() <= 6
    assert 'width="32" height="16" alt="red"' in html


def test_write_page_shows_bytes_of_names_that_are_not_utf8(tmp_path):
    write_page(tmp_path / "page.html", render_page("Faces \udcff 얼굴", []))
    assert r"Faces \udcff 얼굴" in (tmp_path / "page.html").read_text("utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_chromium_shows_the_page_in_both_schemes(page, tmp_path, open_in_chromium, width, scheme):
    write_page(tmp_path / "page.html", page)
    shot = tmp_path / "shot.png"
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    open_in_chromium(tmp_path / "page.html", f"--window-size={width},1600", f"--screenshot={shot}", setting)
    pixels = cv2.imread(str(shot), cv2.IMREAD_COLOR_RGB)
    assert pixels.shape == (1600, width, 3)
    background = (0x14, 0x17, 0x1C) if scheme == "dark" else (255, 255, 255)
    assert (pixels[:, -8:] == background).all()  # nothing is wider than the page
    picture_pixels = np.abs(pixels.astype(int) - (200, 30, 90)).max(axis=2) < 12
    assert picture_pixels.sum() > 2 * 40 * 60 * 0.9  # both pictures
    blue = (0x4A, 0xA8, 0xE0) if scheme == "dark" else (0x00, 0x72, 0xB2)
    assert (np.abs(pixels.astype(int) - blue).max(axis=2) < 12).sum() > 100  # the lines of the charts


def test_chromium_reports_what_a_page_must_not_do(tmp_path, open_in_chromium):
    """The check of the tests that open a page can fail: a request is refused by the page's own policy."""
    write_page(tmp_path / "page.html", render_page("x", [Section("x", [Markup('<img src="http://localhost/x.png">')])]))
    with pytest.raises(AssertionError, match=r"http://localhost/x\.png.* violates"):
        open_in_chromium(tmp_path / "page.html", "--dump-dom")
