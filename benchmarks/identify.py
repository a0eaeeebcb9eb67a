"""Measure identification among many people: rank-1, and names that strangers get by mistake.

    python -m applications.embed --network NETWORK.pth --data LFW/aligned_112 --out lfw.npz
    python -m benchmarks.identify --embeddings lfw.npz

Every second person, in the order of the names, is set aside for the calibration. Of the other people, those with
several images are known: their first image is in the gallery, and their further images are probes. Those with one image
are strangers. The threshold follows from the calibration and the number of faces in the gallery, as in
applications.identify.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.timing import JsonFlag, write_json
from util.calibration import Calibration, calibrate
from util.cli.parser import option, parse
from util.cli.types import to_file
from util.embedding_table import EmbeddingTable, read_table
from util.errors import DataError, run_script
from util.gallery import Gallery

RATES = (0.1, 0.01, 0.001)


@dataclass(frozen=True, kw_only=True)
class Flags(JsonFlag):
    """The settings of this benchmark."""

    embeddings: Path = option(type=to_file, metavar="FILE", help="file of applications.embed", required=True)


@dataclass(frozen=True)
class Outcome:
    """What happens at the threshold for a rate of false alarms, as fractions of the probes and of the strangers."""

    far: float
    threshold: float
    right_name: float
    wrong_name: float
    false_alarms: float


@dataclass(frozen=True)
class Identification:
    """The result. `rank1` is the fraction of probes whose nearest face of the gallery is theirs."""

    gallery: int
    probes: int
    strangers: int
    calibration_pairs: int
    rank1: float
    outcomes: tuple[Outcome, ...]


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.identify", arguments, description=__doc__, check=Flags.check)
    result = identify(read_table(options.embeddings))
    print(
        f"gallery: {result.gallery} people with one face; {result.probes} probes of them; {result.strangers} "
        f"strangers; calibration: {result.calibration_pairs:,} pairs of other people\n\nrank-1: {result.rank1:.4f}\n"
    )
    print("| --far | cosine | right name | wrong name | strangers with a name |\n| --- | --- | --- | --- | --- |")
    for outcome in result.outcomes:
        shares = f"{outcome.right_name:.4f} | {outcome.wrong_name:.4f} | {outcome.false_alarms:.4f}"
        print(f"| {outcome.far} | {outcome.threshold:.4f} | {shares} |")
    if options.json:
        write_json(options.json, asdict(result))


def identify(table: EmbeddingTable) -> Identification:
    """Identify the probes. Raise DataError if there are no known people, no strangers or too few pairs."""
    people = np.array([name.partition("/")[0] for name in table.names])
    _, person, counts = np.unique(people, return_inverse=True, return_counts=True)
    set_aside = person % 2 == 0
    first = np.append(True, person[1:] != person[:-1])  # the names are sorted
    known = ~set_aside & (counts[person] > 1)
    strangers = ~set_aside & (counts[person] == 1)
    if not known.any() or not strangers.any():
        raise DataError("the embeddings have no people with several images, or none with one. Take LFW.")

    calibration: Calibration
    calibration, _ = calibrate(table.embeddings[set_aside], person[set_aside], source="people set aside", network="")
    gallery = Gallery(people[known & first].tolist(), table.embeddings[known & first])
    nearest = gallery.nearest(table.embeddings[known & ~first])
    names = np.array([name for name, _ in nearest])
    cosines = np.array([cosine for _, cosine in nearest])
    is_right = names == people[known & ~first]
    strange = np.array([cosine for _, cosine in gallery.nearest(table.embeddings[strangers])])
    outcomes = []
    for far in (rate for rate in RATES if rate / len(gallery) >= calibration.lowest_far):
        threshold = calibration.threshold(far / len(gallery))
        named = cosines >= threshold
        outcomes.append(
            Outcome(
                far,
                threshold,
                right_name=float((named & is_right).mean()),
                wrong_name=float((named & ~is_right).mean()),
                false_alarms=float((strange >= threshold).mean()),
            )
        )
    return Identification(
        gallery=len(gallery),
        probes=len(names),
        strangers=len(strange),
        calibration_pairs=calibration.pairs,
        rank1=float(is_right.mean()),
        outcomes=tuple(outcomes),
    )


if __name__ == "__main__":
    run_script(main)
