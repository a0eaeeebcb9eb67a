"""Verification numbers: embeddings of face pairs in, accuracy over folds and the exact ROC out."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from util.errors import DataError, UsageError

BLOCK = 128  # pairs subtracted at once
FOLDS = 10
THRESHOLD_GRID = np.arange(0, 4, 0.01)  # (400,) squared distances; between unit vectors they lie in [0, 4]


@dataclass(frozen=True, eq=False)
class VerificationResult:
    """What `verify` finds out about P pairs. All distances and thresholds are squared Euclidean distances.

    The numbers of the protocol, over F folds: `accuracy` and `accuracy_std` (ddof 0) are the mean and the deviation of
    `fold_accuracies` (F,), `threshold` is the mean of `thresholds` (F,), the best on the other folds; `tpr` and `fpr`
    (400,) are means over the folds at each of THRESHOLD_GRID.

    The numbers over all pairs at once, exact: `far` and `tar` (U + 1,) are the ROC, false and true accept rate when all
    pairs up to each of the U distinct distances are accepted, beginning with none, (0, 0); `auc` is the area under it.
    `eer` is the rate at which false accepts equal false rejects, on the straight line between the two neighbouring
    points of the ROC.

    `distances` (P,) and `issame` (P,) are what it was computed from; with PCA, each pair's distance is that of the fold
    in which it was tested. `images_per_second` is for whoever has timed the embedding.
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

    @property
    def pairs(self) -> int:
        """P, the number of pairs."""
        return len(self.issame)

    @property
    def negatives(self) -> int:
        """The number of pairs of different people: 1 / negatives is the smallest false accept rate above 0."""
        return self.pairs - int(np.count_nonzero(self.issame))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers that people quote, for JSON."""
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

    def tar_at_far(self, far: float) -> float:
        """The largest true accept rate of any threshold whose false accept rate is at most `far`, in [0, 1].

        Below 1 / negatives that is the rate without any false accept.
        """
        if not 0 <= far <= 1:
            raise UsageError(f"tar_at_far({far}): a false accept rate lies between 0 and 1")
        return float(self.tar[np.searchsorted(self.far, far, side="right") - 1])


def verify(embeddings: np.ndarray, issame: np.ndarray, folds: int = FOLDS, pca: int = 0) -> VerificationResult:
    """Judges embeddings (2P, D), L2-normalised, rows 2i and 2i + 1 a pair, by the truth `issame` (P,).

    The protocol of LFW (Huang et al. 2007, "image-restricted"), as FaceNet, InsightFace and face.evoLVe compute it:
    contiguous folds; a pair is called the same if its squared distance is less than a threshold; each fold is judged at
    the threshold of THRESHOLD_GRID, the first of equally good ones, that suits the other folds best. float32 embeddings
    are subtracted, squared and summed in float32, and their distances compared to the thresholds in float64.

    With `pca` > 0, each fold's embeddings are reduced to so many principal components of the other folds' ones, and
    normalised again.

    Raises DataError for embeddings and truths that do not fit together or are not finite, and for a fold without same
    or without different pairs; UsageError for `folds` and `pca` that make no sense.
    """
    embeddings, issame = _checked(embeddings, issame)
    distances = _squared_distances(embeddings)
    _check_finite(embeddings, distances)
    fold_of = contiguous_folds(issame, folds)
    if pca:
        distances, tested, trained = _reduced_by_fold(embeddings, issame, fold_of, pca)
    else:
        tested = _accepted(distances, issame, fold_of)  # (F, 2, 400)
        trained = tested.sum(axis=0) - tested

    best = np.argmax(
        trained[:, 1] - trained[:, 0], axis=1
    )  # (F,); true minus false accepts, and argmax takes the first
    negatives, positives = _class_counts(issame, fold_of)  # (F,) each
    at_best = np.take_along_axis(tested, best[:, None, None], axis=2)[:, :, 0]  # (F, 2)
    fold_accuracies = (at_best[:, 1] + negatives - at_best[:, 0]) / (negatives + positives)
    far, tar, auc = _roc(distances, issame)
    return VerificationResult(
        accuracy=float(fold_accuracies.mean()),
        accuracy_std=float(fold_accuracies.std()),
        fold_accuracies=fold_accuracies,
        threshold=float(THRESHOLD_GRID[best].mean()),
        thresholds=THRESHOLD_GRID[best],
        tpr=(tested[:, 1] / positives[:, None]).mean(axis=0),
        fpr=(tested[:, 0] / negatives[:, None]).mean(axis=0),
        far=far,
        tar=tar,
        auc=auc,
        eer=_equal_error_rate(far, tar),
        distances=distances,
        issame=issame,
    )


def _checked(embeddings: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2P, D) float32 or float64, and (P,) bool."""
    embeddings, issame = np.asarray(embeddings), np.asarray(issame)
    if embeddings.ndim != 2 or embeddings.shape[1] == 0 or embeddings.dtype.kind not in "fiu":
        raise DataError(f"embeddings must be numbers of shape (2P, D), and are {embeddings.dtype} {embeddings.shape}")
    if issame.ndim != 1 or not (issame.dtype == bool or np.isin(issame, (0, 1)).all()):
        raise DataError(f"issame must hold one True or False a pair, and is {issame.dtype} {issame.shape}")
    if len(embeddings) != 2 * len(issame):
        raise DataError(f"{len(embeddings)} embeddings for {len(issame)} pairs; give two a pair, one after the other")
    if embeddings.dtype != np.float32:
        embeddings = embeddings.astype(np.float64, copy=False)
    return embeddings, issame.astype(bool)


