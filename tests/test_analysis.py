"""Intervals, groups, quality and comparisons, against slow computations that draw and count every pair."""

import dataclasses
import math

import numpy as np
import pytest

from tests.test_verification import made_pairs
from util.analysis import (
    FAR_LEVELS,
    accuracy_gap,
    compare,
    error_versus_reject,
    evaluate_groups,
    false_accepts,
    false_rejects,
    hardest_right,
    operating_points,
    roc_band,
)
from util.pairs import interleaved_order
from util.verification import VerificationResult, verify


def result_of(pairs: int = 1000, noise: float = 0.9, seed: int = 0) -> VerificationResult:
    embeddings, issame = made_pairs(pairs, noise=noise, seed=seed)
    order = interleaved_order(issame)
    return verify(embeddings.reshape(pairs, 2, -1)[order].reshape(2 * pairs, -1), issame[order])


def slow_bootstrap(result: VerificationResult, far: float, resamples: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Draw same and different pairs with replacement; return thresholds and TARs by sorting and counting."""
    rng = np.random.default_rng(7)
    same, different = result.distances[result.issame], result.distances[~result.issame]
    thresholds, tars = [], []
    for _ in range(resamples):
        drawn = np.sort(rng.choice(different, len(different)))
        thresholds.append(drawn[int(far * len(different))])
        tars.append(np.mean(rng.choice(same, len(same)) < thresholds[-1]))
    return np.array(thresholds), np.array(tars)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval from its formula."""
    z, p = 1.959964, right / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return center - half, center + half


@pytest.mark.parametrize("index", [0, 1])
def test_operating_point_has_the_intervals_of_the_bootstrap(index):
    result = result_of()
    point = operating_points(result)[index]
    thresholds, tars = slow_bootstrap(result, point.far)
    assert point.threshold == result.threshold_at_far(point.far) and point.tar == result.tar_at_far(point.far)
    np.testing.assert_allclose(point.threshold_interval, np.quantile(thresholds, (0.025, 0.975)), atol=0.02)
    np.testing.assert_allclose(point.tar_interval, np.quantile(tars, (0.025, 0.975)), atol=0.02)
    assert point.cosine == 1 - point.threshold / 2
    assert point.cosine_interval == tuple(1 - end / 2 for end in point.threshold_interval[::-1])


def test_operating_points_end_where_the_pairs_end():
    for pairs, lowest in ((40, 1e-1), (200, 1e-2), (1990, 1e-2), (2000, 1e-3)):
        assert [point.far for point in operating_points(result_of(pairs))] == [
            far for far in FAR_LEVELS if far >= lowest
        ]
    few = dataclasses.replace(result_of(40), issame=np.arange(40) > 8)
    assert operating_points(few) == []  # 9 different pairs


def test_tar_of_perfect_pairs_is_not_certain():
    result = result_of(200, noise=0.01)
    for point in operating_points(result):
        assert point.tar == 1.0
        assert point.tar_interval == pytest.approx(wilson(100, 100), abs=1e-5)


def test_roc_band_is_that_of_the_bootstrap():
    result = result_of(400)
    far, low, high = roc_band(result)
    assert far[0] == 1 / 200 and far[-1] == 1 and (np.diff(far) > 0).all() and low[-1] == high[-1] == 1
    for index in (3, 20, 40):
        _, tars = slow_bootstrap(result, far[index])
        np.testing.assert_allclose((low[index], high[index]), np.quantile(tars, (0.025, 0.975)), atol=0.025)
        assert low[index] <= result.tar_at_far(far[index]) <= high[index]


def test_error_versus_reject_counts_the_pairs_that_are_left():
    result = result_of(300)
    norms = np.random.default_rng(1).gamma(5, 3, 600).astype(np.float32)
    rejected, errors = error_versus_reject(dataclasses.replace(result, norms=norms))
    smaller = [min(norms[2 * pair], norms[2 * pair + 1]) for pair in range(300)]
    for count in (0, 1, 30, 299):
        left = sorted(range(300), key=smaller.__getitem__)[count:]
        assert rejected[count] == count / 300
        assert errors[count] == np.mean([not result.correct[pair] for pair in left])
    assert errors[0] == np.mean(~result.correct) > 0


def test_groups_are_counted_at_the_thresholds_of_the_set():
    result = result_of(800)
    groups = np.array(["b", "a", "", "b"])[np.random.default_rng(3).integers(0, 4, 800)]
    found = {group.name: group for group in evaluate_groups(result, groups)}
    assert list(found) == ["(no group)", "a", "b"]
    fold_of = np.repeat(np.arange(10), 80)
    for name, group in found.items():
        right, kinds = 0, {True: [0, 0], False: [0, 0]}
        for pair in np.flatnonzero(groups == ("" if name == "(no group)" else name)):
            accepted = result.distances[pair] < result.thresholds[fold_of[pair]]
            right += accepted == result.issame[pair]
            kinds[bool(result.issame[pair])][int(accepted)] += 1
        total = sum(map(sum, kinds.values()))
        assert (group.pairs, group.accuracy) == (total, right / total)
        assert group.far == kinds[False][1] / sum(kinds[False]) and group.frr == kinds[True][0] / sum(kinds[True])
        assert group.interval == pytest.approx(wilson(right, total), abs=1e-5)
    accuracies = [group.accuracy for group in found.values()]
    assert accuracy_gap(list(found.values())) == max(accuracies) - min(accuracies) > 0


def test_group_has_the_accuracy_of_the_protocol_on_it_alone():
    embeddings, issame = made_pairs(400)
    issame_first = np.argsort(~issame, kind="stable")  # of one group: 200 same pairs, then 200 different ones
    groups = np.where(np.arange(400) < 200, "first", "second")
    result = verify(embeddings, issame)
    first, second = evaluate_groups(result, groups)
    assert first.own_accuracy == verify(embeddings[:400], issame[:200]).accuracy
    assert second.own_accuracy == verify(embeddings[400:], issame[200:]).accuracy
    only_same = np.where(np.isin(np.arange(400), issame_first[:200]), "same", "different")
    different, same = evaluate_groups(result, only_same)
    assert (different.frr, same.far, same.own_accuracy) == (None, None, None)


def test_compare_has_the_exact_p_value_of_mcnemar():
    first, second = result_of(600, seed=1), result_of(600, seed=1)
    worse = first.distances.copy()
    worse[:40] = np.where(first.issame[:40], 3.9, worse[:40])  # one fold loses its same pairs
    second = dataclasses.replace(second, distances=worse)
    second = dataclasses.replace(second, accuracy=float(second.correct.mean()))
    found = compare(first, second)
    lost = sum(first.correct[pair] and not second.correct[pair] for pair in range(600))
    won = sum(second.correct[pair] and not first.correct[pair] for pair in range(600))
    assert (found.only_first, found.only_second) == (lost, won) and lost > 5
    discordant = lost + won
    tail = sum(math.comb(discordant, count) for count in range(min(lost, won) + 1)) / 2**discordant
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.difference == pytest.approx((won - lost) / 600)
    rng = np.random.default_rng(5)
    gains = second.correct.astype(int) - first.correct
    draws = [
        np.mean([gains[fold][rng.integers(0, 60, 60)].mean() for fold in np.arange(600).reshape(10, 60)])
        for _ in range(3000)
    ]
    np.testing.assert_allclose(found.interval, np.quantile(draws, (0.025, 0.975)), atol=0.005)
    assert found.interval[0] < found.difference < found.interval[1] < 0


def test_compare_of_a_network_with_itself_finds_nothing():
    result = result_of(430)
    assert dataclasses.astuple(compare(result, result)) == (0.0, (0.0, 0.0), 0, 0, 1.0)


def test_wrong_pairs_are_sorted_by_how_wrong_they_are():
    result = result_of(500, noise=1.2)
    accepts, rejects, right = false_accepts(result), false_rejects(result), hardest_right(result)
    assert len(accepts) and len(rejects) and len(accepts) + len(rejects) == np.count_nonzero(~result.correct)
    assert len(right) == np.count_nonzero(result.correct)
    assert not result.issame[accepts].any() and result.issame[rejects].all() and result.correct[right].all()
    assert (np.diff(result.distances[accepts]) >= 0).all() and (np.diff(result.distances[rejects]) <= 0).all()
    assert (np.diff(np.abs(result.distances[right] - result.threshold)) >= 0).all()
