"""Walk a tree of images, and name the files that are made from them."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from util.image_io import SUFFIXES

# The ending of an output name of the second, third, ... face of a photograph.
_FACE_NUMBER = re.compile(r"\.face\d+$", re.IGNORECASE)


def walk(source: Path, dest: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder relative to `source`, sorted names of its files) for each folder, in sorted order.

    Links to folders are followed, but each real folder is visited once. `dest` is skipped if it lies within `source`.
    """
    skipped = {os.path.realpath(dest)}
    for folder, subfolders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in skipped:
            subfolders.clear()
            continue
        skipped.add(real)
        subfolders.sort()
        yield os.path.relpath(folder, source), sorted(names)


def unique_output_names(names: list[str]) -> list[str]:
    """Return a different output name, without a suffix, for each file name of a folder.

    0001.jpg becomes 0001. If another file could get the same name, a file keeps its suffix: 0001.jpg and 0001.png
    become 0001.jpg and 0001.png, to which the suffix of the output is added. No output name ends in .face2, which
    marks the second face of a photograph. Case does not count, because some file systems ignore it.
    """
    stems = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        stems.append(stem if suffix.lower() in SUFFIXES else name)
    # A shortened name also claims its full form, which it falls back to.
    claims = Counter(stem.casefold() for stem in stems)
    claims.update(name.casefold() for name, stem in zip(names, stems, strict=True) if stem != name)
    outputs = []
    for name, stem in zip(names, stems, strict=True):
        is_unique = claims[stem.casefold()] == 1 and not _FACE_NUMBER.search(stem)
        output = stem if is_unique else name
        outputs.append(f"{output}.face1" if _FACE_NUMBER.search(output) else output)
    return outputs


def printable(name: str | Path) -> str:
    """Return a file name for the console, with bytes that are not UTF-8 escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()
