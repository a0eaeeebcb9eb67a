"""Search a training set for wrong labels and duplicates, by the embeddings of its images.

A person is represented by a center: the L2-normalized sum of the embeddings. Each image is compared with the centers of
all people, N times C cosines in blocks, and never with all other images. 500,000 images of 10,000 people with 512
numbers each take 1 GB, and 2.6e12 multiplications.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from applications.prepare.clean_list import DUPLICATE, MISLABELED, OUTLIER, TWO_NAMES, VERIFICATION
from util.errors import DataError
from util.identification import score_blocks
from util.progress import progress

_SAMPLED_IMAGES = 2_000  # whose cosines with all other people make the thresholds
_ROBUST_FARS, _FINAL_FARS = (1e-1, 1e-2), (1e-2, 1e-3)  # measured, see Thresholds
_MANY_PEOPLE = 100  # with fewer, a wrong label is a large fraction of the comparisons
_CANDIDATE_COSINE = 0.9  # of images that may be copies
_COPY_CORRELATION = 0.95  # of the thumbnails of images that are copies
THUMBNAIL = 16  # pixels a side


@dataclass(frozen=True)
class Finding:
    """Something wrong with an image, or with a person if there is no image.

    `image` and `other_image` are positions of images, -1 for none; `person` and `other_person` are labels, -1 for none.
    `cosine` is with what was found, `own_cosine` with the other images of the own person; NaN for none.
    """

    kind: str
    person: int
    image: int = -1
    other_person: int = -1
    other_image: int = -1
    cosine: float = np.nan
    own_cosine: float = np.nan


class Thresholds:
    """The cosine at a false accept rate, for an image and the center of another person.

    Two rates are measured on a sample of the set: the cosines that 10 and 1 % of the comparisons with other people
    exceed, or 1 and 0.1 %. Rarer cosines are not measured, because wrong labels are what they show. They lie on the
    straight line through both points when the rate is turned into standard deviations of a normal distribution.

    Args:
        scores: cosines of comparisons with other people.
        fars: the two rates to measure, the larger one first.
    """

    def __init__(self, scores: np.ndarray, fars: tuple[float, float]):
        self.fars = fars
        self.cosines = [float(np.quantile(scores, 1 - far)) for far in fars]

    def at(self, far: float) -> float:
        """Return the cosine that a fraction `far` of the comparisons with other people exceeds."""
        normal = NormalDist()
        near, rare, wanted = (-normal.inv_cdf(rate) for rate in (*self.fars, far))
        slope = (self.cosines[1] - self.cosines[0]) / (rare - near)
        return min(self.cosines[1] + slope * (wanted - rare), 0.99)


class TrainingSet:
    """The embeddings of a training set, the centers of its people, and how each image fits them.

    Args:
        embeddings: (N, D) float32, L2-normalized.
        labels: (N,) the person of each image. Each of 0 … C - 1 has an image.
        own_far: an image is doubtful if its cosine with its own person is below the threshold at this rate.

    Attributes:
        centers: (C, D) float32, without doubtful images unless a person has no others.
        own: (N,) the cosine of each image with the center of the other images of its person; NaN for a single image.
        others, other_scores: (N,) the other person with the most similar center, and the cosine.
        own_threshold: the cosine at own_far.
    """

    def __init__(self, embeddings: np.ndarray, labels: np.ndarray, own_far: float):
        self.embeddings = embeddings
        self.labels = labels
        self.own_far = own_far
        order = np.argsort(labels, kind="stable")
        self.groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        used = np.ones(len(labels), bool)
        # The second round is without doubtful images. In the first, wrong labels can change the cosine at 0.1 %.
        for fars in (_ROBUST_FARS, _FINAL_FARS if len(self.groups) >= _MANY_PEOPLE else _ROBUST_FARS):
            self._fit(used)
            self.thresholds = Thresholds(self._sample_others(used), fars)
            self.own_threshold = self.thresholds.at(own_far)
            used = ~(self.own < self.own_threshold)
            if not used.any():
                raise DataError("no image is similar to the others of its person. Check the network and its crop.")
        self._fit(used)
        self.others, self.other_scores = self._most_similar_others()

    def _sample_others(self, used: np.ndarray) -> np.ndarray:
        """Return cosines of some used images with the centers of all other people who have used images."""
        rows = np.random.default_rng(0).permutation(np.flatnonzero(used))[:_SAMPLED_IMAGES]
        people = np.unique(self.labels[used])
        scores = self.embeddings[rows] @ self.centers[people].T
        return scores[self.labels[rows][:, None] != people]

    def _fit(self, used: np.ndarray) -> None:
        """Compute the centers from the used images, and the cosine of each image with its own person."""
        self.centers = np.empty((len(self.groups), self.embeddings.shape[1]), np.float32)
        self.own = np.full(len(self.labels), np.nan, np.float32)
        for label, rows in enumerate(self.groups):
            members = used[rows] if used[rows].any() else np.ones(len(rows), bool)
            vectors = self.embeddings[rows]
            total = vectors[members].sum(axis=0)
            self.centers[label] = total / np.maximum(np.linalg.norm(total), 1e-12)
            rest = total - vectors * members[:, None]  # without the image itself, if it is in the sum
            if len(rows) > 1:
                length = np.linalg.norm(rest, axis=1)
                alone = length < 1e-6  # the only used image of its person is compared with the doubtful ones
                rest[alone] = vectors.sum(axis=0) - vectors[alone]
                length[alone] = np.linalg.norm(rest[alone], axis=1)
                self.own[rows] = (vectors * rest).sum(axis=1) / np.maximum(length, 1e-12)

    def _most_similar_others(self) -> tuple[np.ndarray, np.ndarray]:
        best = np.empty(len(self.labels), np.int64)
        scores = np.empty(len(self.labels), np.float32)
        blocks = list(score_blocks(len(self.labels), len(self.centers)))
        for block in progress(blocks, "comparing with other people", "blocks"):
            cosines = self.embeddings[block] @ self.centers.T
            cosines[np.arange(len(cosines)), self.labels[block]] = -np.inf
            best[block] = cosines.argmax(axis=1)
            scores[block] = cosines.max(axis=1)
        return best, scores

    def find_mislabeled(self, far: float | None) -> tuple[list[Finding], float]:
        """Find images that fit another person, and doubtful images that fit nobody.

        An image is mislabeled if another center accepts it, and if its cosine with this center is larger than with its
        own person by the difference of both thresholds at least. An image that is doubtful only is an outlier, unless
        all other images of its person are mislabeled. Of two images that differ, both are outliers.

        Args:
            far: false accept rate of a comparison; None for one expected false accept among all comparisons of doubtful
                images.

        Returns:
            The findings, and the threshold.
        """
        doubtful = self.own < self.own_threshold
        threshold = self._threshold(far, int(doubtful.sum()) * (len(self.centers) - 1))
        margin = max(threshold - self.own_threshold, 0)
        is_mislabeled = (self.other_scores >= threshold) & (self.other_scores - self.own >= margin)
        findings = []
        for image in np.flatnonzero(doubtful | is_mislabeled).tolist():
            others = self.groups[self.labels[image]]
            others = others[(others != image) & ~is_mislabeled[others]]
            if not is_mislabeled[image] and (not len(others) or self._fits(image, others)):
                continue
            findings.append(
                Finding(
                    MISLABELED if is_mislabeled[image] else OUTLIER,
                    person=int(self.labels[image]),
                    image=image,
                    other_person=int(self.others[image]),
                    other_image=self.nearest_to_center(int(self.others[image])),
                    cosine=float(self.other_scores[image]),
                    own_cosine=float(self.own[image]),
                )
            )
        return findings, threshold

    def _threshold(self, far: float | None, comparisons: int) -> float:
        """Return the threshold of a search: at `far`, or at one false accept and at most `own_far`."""
        return self.thresholds.at(far or min(self.own_far, 1 / max(comparisons, 1)))

    def _fits(self, image: int, others: np.ndarray) -> bool:
        """Return whether an image is accepted by the center of some images."""
        total = self.embeddings[others].sum(axis=0)
        return bool(self.embeddings[image] @ total >= self.own_threshold * np.linalg.norm(total))

    def find_two_names(self, far: float | None) -> tuple[list[Finding], float]:
        """Find pairs of people whose centers are as similar as images of one person.

        A finding is about the person with fewer images.

        Args:
            far: false accept rate of a comparison; None for one expected false accept among all pairs.

        Returns:
            The findings and the threshold.
        """
        count = len(self.centers)
        threshold = self._threshold(far, count * (count - 1) // 2)
        findings = []
        for block in score_blocks(count, count):
            cosines = self.centers[block] @ self.centers.T
            first, second = np.nonzero(cosines >= threshold)
            for a, b in zip((first + block.start).tolist(), second.tolist(), strict=True):
                if a < b:
                    small, large = sorted((a, b), key=lambda label: len(self.groups[label]))
                    findings.append(
                        Finding(
                            TWO_NAMES,
                            person=small,
                            other_person=large,
                            other_image=self.nearest_to_center(large),
                            cosine=float(cosines[a - block.start, b]),
                        )
                    )
        return findings, threshold

    def find_duplicates(self, hashes: np.ndarray, thumbnails: np.ndarray) -> list[Finding]:
        """Find copies: images of equal files, and images whose embeddings and thumbnails are almost equal.

        Equal files are found everywhere. Other copies, also mirrored ones, are searched among the images of the own
        person and of the most similar other person. The first image of several is kept.

        Args:
            hashes: (N,) of the files.
            thumbnails: (N, THUMBNAIL, THUMBNAIL) uint8.
        """
        pairs: dict[int, tuple[int, float]] = {}  # {image: (the first image of which it is a copy, cosine)}
        order = np.argsort(hashes, kind="stable")
        for before, after in zip(order[:-1].tolist(), order[1:].tolist(), strict=True):
            if hashes[before] == hashes[after]:
                pairs[after] = (pairs.get(before, (before,))[0], 1.0)
        for first, second, cosine in self._candidates():
            low, high = min(first, second), max(first, second)
            if high not in pairs and are_copies(thumbnails[low], thumbnails[high]):
                pairs[high] = (low, cosine)
        return [
            Finding(
                DUPLICATE,
                person=int(self.labels[copy]),
                image=copy,
                other_person=int(self.labels[kept]),
                other_image=kept,
                cosine=cosine,
                own_cosine=float(self.own[copy]),
            )
            for copy, (kept, cosine) in sorted(pairs.items())
        ]

    def _candidates(self) -> Iterator[tuple[int, int, float]]:
        """Yield (image, image, cosine) of images that may be copies."""
        by_other = np.argsort(self.others, kind="stable")
        bounds = np.searchsorted(self.others[by_other], np.arange(len(self.groups) + 1))
        for label, members in enumerate(self.groups):
            similar = by_other[bounds[label] : bounds[label + 1]]
            rows = np.concatenate([members, similar])
            for block in score_blocks(len(rows), len(members)):
                cosines = self.embeddings[rows[block]] @ self.embeddings[members].T
                for row, column in np.argwhere(cosines >= _CANDIDATE_COSINE).tolist():
                    position = row + block.start
                    if position >= len(members) or column < position:
                        yield int(rows[position]), int(members[column]), float(cosines[row, column])

    def find_verification_people(
        self, templates: np.ndarray, images: np.ndarray, far: float | None
    ) -> tuple[list[Finding], float]:
        """Find people of the training set who are in a verification set.

        Args:
            templates: (V, D) float32, L2-normalized, embeddings of the people or images of the verification set.
            images: (V,) the position of an image of each, to show.
            far: false accept rate of a comparison; None for one expected false accept among all comparisons.

        Returns:
            A finding for each person, with the most similar template, and the threshold.
        """
        threshold = self._threshold(far, len(templates) * len(self.centers))
        best = np.full(len(self.centers), -1, np.int64)
        scores = np.full(len(self.centers), -np.inf, np.float32)
        for block in score_blocks(len(templates), len(self.centers)):
            cosines = templates[block] @ self.centers.T
            highest = cosines.max(axis=0)
            is_higher = highest > scores
            best[is_higher] = cosines.argmax(axis=0)[is_higher] + block.start
            scores[is_higher] = highest[is_higher]
        found = np.flatnonzero(scores >= threshold).tolist()
        findings = [
            Finding(VERIFICATION, person, other_image=int(images[best[person]]), cosine=float(scores[person]))
            for person in found
        ]
        return findings, threshold

    def nearest_to_center(self, person: int) -> int:
        """Return the image of a person that is most similar to the center."""
        rows = self.groups[person]
        return int(rows[np.argmax(self.embeddings[rows] @ self.centers[person])])


def are_copies(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two thumbnails (S, S) show one photograph: straight or mirrored, brighter or darker."""
    one, two = (thumbnail.astype(np.float64) - thumbnail.mean() for thumbnail in (first, second))
    scale = np.sqrt((one**2).sum() * (two**2).sum())
    if scale == 0:
        return bool((first == second).all())
    return bool(max((one * two).sum(), (one * two[:, ::-1]).sum()) >= _COPY_CORRELATION * scale)
