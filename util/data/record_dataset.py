"""Training sets in RecordIO: InsightFace's sets, and sets that MXNet's im2rec makes.

InsightFace's sets begin with a header record, number 0, without content and with two labels A and B: records 1 to A - 1
are images, and records A to B - 1 are identity records. An identity record has two labels: the number of the identity's
first image and the number after its last image. Sets made by im2rec have images only, each with its own label.

Labels are float32, which is exact only up to 2^24, so the numbers of later images in header and identity records are
rounded (Glint360K and WebFace42M are that large). The labels of the images themselves are small, and exact.
"""

from pathlib import Path

import numpy as np

from util.data.decode import decode_face
from util.data.recordio import EXACT, Record, RecordFile
from util.errors import DataError
from util.progress import progress

_CLASS_DIGITS = 7  # enough for every public set; with them, names sort as the numbers do
_NUM_COMPARED = 64  # images whose labels are compared with the identity records at opening
_FIX = "Rebuild the set."


class RecordImages:
    """The aligned faces in PATH, a .rec file with its .idx next to it.

    A class is named after its number: `0000017`. Classes without images are left out. Labels come from the identity
    records, without reading the images, or else from the images' own headers.
    """

    def __init__(self, path: Path):
        """Open PATH. Raise DataError if there are fewer than two people, or for damage outside the images."""
        self.root = path
        self._file = RecordFile(path)
        header = self._file.read(0)
        if header.content:
            self._first = 0
            class_numbers = _image_labels(self._file, np.arange(len(self._file)))
        else:
            self._first = 1
            class_numbers = _labels_by_identity(self._file, _first_identity(self._file, header))
        self._classes, self.labels = np.unique(class_numbers, return_inverse=True)  # (C,) and (N,) int64
        self.classes = [f"{number:0{_CLASS_DIGITS}d}" for number in self._classes]
        if len(self.classes) < 2:
            found = f"has images of {len(self.classes)} people"
            raise DataError(f"{path}: {found}, and training needs two people or more. Name another set.")

    def __len__(self) -> int:
        return len(self.labels)

    def record(self, index: int) -> int:
        """Return the number of the record that holds image `index`."""
        return int(self._file.keys[index + self._first])

    def where(self, index: int) -> str:
        """Return the file and the record of image `index`, for messages."""
        return self._file.where(index + self._first)

    def encoded(self, index: int) -> bytes:
        """Return the image file in the record of image `index`. Raise DataError if the record is damaged."""
        position = index + self._first
        record = self._file.read(position)
        number = int(self._classes[self.labels[index]])
        if record.labels[0] != number:
            text = f"label {record.labels[0]:g}, and by the rest of the set it is {number}"
            raise self._file.error(position, f"{text}. {_FIX}")
        if not record.content:
            raise self._file.error(position, f"holds no image. {_FIX}")
        return record.content

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if the record cannot be used."""
        return decode_face(self.encoded(index), self.where(index), _FIX)


def _first_identity(file: RecordFile, header: Record) -> int:
    """Return the position of the first identity record: the header's first label, unless it was rounded."""
    count = len(file)
    rule = f"The header record must have two labels, the numbers of the first identity record and {count}. {_FIX}"
    if len(header.labels) != 2 or file.keys[0] != 0 or file.keys[-1] != count - 1:
        index = f"the index has {count} records from {file.keys[0]} to {file.keys[-1]}"
        raise file.error(0, f"{len(header.labels)} labels, and {index}. {rule}")
    first, end = header.labels
    if end != np.float32(count) or not 1 <= first <= end or first != np.floor(first):
        raise file.error(0, f"labels {first:.9g} and {end:.9g}. {rule}")
    # The numbers that float32 may have rounded to this label lie between its two neighbors.
    below = above = first
    if first >= EXACT:
        below = np.nextafter(first, np.float32(0))
        above = np.nextafter(first, np.float32(np.inf))
    for position in range(int(below), min(int(above), count) + 1):
        follows_image = position == 1 or file.read(position - 1).content
        if follows_image and (position == count or not file.read(position).content):
            return position
    raise file.error(0, f"label {first:.9g}, and no identity record begins there. {rule}")