def _squared_distances(embeddings: np.ndarray) -> np.ndarray:
    """(2P, D) -> (P,), in the embeddings' own precision. In blocks that stay in the cache, for speed."""
    distances = np.empty(len(embeddings) // 2, embeddings.dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is reported by _check_finite
        for start in range(0, len(distances), BLOCK):
            rows = embeddings[2 * start : 2 * (start + BLOCK)]
            difference = rows[0::2] - rows[1::2]
            np.square(difference, out=difference).sum(axis=1, out=distances[start : start + BLOCK])
    return distances


def _check_finite(embeddings: np.ndarray, distances: np.ndarray) -> None:
    """A distance is finite only if both its embeddings are, and there are far fewer distances to look at."""
    finite = np.isfinite(distances)
    if not finite.all():
        pair = int(np.argmin(finite))
        rows = embeddings[2 * pair : 2 * pair + 2]
        what = "infinite or not a number" if not np.isfinite(rows).all() else "too large to be subtracted and squared"
        raise DataError(
            f"the embeddings of {np.count_nonzero(~finite)} of {len(finite)} pairs are {what}, first those of pair "
            f"{pair} (from 0); check the network's weights and the images of that pair"
        )


def contiguous_folds(issame: np.ndarray, folds: int) -> np.ndarray:
    """(P,) the fold of each pair, sized like scikit-learn's KFold: the first P % folds have one pair more.

    DataError if there are fewer pairs than folds, or a fold has no same or no different pairs.
    """
    total = len(issame)
    if folds < 2:
        raise UsageError(f"folds={folds}: a threshold is chosen on the other folds, so take 2 or more")
    if total < folds:
        raise DataError(f"{total} pairs cannot be cut into {folds} folds; take fewer folds or more pairs")
    fold_of = np.repeat(np.arange(folds), total // folds + (np.arange(folds) < total % folds))
    for fold, (different, same) in enumerate(zip(*_class_counts(issame, fold_of), strict=True)):
        if different == 0 or same == 0:
            first, last = np.flatnonzero(fold_of == fold)[[0, -1]]
            raise DataError(
                f"fold {fold + 1} of {folds} (pairs {first} to {last}, from 0) has only "
                f"{'same' if same else 'different'} pairs, and each fold needs both kinds; interleave same and "
                f"different pairs, or take fewer folds"
            )
    return fold_of


def _class_counts(issame: np.ndarray, fold_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F,) different pairs and (F,) same pairs in each fold."""
    folds = fold_of[-1] + 1
    return np.bincount(fold_of[~issame], minlength=folds), np.bincount(fold_of[issame], minlength=folds)


def _accepted(distances: np.ndarray, issame: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """(F, 2, 400): how many different [:, 0] and same [:, 1] pairs of each fold lie below each threshold.

    A histogram and its running sum: a distance counts from the first threshold above it on, not from one equal to it.
    """
    folds, steps = fold_of[-1] + 1, len(THRESHOLD_GRID)
    first_above = np.searchsorted(THRESHOLD_GRID, distances, side="right")  # 400 where no threshold is
    cell = (2 * fold_of + issame) * (steps + 1) + first_above
    counts = np.bincount(cell, minlength=folds * 2 * (steps + 1)).reshape(folds, 2, steps + 1)
    return counts[:, :, :steps].cumsum(axis=2)


def _reduced_by_fold(
    embeddings: np.ndarray, issame: np.ndarray, fold_of: np.ndarray, components: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances (P,) after a PCA for each fold, fitted to the other ones, and both results of _accepted (F, 2, 400)."""
    from sklearn.decomposition import PCA  # takes a second to import, and is seldom needed
    from sklearn.preprocessing import normalize

    folds = fold_of[-1] + 1
    most = min(embeddings.shape[1], 2 * int(np.count_nonzero(fold_of != 0)))  # fold 0 is the largest
    if not 1 <= components <= most:
        raise UsageError(f"pca={components}: must lie between 1 and {most}, or be 0 for none")
    distances = np.empty(len(issame), embeddings.dtype)
    tested = np.empty((folds, 2, len(THRESHOLD_GRID)), np.int64)
    trained = np.empty_like(tested)
    for fold in range(folds):
        others = fold_of != fold
        fitted_to = np.concatenate([embeddings[0::2][others], embeddings[1::2][others]])
        model = PCA(components, svd_solver="full").fit(fitted_to)
        reduced = _squared_distances(normalize(model.transform(embeddings)))
        accepted = _accepted(reduced, issame, fold_of)
        tested[fold], trained[fold] = accepted[fold], accepted.sum(axis=0) - accepted[fold]
        distances[~others] = reduced[~others]
    return distances, tested, trained


def _roc(distances: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """False and true accept rates (U + 1,) at the U distinct distances, and the area under their straight connections.

    Equal distances are accepted together, so that the area is the chance that a same pair is closer than a different
    one, a tie counting half (Mann-Whitney). It is summed in integers.
    """
    order = np.argsort(distances)
    ordered = distances[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # the last pair of each distinct distance
    true = np.append(0, np.cumsum(issame[order])[ends])
    false = np.append(0, ends + 1) - true
    doubled_area = int(np.sum(np.diff(false) * (true[1:] + true[:-1])))
    return false / false[-1], true / true[-1], doubled_area / (2 * int(false[-1]) * int(true[-1]))


def _equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    gap = far - (1 - tar)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    weight = gap[before] / (gap[before] - gap[after])
    return float(far[before] + weight * (far[after] - far[before]))
