"""Face verification: from embeddings of pairs to the accuracy over folds and the exact ROC.

The protocol is LFW's (Huang et al. 2007, "image-restricted"), as FaceNet, InsightFace and face.evoLVe compute it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from util.errors import DataError, UsageError

BLOCK = 128  # pairs subtracted at once
FOLDS = 10
THRESHOLD_GRID = np.arange(0, 4, 0.01)  # (400,) squared distances; between unit vectors they lie in [0, 4]


@dataclass(frozen=True, eq=False)
class VerificationResult:
    """The result of `verify` for P pairs. All distances and thresholds are squared Euclidean distances.

    Numbers of the protocol, over F folds: `accuracy` and `accuracy_std` (ddof 0) are the mean and the deviation of
    `fold_accuracies` (F,). `threshold` is the mean of `thresholds` (F,), each the best on the other folds. `tpr` and
    `fpr` (400,) are means over the folds at each threshold of THRESHOLD_GRID.

    Numbers over all pairs at once, exact: `far` and `tar` (U + 1,) are the ROC. They are the false and the true accept
    rate when all pairs up to each of the U distinct distances are accepted, beginning without any, (0, 0). `auc` is the
    area under the ROC. `eer` is the rate at which false accepts equal false rejects, on the straight line between the
    two neighboring points of the ROC.

    `distances` (P,) and `issame` (P,) are the input. With PCA, the distance of a pair is the distance in the fold in
    which the pair was tested. `images_per_second` and `norms` (2P,), the norms of the embeddings before they were
    normalized, are for callers that have embedded the images.
    """

    accuracy: float
    accuracy_std: float
    fold_accuracies: np.ndarray
    threshold: float
    thresholds: np.ndarray
    tpr: np.ndarray
    fpr: np.ndarray
    far: np.ndarray
    tar: np.ndarray
    auc: float
    eer: float
    distances: np.ndarray
    issame: np.ndarray
    images_per_second: float | None = None
    norms: np.ndarray | None = None

    @property
    def pairs(self) -> int:
        """Return P, the number of pairs."""
        return len(self.issame)

    @property
    def negatives(self) -> int:
        """Return the number of pairs of different people; 1 / negatives is the smallest FAR above 0."""
        return self.pairs - int(np.count_nonzero(self.issame))

    @property
    def accepted(self) -> np.ndarray:
        """Return whether each pair (P,) is accepted as one person, at the threshold of its fold."""
        return self.distances < self.thresholds[contiguous_folds(self.issame, len(self.thresholds))]

    @property
    def correct(self) -> np.ndarray:
        """Return whether the decision about each pair (P,), at the threshold of its fold, is right."""
        return self.accepted == self.issame

    def tar_at_far(self, far: float) -> float:
        """Return the largest true accept rate, in [0, 1], at a false accept rate of at most `far`.

        Below 1 / negatives that is the rate without any false accept.
        """
        return float(self.tar[self._roc_point(far)])

    def threshold_at_far(self, far: float) -> float:
        """Return the largest threshold at which the false accept rate is at most `far`: infinite for 1.

        It is the distance of the first pair of different people that must not be accepted.
        """
        accepts = round(self.far[self._roc_point(far)] * self.negatives)
        different = np.sort(self.distances[~self.issame])
        return float(different[accepts]) if accepts < len(different) else float("inf")

    def _roc_point(self, far: float) -> int:
        """Return the index of the last point of the ROC with a false accept rate of at most `far`."""
        if not 0 <= far <= 1:
            raise UsageError(f"tar_at_far({far}): a false accept rate lies between 0 and 1. Name such a rate.")
        return int(np.searchsorted(self.far, far, side="right")) - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers that people quote, as JSON can hold them."""
        return {
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "fold_accuracies": self.fold_accuracies.tolist(),
            "threshold": self.threshold,
            "auc": self.auc,
            "eer": self.eer,
            "tar_at_far": {"1e-3": self.tar_at_far(1e-3), "1e-2": self.tar_at_far(1e-2)},
            "pairs": self.pairs,
            "images_per_second": self.images_per_second,
        }


def verify(embeddings: np.ndarray, issame: np.ndarray, folds: int = FOLDS, pca: int = 0) -> VerificationResult:
    """Verify pairs of embeddings with the protocol of LFW.

    The folds are contiguous. A pair is called the same if its squared distance is less than a threshold. Each fold is
    tested at the threshold of THRESHOLD_GRID that suits the other folds best, the first of equally good ones. float32
    embeddings are subtracted, squared and summed in float32, and their distances compared to the thresholds in float64.

    Args:
        embeddings: (2P, D), L2-normalized; rows 2i and 2i + 1 are pair i.
        issame: (P,) bool, whether a pair shows one person.
        folds: number of folds, at least 2.
        pca: number of principal components of the other folds' embeddings that each fold's embeddings are reduced to,
            and normalized again; 0 for no reduction.

    Raises:
        DataError: embeddings and issame do not fit together, are not finite, or a fold lacks same or different pairs.
        UsageError: `folds` or `pca` is out of range.
    """
    embeddings, issame = _check_inputs(embeddings, issame)
    distances = _squared_distances(embeddings)
    _check_finite(embeddings, distances)
    if not pca:
        return verify_distances(distances, issame, folds)
    fold_ids = contiguous_folds(issame, folds)
    return _evaluate_folds(issame, fold_ids, *_count_accepts_after_pca(embeddings, issame, fold_ids, pca))


