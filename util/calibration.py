"""How alike a network finds different people, from which follow thresholds and false accept rates (FAR).

The cosines of all pairs of different people in a set are counted in fine steps. A calibration keeps some of these
counts. All answers are exact or on the safe side: a threshold may accept fewer strangers than asked for, never more.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import DataError, UsageError
from util.files import atomic_write, read_bytes

BINS = 20_000  # steps of the cosine from -1 to 1
_PER_DECADE = 40  # counts kept for each power of ten of the number of pairs: 6 % from one to the next
_ROWS = 2048  # embeddings compared with all others at once
_MAX_BYTES = 10_000_000
_COMMAND = "python -m applications.calibrate"


@dataclass(frozen=True)
class Calibration:
    """Counts of pairs of different people.

    Attributes:
        cosines: (K,) ascending.
        counts: (K,) pairs with at least the cosine; falling, and 0 at the end.
        pairs: number of all pairs.
        source: the images they are from.
        network: SHA-256 of the network's file.
    """

    cosines: tuple[float, ...]
    counts: tuple[int, ...]
    pairs: int
    source: str
    network: str

    @property
    def lowest_far(self) -> float:
        """Return the lowest FAR that these pairs can show."""
        return 1 / self.pairs

    def far(self, cosine: float) -> float:
        """Return the fraction of pairs of different people with at least this cosine, or 0."""
        position = int(np.searchsorted(self.cosines, cosine, side="right")) - 1
        return 1.0 if position < 0 else self.counts[position] / self.pairs

    def threshold(self, far: float) -> float:
        """Return the cosine from which a pair is accepted, so that at most `far` of different people are.

        Raises UsageError if there are too few pairs to show that rate.
        """
        if not self.lowest_far <= far <= 1:
            raise UsageError(
                f"a false accept rate of {far:g}: the calibration has {self.pairs:,} pairs of different people, and "
                f"shows rates from {self.lowest_far:.1g} to 1. Name such a rate, or calibrate on more identities."
            )
        falling = np.array(self.counts)
        return self.cosines[int(np.argmax(falling <= far * self.pairs))]

    def describe(self, cosine: float) -> str:
        """Return how many strangers look as alike to the network."""
        far = self.far(cosine)
        if far == 0:
            return f"fewer than 1 in {self.pairs:,} strangers looks this alike to the network"
        if far > 0.1:
            return f"{far:.0%} of strangers look this alike to the network"
        return f"1 in {float(f'{1 / far:.2g}'):,.0f} strangers looks this alike to the network"

    def to_json(self) -> str:
        """Return the text from which from_json() makes the same calibration."""
        return json.dumps(asdict(self))

    def write(self, path: Path) -> None:
        """Write a file for read_calibration()."""
        with atomic_write(path) as partial:
            partial.write_text(self.to_json() + "\n")


def calibrate(
    embeddings: np.ndarray, identities: np.ndarray, source: str, network: str
) -> tuple[Calibration, tuple[int, int]]:
    """Count the cosines of all pairs of images of different identities.

    Args:
        embeddings: (N, D) float32, L2-normalized.
        identities: (N,) integer, who is shown.
        source: what the images are, for users of the calibration.
        network: SHA-256 of the network's file.

    Returns:
        The calibration, and the two images of different identities that are most alike: often a wrong label.

    Raises:
        DataError: all images are of one identity.
    """
    histogram = np.zeros(BINS, np.int64)
    closest = (-np.inf, 0, 0)
    for start in range(0, len(embeddings), _ROWS):
        rows = slice(start, start + _ROWS)
        cosines = embeddings[rows] @ embeddings[start:].T
        differs = identities[rows, None] != identities[None, start:]
        differs &= np.arange(len(cosines))[:, None] < np.arange(cosines.shape[1])  # each pair once
        steps = np.floor((cosines[differs] + 1) * (BINS / 2)).astype(np.int64).clip(0, BINS - 1)
        histogram += np.bincount(steps, minlength=BINS)
        cosines[~differs] = -np.inf
        row, column = divmod(int(cosines.argmax()), cosines.shape[1])
        closest = max(closest, (float(cosines[row, column]), start + row, start + column))
    at_least = np.append(histogram[::-1].cumsum()[::-1], 0)  # (BINS + 1,) from the lower end of each step
    if not at_least[0]:
        raise DataError(f"{source}: no two images of different people in it. Take a folder of several identities.")
    # Of the steps with almost the same count, the highest is kept, and the last one without any pair.
    decade = np.floor(_PER_DECADE * np.log10(np.maximum(at_least, 0.5)))
    kept = np.flatnonzero(np.append(decade[1:] != decade[:-1], False))
    kept = np.append(kept, int(np.argmin(at_least)))
    edges = np.round(kept * (2 / BINS) - 1, 4)
    counts = at_least[kept].tolist()
    calibration = Calibration(tuple(edges.tolist()), tuple(counts), int(at_least[0]), source=source, network=network)
    return calibration, closest[1:]


def read_calibration(path: Path) -> Calibration:
    """Read a file of applications.calibrate. Raise DataError for any other file."""
    content = read_bytes(path, f"Make one with {_COMMAND}.", _MAX_BYTES)
    return from_json(content.decode("utf-8", "replace"), path)


def from_json(text: str, place: Path) -> Calibration:
    """Return the calibration in the text of the file `place`. Raise DataError for any other text."""
    try:
        content = json.loads(text)
        cosines, counts = (np.array(content[name], float) for name in ("cosines", "counts"))
        pairs = int(content["pairs"])
        consistent = cosines.shape == counts.shape and cosines.ndim == 1 and len(cosines) > 0 and pairs > 0
        falls = (np.diff(cosines) > 0).all() and (np.diff(counts) <= 0).all()
        if not (consistent and falls and counts[-1] == 0 and counts[0] <= pairs):
            raise ValueError
        return Calibration(
            tuple(cosines.tolist()),
            tuple(counts.astype(int).tolist()),
            pairs,
            source=str(content["source"]),
            network=str(content["network"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise DataError(f"{place}: not a calibration that can be read. Make one with {_COMMAND}.") from None


def find_calibration(file: Path | None, network: Path, metadata: Mapping[str, Any], sha256: str) -> Calibration | None:
    """Return the calibration of a network: from a file, else from the metadata of an exported network, else None.

    Args:
        file: a file of applications.calibrate, or None.
        network: the file of the network, for messages.
        metadata: what the network's file says, {} for other files than ONNX.
        sha256: SHA-256 of the network's file.

    Raises:
        DataError: the file is not a calibration, or is that of another network.
    """
    if file is None:
        return from_json(metadata["calibration"], network) if "calibration" in metadata else None
    calibration = read_calibration(file)
    if calibration.network not in (sha256, metadata.get("source_sha256")):
        raise DataError(
            f"{file}: was made with another network than {network}, whose cosines differ. Make one with {_COMMAND}."
        )
    return calibration
