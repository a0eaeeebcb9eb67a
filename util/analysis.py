"""What a verification result tells beyond its accuracy: thresholds, quality, groups of people, comparisons.

All intervals hold 95 %. "Bootstrap" means that the pairs are drawn again with replacement, RESAMPLES times, from a
fixed seed. Here the results of such draws have distributions that numpy knows, so the pairs themselves need not be
drawn. Pairs that share a person are not independent: the true uncertainty is larger.
"""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from util.errors import DataError
from util.pairs import interleaved_order
from util.verification import VerificationResult, cosine, verify_distances

FAR_LEVELS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
RESAMPLES = 10_000
SEED = 0
NO_GROUP = "(no group)"
_BAND_POINTS = 60  # of a ROC
_QUANTILES = (0.025, 0.975)

Interval = tuple[float, float]


@dataclass(frozen=True)
class OperatingPoint:
    """The threshold, a squared distance, for a false accept rate, and the true accept rate at it."""

    far: float
    threshold: float
    threshold_interval: Interval
    tar: float
    tar_interval: Interval

    @property
    def cosine(self) -> float:
        return cosine(self.threshold)

    @property
    def cosine_interval(self) -> Interval:
        low, high = self.threshold_interval
        return cosine(high), cosine(low)


def operating_points(result: VerificationResult) -> list[OperatingPoint]:
    """Return the operating points at FAR_LEVELS, without the rates below 1 / negatives.

    The interval of a threshold is the bootstrap's. The interval of a TAR is the bootstrap's too, but at least Wilson's
    of a proportion at a fixed threshold: if every pair is accepted, the bootstrap alone would see no uncertainty.
    """
    rng = np.random.default_rng(SEED)
    same, different = (np.sort(result.distances[result.issame == kind]) for kind in (True, False))
    points = []
    for far in FAR_LEVELS:
        if far < 1 / len(different):
            break
        threshold = result.threshold_at_far(far)
        tar = result.tar_at_far(far)
        thresholds, tars = _bootstrap(same, different, int(np.searchsorted(different, threshold)), rng)
        wilson = _wilson(tar, len(same))
        low, high = np.quantile(tars, _QUANTILES)
        points.append(
            OperatingPoint(
                far=far,
                threshold=threshold,
                threshold_interval=_interval(thresholds),
                tar=tar,
                tar_interval=(min(float(low), wilson[0]), max(float(high), wilson[1])),
            )
        )
    return points