def verify_distances(distances: np.ndarray, issame: np.ndarray, folds: int = FOLDS) -> VerificationResult:
    """Verify pairs like verify(), from their squared distances (P,) and issame (P,) bool.

    Raises:
        DataError: a fold lacks same or different pairs.
        UsageError: `folds` is out of range.
    """
    fold_ids = contiguous_folds(issame, folds)
    test_counts = _count_accepts(distances, issame, fold_ids)  # (F, 2, 400)
    train_counts = test_counts.sum(axis=0) - test_counts  # all folds but one
    return _evaluate_folds(issame, fold_ids, distances, test_counts, train_counts)


def _evaluate_folds(
    issame: np.ndarray, fold_ids: np.ndarray, distances: np.ndarray, test_counts: np.ndarray, train_counts: np.ndarray
) -> VerificationResult:
    """Return the result of pairs, from the accepts in each fold and in the other folds, (F, 2, 400) each."""
    # The best threshold has the most true minus false accepts. argmax takes the first of equally good ones.
    best = np.argmax(train_counts[:, 1] - train_counts[:, 0], axis=1)  # (F,)
    negatives, positives = _count_classes(issame, fold_ids)  # (F,) each
    accepts_at_best = np.take_along_axis(test_counts, best[:, None, None], axis=2)[:, :, 0]  # (F, 2)
    # Correct are the accepted same pairs and the rejected different pairs.
    fold_accuracies = (accepts_at_best[:, 1] + negatives - accepts_at_best[:, 0]) / (negatives + positives)
    far, tar, auc = _roc(distances, issame)
    return VerificationResult(
        accuracy=float(fold_accuracies.mean()),
        accuracy_std=float(fold_accuracies.std()),
        fold_accuracies=fold_accuracies,
        threshold=float(THRESHOLD_GRID[best].mean()),
        thresholds=THRESHOLD_GRID[best],
        tpr=(test_counts[:, 1] / positives[:, None]).mean(axis=0),
        fpr=(test_counts[:, 0] / negatives[:, None]).mean(axis=0),
        far=far,
        tar=tar,
        auc=auc,
        eer=_equal_error_rate(far, tar),
        distances=distances,
        issame=issame,
    )


def cosine(squared_distance: float) -> float:
    """Return the cosine of two unit vectors with this squared distance: d = 2 - 2 cos."""
    return 1 - squared_distance / 2


