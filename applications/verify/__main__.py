"""Compare two photographs: do they show the same person? From the repository root:

    python -m applications.verify A.jpg B.jpg --network Backbone_Best.pth --calibration calibration.json
    python -m applications.verify A.jpg B.jpg --network net.onnx --plot compared.png

The program finds the faces, aligns them and compares their embeddings. It prints the cosine (1: the same, around 0:
different people) and, with a calibration, how many strangers look as alike. Of several faces in a photograph it takes
the one of --select, and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.cli.options import GROUPS, PhotographSettings
from util.cli.parser import PATHS, option, parse
from util.cli.types import to_file, to_png
from util.errors import run_script
from util.files import require_writable_file

if TYPE_CHECKING:
    import numpy as np

    from applications.recognizer import Comparison, FoundFace

_HEIGHT, _GAP = 420, 16  # pixels of a photograph in the plot, and between the photographs


def _to_two_files(value: object) -> tuple[Path, ...]:
    """Return the paths of two files."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("two photographs")
    return tuple(map(to_file, value))


@dataclass(frozen=True, kw_only=True)
class Flags(PhotographSettings):
    """The settings of applications.verify."""

    images: tuple[Path, ...] = option(
        PATHS,
        default=(),
        type=_to_two_files,
        metavar="A.jpg B.jpg",
        help="the two photographs",
        required=True,
        positional=True,
        split_words=True,
    )
    plot: Path | None = option(
        "Output",
        type=to_png,
        metavar="FILE.png",
        help="draw both photographs with their faces",
        default_help="not drawn",
    )


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.verify", arguments, groups=GROUPS, description=__doc__)
    if flags.plot:
        require_writable_file("--plot", flags.plot)

    # torch takes seconds to import: report mistakes in the command line first.
    from applications.recognizer import CALIBRATE, Recognizer
    from util.image_io import write_image
    from util.image_tree import printable

    recognizer = Recognizer.from_settings(flags)
    compared = recognizer.compare(*flags.images)
    for path, found in zip(flags.images, (compared.first, compared.second), strict=True):
        if found.faces > 1:
            print(f"{printable(path)}: {found.faces} faces, taking the {flags.select} one (--select)")
    lines = [f"cosine: {compared.cosine:.4f} (squared distance: {compared.squared_distance:.4f})"]
    if recognizer.calibration is None:
        print(f"{lines[0]}\nwithout a calibration: how rare that is among strangers is not known. {CALIBRATE}.")
    else:
        lines.append(recognizer.calibration.describe(compared.cosine))
        print("\n".join(lines))
        print(f"strangers: {recognizer.calibration.source}, {recognizer.calibration.pairs:,} pairs")
    if flags.plot:
        write_image(flags.plot, draw_comparison(compared, lines))
        print(f"both photographs: {printable(flags.plot)}")


def draw_comparison(compared: "Comparison", lines: Sequence[str]) -> "np.ndarray":
    """Return a page with both photographs, their faces marked, the aligned faces, and lines of text below."""
    import numpy as np

    from util.annotate import INK, PAPER, draw_text, text_size

    first, second = (_draw_photograph(found) for found in (compared.first, compared.second))
    size, line = 22, 36
    text_width = max(text_size(text, size)[0] for text in lines)
    width = max(first.shape[1] + second.shape[1] + 3 * _GAP, text_width + 2 * _GAP)
    page = np.full((_HEIGHT + 2 * _GAP + line * len(lines) + _GAP // 2, width, 3), PAPER, np.uint8)
    page[_GAP : _GAP + _HEIGHT, _GAP : _GAP + first.shape[1]] = first
    left = 2 * _GAP + first.shape[1]
    page[_GAP : _GAP + _HEIGHT, left : left + second.shape[1]] = second
    for number, text in enumerate(lines, start=1):
        draw_text(page, text, _GAP, bottom=_GAP + _HEIGHT + number * line, size=size, color=INK)
    return page


def _draw_photograph(found: "FoundFace") -> "np.ndarray":
    """Return (HEIGHT, W, 3): the photograph with the face marked, and the aligned face on its right."""
    import cv2
    import numpy as np

    from util.annotate import PAPER, draw_face

    scale = _HEIGHT / found.image.shape[0]
    width = max(1, round(found.image.shape[1] * scale))
    shrinks = scale < 1
    photo = cv2.resize(found.image, (width, _HEIGHT), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    draw_face(photo, found.face.box * scale, found.face.landmarks * scale)
    side = np.full((_HEIGHT, found.aligned.shape[1], 3), PAPER, np.uint8)
    side[: found.aligned.shape[0]] = found.aligned
    return np.hstack([photo, np.full((_HEIGHT, _GAP // 2, 3), PAPER, np.uint8), side])


if __name__ == "__main__":
    run_script(main)