def roc_band(result: VerificationResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return false accept rates (N,), and the lower and upper ends of the bootstrap's interval of the TAR at each."""
    rng = np.random.default_rng(SEED)
    same, different = (np.sort(result.distances[result.issame == kind]) for kind in (True, False))
    accepts = np.unique(np.geomspace(1, len(different), _BAND_POINTS).round().astype(int))  # the last accepts all
    ends = [_interval(_bootstrap(same, different, count, rng)[1]) for count in accepts[:-1].tolist()]
    low, high = np.array([*ends, (1.0, 1.0)]).T
    return accepts / len(different), low, high


def _bootstrap(
    same: np.ndarray, different: np.ndarray, accepts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the threshold with `accepts` false accepts, and the TAR at it, of RESAMPLES bootstrap samples: (RESAMPLES,).

    `same` (M,) and `different` (N,) are the sorted distances of the pairs. The threshold of a sample is its k-th
    smallest distance of N different pairs, k = accepts + 1. A distance drawn from N sorted ones has the place
    floor(N u), u uniform in [0, 1], and the k-th smallest of N uniform numbers is distributed as Beta(k, N + 1 - k). Of
    M same pairs that are drawn, Binomial(M, TAR) lie below the threshold.
    """
    places = (len(different) * rng.beta(accepts + 1, len(different) - accepts, RESAMPLES)).astype(int)
    thresholds = different[np.minimum(places, len(different) - 1)]
    tar = np.searchsorted(same, thresholds, side="left") / len(same)
    return thresholds, rng.binomial(len(same), tar) / len(same)


def error_versus_reject(result: VerificationResult) -> tuple[np.ndarray, np.ndarray]:
    """Return the error rate (P,) of the pairs that are left when a fraction (P,) with the lowest quality is rejected.

    The quality of a pair is the smaller of the two norms of its embeddings before they were normalized. Decisions are
    those of the accuracy. Grother and Tabassi 2007 proposed the curve for measures of quality.
    """
    assert result.norms is not None
    wrong = ~result.correct[np.argsort(result.norms.reshape(-1, 2).min(axis=1), kind="stable")]
    rejected = np.arange(result.pairs)
    errors_left = np.count_nonzero(wrong) - np.append(0, np.cumsum(wrong)[:-1])
    return rejected / result.pairs, errors_left / (result.pairs - rejected)


@dataclass(frozen=True)
class GroupResult:
    """What the pairs of one group of people are decided to be.

    `accuracy` with its Wilson interval, `far` and `frr` (false reject rate) are at the thresholds of the complete set,
    as a product would use one threshold for all. They are None without pairs of the kind. `own_accuracy` is that of the
    protocol on the group alone, which RFW's papers report; None if the group has too few pairs for ten folds.
    """

    name: str
    pairs: int
    accuracy: float
    interval: Interval
    far: float | None
    frr: float | None
    own_accuracy: float | None


def evaluate_groups(result: VerificationResult, groups: np.ndarray) -> list[GroupResult]:
    """Return the results of the groups, in the order of their names. `groups` (P,) names the group of each pair."""
    found = []
    for name in np.unique(groups).tolist():
        members = groups == name
        issame = result.issame[members]
        correct = result.correct[members]
        far, frr = (
            float(np.mean(~correct[issame == same])) if (issame == same).any() else None for same in (False, True)
        )
        own_accuracy = None
        with suppress(DataError):  # too few pairs of a kind
            order = interleaved_order(issame)
            own_accuracy = verify_distances(result.distances[members][order], issame[order]).accuracy
        accuracy = float(correct.mean())
        found.append(
            GroupResult(
                name=name or NO_GROUP,
                pairs=len(correct),
                accuracy=accuracy,
                interval=_wilson(accuracy, len(correct)),
                far=far,
                frr=frr,
                own_accuracy=own_accuracy,
            )
        )
    return found


def accuracy_gap(groups: list[GroupResult]) -> float:
    """Return the difference between the groups with the highest and the lowest accuracy."""
    accuracies = [group.accuracy for group in groups]
    return max(accuracies) - min(accuracies)


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same pairs, each at its own thresholds.

    `difference` is the second accuracy minus the first, with its bootstrap interval. `only_first` and `only_second`
    count the pairs that one network alone decides right. `p_value` is that of McNemar's exact test (1947): how probable
    it is that these counts differ as much or more if both networks are equally good.
    """

    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p_value: float


def compare(first: VerificationResult, second: VerificationResult) -> Comparison:
    """Compare two results on the same pairs."""
    from scipy.stats import binomtest  # takes a second to import

    rng = np.random.default_rng(SEED)
    only_first = first.correct & ~second.correct
    only_second = second.correct & ~first.correct
    folds = len(first.fold_accuracies)
    differences = np.zeros(RESAMPLES)
    # The pairs of each fold are drawn again: a draw is right for the first network alone, for the second alone, or not.
    for ours, theirs in zip(np.array_split(only_first, folds), np.array_split(only_second, folds), strict=True):
        rates = np.array([ours.mean(), theirs.mean()])
        counts = rng.multinomial(len(ours), [*rates, 1 - rates.sum()], RESAMPLES)
        differences += (counts[:, 1] - counts[:, 0]) / len(ours) / folds
    losses, wins = int(only_first.sum()), int(only_second.sum())
    return Comparison(
        difference=second.accuracy - first.accuracy,
        interval=_interval(differences),
        only_first=losses,
        only_second=wins,
        p_value=float(binomtest(wins, losses + wins).pvalue) if losses + wins else 1.0,
    )


def false_accepts(result: VerificationResult) -> np.ndarray:
    """Return the numbers of the pairs of different people that are accepted, the closest first."""
    return _by_distance(result, result.accepted & ~result.issame)


def false_rejects(result: VerificationResult) -> np.ndarray:
    """Return the numbers of the pairs of one person that are rejected, the most distant first."""
    return _by_distance(result, ~result.accepted & result.issame)[::-1]


def hardest_right(result: VerificationResult) -> np.ndarray:
    """Return the numbers of the pairs that are decided right, the closest to the threshold first."""
    right = np.flatnonzero(result.correct)
    return right[np.argsort(np.abs(result.distances[right] - result.threshold), kind="stable")]


def _by_distance(result: VerificationResult, chosen: np.ndarray) -> np.ndarray:
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(result.distances[numbers], kind="stable")]


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, _QUANTILES)
    return float(low), float(high)


def _wilson(proportion: float, count: int) -> Interval:
    """Return Wilson's score interval (1927) of a proportion of `count`."""
    from scipy.stats import binomtest

    interval = binomtest(round(proportion * count), count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
