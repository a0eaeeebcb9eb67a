"""Identification (1:N): search probes in a gallery, ranks, open-set rates, and templates of several images.

The terms are those of ISO/IEC 19795 and NIST's FRVT 1:N. A probe is mated if its person is in the gallery. FPIR, the
false positive identification rate, is the fraction of the non-mated probes for which anyone in the gallery scores above
the threshold. TPIR, the true positive identification rate, is the fraction of the mated probes whose own person is
found first and scores above it. All scores are cosines.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK_SCORES = 2**24  # scores computed at once: 64 MB


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of searching P probes in a gallery of G templates.

    For a mated probe `mate_ranks` (P,) is the position, from 1, of the first template of its own person in the list of
    all templates by falling score, `mates` (P,) is the row of that template, `mate_scores` (P,) its score, and
    `average_precisions` (P,) is the average precision of the list. They are 0, -1 and NaN for a non-mated probe.
    `others` (P,) is the row of the template of another person with the highest score, and `other_scores` (P,) that
    score. A template of another person with an equal score counts as before the own one.
    """

    mate_ranks: np.ndarray
    mates: np.ndarray
    mate_scores: np.ndarray
    average_precisions: np.ndarray
    others: np.ndarray
    other_scores: np.ndarray

    @property
    def is_mated(self) -> np.ndarray:
        """Return which probes are mated, (P,) bool."""
        return self.mate_ranks > 0

    def rank(self, rank: int) -> float:
        """Return the fraction of the mated probes whose person is among the first `rank` templates."""
        return float(np.mean(self.mate_ranks[self.is_mated] <= rank))

    @property
    def mean_average_precision(self) -> float:
        """Return the mean of the average precisions of the mated probes."""
        return float(np.mean(self.average_precisions[self.is_mated]))

    def threshold_at_fpir(self, fpir: float) -> float | None:
        """Return the lowest threshold with an FPIR of at most `fpir`: a score above it is accepted.

        Return None if there are too few non-mated probes to measure such a rate: fewer than 1 / fpir.
        """
        scores = np.sort(self.other_scores[~self.is_mated])[::-1]
        allowed = int(fpir * len(scores) + 1e-9)  # 0.1 of 10 probes is one probe
        return float(scores[min(allowed, len(scores) - 1)]) if allowed else None

    def tpir_at_fpir(self, fpir: float) -> float | None:
        """Return the TPIR at the threshold of threshold_at_fpir(), or None without such a threshold."""
        threshold = self.threshold_at_fpir(fpir)
        if threshold is None:
            return None
        mated = self.is_mated
        return float(np.mean((self.mate_ranks[mated] == 1) & (self.mate_scores[mated] > threshold)))

    def tpir_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the FPIR, ascending from 1 / (number of non-mated probes), and the TPIR at each."""
        thresholds = np.sort(self.other_scores[~self.is_mated])[::-1]
        mated = self.is_mated
        accepted = np.sort(self.mate_scores[mated & (self.mate_ranks == 1)])
        above = len(accepted) - np.searchsorted(accepted, thresholds[1:], side="right")
        return np.arange(1, len(thresholds)) / len(thresholds), above / np.count_nonzero(mated)


def search(probes: np.ndarray, probe_ids: np.ndarray, gallery: np.ndarray, gallery_ids: np.ndarray) -> SearchResult:
    """Search each probe in the gallery. Memory does not grow with P times G.

    The average precision of a probe with n mates at the ranks r_1 < … < r_n is that of TinyFace's evaluation (and of
    the Oxford buildings): the area under precision over recall by trapezoids, the mean over k of
    ((k - 1) / (r_k - 1) + k / r_k) / 2, where the first quotient is 1 at rank 1.

    Args:
        probes: (P, D) float32, L2-normalized.
        probe_ids: (P,) integers, the person of each probe.
        gallery: (G, D) float32, L2-normalized, of two or more people.
        gallery_ids: (G,) integers. A person may have several templates.
    """
    # Sorted by person, the templates of a probe's person are the columns first to last of the scores.
    order = np.argsort(gallery_ids, kind="stable")
    sorted_ids = gallery_ids[order]
    columns = np.ascontiguousarray(gallery[order].T)
    first = np.searchsorted(sorted_ids, probe_ids, side="left")
    last = np.searchsorted(sorted_ids, probe_ids, side="right")
    count = len(probes)
    ranks = np.zeros(count, np.int64)
    mates = np.full(count, -1, np.int64)
    mate_scores = np.full(count, np.nan, np.float32)
    precisions = np.full(count, np.nan)
    others = np.empty(count, np.int64)
    other_scores = np.empty(count, np.float32)
    for block in score_blocks(count, len(gallery)):
        for probe, row in enumerate(probes[block] @ columns, block.start):
            own = row[first[probe] : last[probe]].copy()
            row[first[probe] : last[probe]] = -np.inf
            other = int(row.argmax())
            others[probe] = order[other]
            other_scores[probe] = row[other]
            if not len(own):
                continue
            best = int(own.argmax())
            mates[probe] = order[first[probe] + best]
            mate_scores[probe] = own[best]
            found = np.arange(1, len(own) + 1)
            mate_ranks = found + [np.count_nonzero(row >= score) for score in np.sort(own)[::-1]]
            ranks[probe] = mate_ranks[0]
            before = np.where(mate_ranks > 1, (found - 1) / np.maximum(mate_ranks - 1, 1), 1.0)
            precisions[probe] = np.mean((before + found / mate_ranks) / 2)
    return SearchResult(ranks, mates, mate_scores, precisions, others, other_scores)


def aggregate_templates(
    features: np.ndarray, templates: np.ndarray, media: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Make one embedding of the images of each template, as InsightFace does for IJB.

    The images of one medium (the frames of a video) are averaged first. The media of a template are then summed, and
    the sum is L2-normalized.

    Args:
        features: (N, D), not normalized: the length of a row is its weight.
        templates: (N,) integers, the template of each image.
        media: (N,) integers, the medium of each image.

    Returns:
        The templates (T,), ascending, and their embeddings (T, D).
    """
    order = np.lexsort((media, templates))
    templates = templates[order]
    is_new_template = np.append(True, templates[1:] != templates[:-1])
    is_new_medium = is_new_template | np.append(True, media[order][1:] != media[order][:-1])
    starts = np.flatnonzero(is_new_medium)
    sums = np.add.reduceat(features[order], starts, axis=0)
    means = sums / np.diff(np.append(starts, len(order)))[:, None].astype(features.dtype)
    totals = np.add.reduceat(means, np.flatnonzero(is_new_template[starts]), axis=0)
    return templates[is_new_template], totals / np.linalg.norm(totals, axis=1, keepdims=True)


def pair_scores(embeddings: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosines (P,) float32 of pairs of rows of L2-normalized embeddings (N, D), in blocks."""
    scores = np.empty(len(first), np.float32)
    for block in score_blocks(len(first), 4 * embeddings.shape[1]):
        scores[block] = np.einsum("nd,nd->n", embeddings[first[block]], embeddings[second[block]])
    return scores


def score_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows whose scores with all columns fit into 64 MB."""
    step = max(1, _BLOCK_SCORES // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