def _check_inputs(embeddings: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings (2P, D) as float32 or float64, and issame (P,) as bool."""
    embeddings, issame = np.asarray(embeddings), np.asarray(issame)
    if embeddings.ndim != 2 or embeddings.shape[1] == 0 or embeddings.dtype.kind not in "fiu":
        raise DataError(f"embeddings must be numbers of shape (2P, D), and are {embeddings.dtype} {embeddings.shape}.")
    if issame.ndim != 1 or not (issame.dtype == bool or np.isin(issame, (0, 1)).all()):
        raise DataError(f"issame must hold one True or False for each pair, and is {issame.dtype} {issame.shape}.")
    if len(embeddings) != 2 * len(issame):
        raise DataError(
            f"{len(embeddings)} embeddings for {len(issame)} pairs. Pass two for each pair, one after the other."
        )
    if embeddings.dtype != np.float32:
        embeddings = embeddings.astype(np.float64, copy=False)
    return embeddings, issame.astype(bool)


def _squared_distances(embeddings: np.ndarray) -> np.ndarray:
    """Return the distances (P,) of embeddings (2P, D), in their precision."""
    distances = np.empty(len(embeddings) // 2, embeddings.dtype)
    # Blocks that fit into the cache are faster.
    with np.errstate(invalid="ignore", over="ignore"):  # _check_finite reports values that are not finite
        for start in range(0, len(distances), BLOCK):
            rows = embeddings[2 * start : 2 * (start + BLOCK)]
            difference = rows[0::2] - rows[1::2]
            np.square(difference, out=difference).sum(axis=1, out=distances[start : start + BLOCK])
    return distances


def _check_finite(embeddings: np.ndarray, distances: np.ndarray) -> None:
    """Raise DataError unless all embeddings are finite, which the far fewer distances show."""
    finite = np.isfinite(distances)
    if not finite.all():
        pair = int(np.argmin(finite))
        rows = embeddings[2 * pair : 2 * pair + 2]
        what = "infinite or not a number" if not np.isfinite(rows).all() else "too large to be subtracted and squared"
        raise DataError(
            f"the embeddings of {np.count_nonzero(~finite)} of {len(finite)} pairs are {what}, beginning with pair "
            f"{pair} (from 0). Check the network's weights and the images of this pair."
        )


def contiguous_folds(issame: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold (P,) of each pair, with the sizes of scikit-learn's KFold.

    The first (P modulo folds) folds have one pair more.

    Raises:
        DataError: there are fewer pairs than folds, or a fold has no same or no different pairs.
        UsageError: fewer than 2 folds.
    """
    total = len(issame)
    if folds < 2:
        raise UsageError(f"folds={folds}: a threshold is chosen on the other folds. Take 2 or more.")
    if total < folds:
        raise DataError(f"{total} pairs cannot be cut into {folds} folds. Take fewer folds or more pairs.")
    fold_ids = np.repeat(np.arange(folds), total // folds + (np.arange(folds) < total % folds))
    for fold, (different, same) in enumerate(zip(*_count_classes(issame, fold_ids), strict=True)):
        if different == 0 or same == 0:
            first, last = np.flatnonzero(fold_ids == fold)[[0, -1]]
            raise DataError(
                f"fold {fold + 1} of {folds} (pairs {first} to {last}, from 0) has only "
                f"{'same' if same else 'different'} pairs, and each fold needs both kinds. Interleave same and "
                f"different pairs, or take fewer folds."
            )
    return fold_ids


def _count_classes(issame: np.ndarray, fold_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the different pairs (F,) and the same pairs (F,) in each fold."""
    folds = fold_ids[-1] + 1
    return np.bincount(fold_ids[~issame], minlength=folds), np.bincount(fold_ids[issame], minlength=folds)


def _count_accepts(distances: np.ndarray, issame: np.ndarray, fold_ids: np.ndarray) -> np.ndarray:
    """Count the different [:, 0] and the same [:, 1] pairs of each fold below each threshold: (F, 2, 400).

    A histogram and its running sum: a distance counts from the first threshold above it on, not from an equal one.
    """
    folds = fold_ids[-1] + 1
    steps = len(THRESHOLD_GRID)
    first_above = np.searchsorted(THRESHOLD_GRID, distances, side="right")  # 400 if no threshold is above
    # One histogram over (fold, issame, first threshold above), flattened to one index.
    cell = (2 * fold_ids + issame) * (steps + 1) + first_above
    counts = np.bincount(cell, minlength=folds * 2 * (steps + 1)).reshape(folds, 2, steps + 1)
    return counts[:, :, :steps].cumsum(axis=2)


def _count_accepts_after_pca(
    embeddings: np.ndarray, issame: np.ndarray, fold_ids: np.ndarray, components: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reduce each fold by a PCA of the others. Return distances (P,), test and train counts (F, 2, 400)."""
    from sklearn.decomposition import PCA  # takes a second to import, and is seldom needed
    from sklearn.preprocessing import normalize

    folds = fold_ids[-1] + 1
    most = min(embeddings.shape[1], 2 * int(np.count_nonzero(fold_ids != 0)))  # fold 0 is the largest
    if not 1 <= components <= most:
        raise UsageError(f"pca={components}: must lie between 1 and {most}, or be 0 for no reduction.")
    distances = np.empty(len(issame), embeddings.dtype)
    test_counts = np.empty((folds, 2, len(THRESHOLD_GRID)), np.int64)
    train_counts = np.empty_like(test_counts)
    for fold in range(folds):
        others = fold_ids != fold
        train_embeddings = np.concatenate([embeddings[0::2][others], embeddings[1::2][others]])
        model = PCA(components, svd_solver="full").fit(train_embeddings)
        reduced = _squared_distances(np.asarray(normalize(model.transform(embeddings))))
        accept_counts = _count_accepts(reduced, issame, fold_ids)
        test_counts[fold] = accept_counts[fold]
        train_counts[fold] = accept_counts.sum(axis=0) - accept_counts[fold]
        distances[~others] = reduced[~others]
    return distances, test_counts, train_counts


def _roc(distances: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return false and true accept rates (U + 1,) at the U distinct distances, and the area under them.

    Equal distances are accepted together. So the area is the probability that a same pair is closer than a different
    pair, where a tie counts half (Mann-Whitney). It is summed in integers, which is exact.
    """
    order = np.argsort(distances)
    ordered = distances[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # the last pair of each distinct distance
    true = np.append(0, np.cumsum(issame[order])[ends])
    false = np.append(0, ends + 1) - true
    # Trapezoids: twice the area is the sum of width * (left height + right height).
    doubled_area = int(np.sum(np.diff(false) * (true[1:] + true[:-1])))
    return false / false[-1], true / true[-1], doubled_area / (2 * int(false[-1]) * int(true[-1]))


def _equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Return the rate where far = 1 - tar, by linear interpolation between two points of the ROC."""
    gap = far - (1 - tar)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    weight = gap[before] / (gap[before] - gap[after])
    return float(far[before] + weight * (far[after] - far[before]))