def _labels_by_identity(file: RecordFile, first: int) -> np.ndarray:
    """Return the class numbers (first - 1,) int64 of the images, which are the records 1 to `first` - 1.

    The class of an image is the position of its identity among the identity records. The labels of some images are
    compared with that. If one disagrees, as in sets in which a person has two identity records, all labels are read
    from the images. Images outside any exact range are always read individually.
    """
    ranges = _identity_ranges(file, first)
    labels = np.full(first - 1, -1, np.int64)
    for number, (begin, end) in enumerate(ranges.tolist()):
        labels[begin - 1 : end - 1] = number
    with_images = np.flatnonzero(ranges[:, 0] < ranges[:, 1])
    # Identities at even distances over the set.
    chosen = np.linspace(0, len(with_images) - 1, min(_NUM_COMPARED, len(with_images))).astype(int)
    for number in with_images[chosen]:
        if file.labels(int(ranges[number, 0]))[0] != number:
            labels[:] = -1
            break
    unknown = np.flatnonzero(labels < 0)
    labels[unknown] = _image_labels(file, unknown + 1)
    return labels


def _identity_ranges(file: RecordFile, first: int) -> np.ndarray:
    """Return each identity record's first image and the one after its last, cut at EXACT: (I, 2) int64."""
    ranges = np.empty((len(file) - first, 2))
    for row, position in enumerate(range(first, len(file))):
        labels = file.labels(position)
        if len(labels) != 2:
            raise file.error(position, f"an identity record must have two labels, and has {len(labels)}. {_FIX}")
        ranges[row] = labels
    begins, ends = ranges.T
    limit = np.nextafter(np.float32(first), np.float32(np.inf))  # the end of the last range may have been rounded up
    are_integers = (np.floor(ranges) == ranges).all(1)
    wrong = np.flatnonzero(~(are_integers & (begins >= 1) & (begins <= ends) & (ends <= limit)))
    if len(wrong):
        begin, end = ranges[wrong[0]]
        text = f"an identity record for images {begin:.9g} to {end:.9g} (not included)"
        raise file.error(first + wrong[0], f"{text}, and images are records 1 to {first - 1}. {_FIX}")
    ranges = np.minimum(ranges, EXACT).astype(np.int64)
    # Ordered by their beginnings, no range may begin before the one before it ends.
    filled = np.flatnonzero(ranges[:, 0] < ranges[:, 1])
    order = filled[np.argsort(ranges[filled, 0], kind="stable")]
    overlapping = np.flatnonzero(ranges[order[1:], 0] < ranges[order[:-1], 1])
    if len(overlapping):
        one, other = order[overlapping[0] : overlapping[0] + 2]
        raise file.error(first + other, f"has images that record {file.keys[first + one]} has too. {_FIX}")
    return ranges


def _image_labels(file: RecordFile, positions: np.ndarray) -> np.ndarray:
    """Read the class numbers (N,) int64 of the images at `positions` from their headers."""
    values = np.empty(len(positions))
    # In the order of the file, which disks read fastest.
    order = np.argsort(file.offsets[positions], kind="stable")
    for place in progress(order, f"labels in {file.path.name}", "images"):
        values[place] = file.labels(int(positions[place]))[0]
    wrong = np.flatnonzero(~((values >= 0) & (values < 10**_CLASS_DIGITS) & (np.floor(values) == values)))
    if len(wrong):
        text = f"label {values[wrong[0]]:g}, and a label must be an integer from 0 to {10**_CLASS_DIGITS - 1}"
        raise file.error(int(positions[wrong[0]]), f"{text}. {_FIX}")
    return values.astype(np.int64)
