"""Evaluate a network on a set of identities without a protocol: sampled pairs, and a gallery with probes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from applications.evaluate_identities.report import Evaluation, Picture, Rows
from util.data.loader import TrainingImages
from util.embedding import EmbeddedImages
from util.errors import DataError
from util.identification import SearchResult, pair_scores, search
from util.image_tree import printable
from util.transform import full_crop

if TYPE_CHECKING:
    from applications.evaluate_identities.__main__ import IdentitySettings

FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 20)
SHOWN = 24  # errors that are shown as pictures, of each kind


def evaluate_folder(images: TrainingImages, embedded: EmbeddedImages, settings: IdentitySettings) -> Evaluation:
    """Evaluate a network on sampled pairs (1:1), and on the search of probes in a gallery (1:N).

    Args:
        images: the set.
        embedded: its embeddings.
        settings: numbers of pairs and of gallery images, the fraction of strangers, and the seed.

    Raises:
        DataError: nobody has two images, or there are fewer than three people.
    """
    rng = np.random.default_rng(settings.seed)
    labels = images.labels[embedded.indices]
    people, counts = np.unique(labels, return_counts=True)
    if len(people) < 3 or (counts * (counts - 1)).sum() < 4:
        raise DataError(
            f"{images.root}: {len(people)} people, of whom {int((counts > 1).sum())} have two images or more. Name a "
            f"set of three people or more, with two pairs or more of images of one person."
        )
    evaluation = Evaluation(f"Identities in {printable(images.root)}")
    evaluation.facts.append(
        f"{len(labels):,} images of {len(people):,} people, {int((counts > 1).sum()):,} of them with two or more"
    )

    # 1:1.
    first, second = sample_pairs(labels, settings.pairs, rng)
    scores = pair_scores(embedded.embeddings, first, second)
    evaluation.add_pairs("sampled pairs", scores, labels[first] == labels[second])

    # 1:N.
    gallery_rows, probes = split_gallery(labels, settings.unknown, settings.gallery_images, rng)
    gallery_ids = np.array([labels[rows[0]] for rows in gallery_rows])
    gallery = np.stack([embedded.embeddings[rows].mean(axis=0) for rows in gallery_rows])
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    found = search(embedded.embeddings[probes], labels[probes], gallery, gallery_ids)
    if not found.is_mated.any():
        raise DataError(f"{images.root}: nobody in the gallery has another image. Lower --unknown.")
    evaluation.facts.append(
        f"Identification (1:N): a gallery of {len(gallery):,} people (images of each: {settings.gallery_images}), "
        f"{int(found.is_mated.sum()):,} probes of people in it and {int((~found.is_mated).sum()):,} of others"
    )
    evaluation.add_searches({"all": found}, RANKS, FPIRS)

    # Errors.
    confused = confused_people(found, labels[probes], gallery_ids)
    names = [printable(name) for name in images.classes]
    rows: Rows = [["person", "taken for", "images", "highest cosine"]]
    rows += [[names[a], names[b], str(count), f"{score:.3f}"] for (a, b), (count, score) in confused[:SHOWN]]
    evaluation.tables["Most confused people"] = rows
    evaluation.figures["confused"] = [
        {"person": names[a], "taken_for": names[b], "images": count, "highest_cosine": score}
        for (a, b), (count, score) in confused
    ]
    if settings.report:
        drawing = _Drawing(images, embedded, probes, gallery_rows)
        wrong = np.flatnonzero(found.mate_ranks > 1)
        strangers = np.flatnonzero(~found.is_mated)
        for heading, group in (("Taken for another person", wrong), ("Most similar strangers", strangers)):
            worst = group[np.argsort(-found.other_scores[group], kind="stable")][:SHOWN]
            evaluation.pictures[heading] = [drawing.draw(found, int(probe)) for probe in worst]
    return evaluation


def sample_pairs(labels: np.ndarray, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return different pairs of images: all pairs of one person, up to `limit`, and as many of two people.

    Every pair of one kind has the same probability. Of two people there are `limit` pairs, or all if they are fewer.

    Args:
        labels: (N,) the person of each image, at least two people.
        limit: the largest number of pairs of each kind.
        rng: the random numbers.

    Returns:
        The positions (P,) of the first and of the second image.
    """
    sampler = random.Random(int(rng.integers(2**63)))  # numpy's choice without replacement would list all pairs
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ends = np.cumsum(counts * (counts - 1) // 2)  # pairs are numbered person by person
    chosen = np.sort(sampler.sample(range(ends[-1]), min(limit, ends[-1])))
    person = np.searchsorted(ends, chosen, side="right")
    high, low = _pair(chosen - np.append(0, ends)[person])
    same = order[starts[person] + low], order[starts[person] + high]

    total = len(labels) * (len(labels) - 1) // 2
    different = total - int(ends[-1])
    # Enough of all pairs that `limit` of them, with a reserve, are of two people.
    number = total if limit >= different else min(total, int(1.05 * limit * total / different) + 100)
    high, low = _pair(np.sort(sampler.sample(range(total), number)))
    apart = np.flatnonzero(labels[high] != labels[low])
    if len(apart) > limit:
        apart = np.sort(rng.choice(apart, limit, replace=False))
    return np.concatenate([same[0], low[apart]]), np.concatenate([same[1], high[apart]])


def _pair(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (high, low) of pair numbers 0, 1, 2 … in the order (1, 0), (2, 0), (2, 1), (3, 0) …"""
    numbers = numbers.astype(np.int64)
    high = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    high += high * (high + 1) // 2 <= numbers  # the square root may be rounded up or down
    high -= high * (high - 1) // 2 > numbers
    return high, numbers - high * (high - 1) // 2


def split_gallery(
    labels: np.ndarray, unknown: float, gallery_images: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Split images into a gallery and probes at random.

    A fraction of the people is left out of the gallery: all images of these people are non-mated probes. Of each other
    person some images, but not all, make one template of the gallery, and the others are mated probes. A person with
    one image is in the gallery without a probe.

    Args:
        labels: (N,) the person of each image.
        unknown: the fraction of the people that are left out.
        gallery_images: the largest number of images of a template.
        rng: the random numbers.

    Returns:
        The positions of the images of each template, and those of the probes.
    """
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by person, at random within a person
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    left_out = set(rng.permutation(len(groups))[: round(unknown * len(groups))].tolist())
    gallery = []
    probes = []
    for position, group in enumerate(groups):
        enrolled = 0 if position in left_out else max(1, min(gallery_images, len(group) - 1))
        if enrolled:
            gallery.append(group[:enrolled])
        probes.append(group[enrolled:])
    return gallery, np.concatenate(probes)


def confused_people(
    found: SearchResult, probe_ids: np.ndarray, gallery_ids: np.ndarray
) -> list[tuple[tuple[int, int], tuple[int, float]]]:
    """List who is taken for whom: ((person, other), (number of probes, highest score)), the most probes first.

    A mated probe counts if another person is found first. A non-mated probe counts if it is above the threshold of the
    lowest FPIR that can be measured.
    """
    threshold = next((t for fpir in FPIRS if (t := found.threshold_at_fpir(fpir)) is not None), np.inf)
    wrong = np.where(found.is_mated, found.mate_ranks > 1, found.other_scores > threshold)
    pairs: dict[tuple[int, int], tuple[int, float]] = {}
    for probe in np.flatnonzero(wrong):
        key = (int(probe_ids[probe]), int(gallery_ids[found.others[probe]]))
        count, score = pairs.get(key, (0, -1.0))
        pairs[key] = (count + 1, max(score, float(found.other_scores[probe])))
    return sorted(pairs.items(), key=lambda item: (-item[1][0], -item[1][1]))


class _Drawing:
    """Draws probes next to images of the gallery."""

    def __init__(
        self,
        images: TrainingImages,
        embedded: EmbeddedImages,
        probes: np.ndarray,
        gallery_rows: list[np.ndarray],
    ):
        self._images = images
        self._indices = embedded.indices
        self._probes = probes
        self._gallery_rows = gallery_rows

    def draw(self, found: SearchResult, probe: int) -> Picture:
        """Return a probe, the template that was found, and for a mated probe the own template, side by side."""
        rows = [int(self._probes[probe]), int(self._gallery_rows[found.others[probe]][0])]
        caption = f"{self._name(rows[0])}\nfound: {self._name(rows[1])}, cosine {found.other_scores[probe]:.3f}"
        if found.mates[probe] >= 0:
            rows.append(int(self._gallery_rows[found.mates[probe]][0]))
            caption += f"\nown image: cosine {found.mate_scores[probe]:.3f}, rank {found.mate_ranks[probe]}"
        faces = [full_crop(self._images.image(int(self._indices[row]))) for row in rows]
        return np.hstack(faces), caption

    def _name(self, row: int) -> str:
        place = self._images.where(int(self._indices[row]))
        return printable(place.removeprefix(f"{self._images.root}/"))
