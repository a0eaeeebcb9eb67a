import json
from itertools import pairwise

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from util.errors import DataError, UsageError
from util.verification import THRESHOLD_GRID, cosine, verify, verify_distances


def made_pairs(pairs: int, dimensions: int = 16, noise: float = 0.9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit embeddings (2P, D) float32 and issame (P,), half of it True, in random order."""
    rng = np.random.default_rng(seed)
    issame = rng.permutation(np.arange(pairs) % 2 == 0)
    embeddings = rng.standard_normal((2 * pairs, dimensions))
    embeddings[1::2][issame] = embeddings[0::2][issame] + noise * rng.standard_normal((issame.sum(), dimensions))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings.astype(np.float32), issame


def at_distances(squared: list[float]) -> np.ndarray:
    """Return embeddings (2P, 1) whose pairs have exactly these squared distances, for squares of exact numbers."""
    embeddings = np.zeros((2 * len(squared), 1))
    embeddings[1::2, 0] = np.sqrt(squared)
    return embeddings


def slow_protocol(embeddings: np.ndarray, issame: np.ndarray, folds: int, pca: int = 0) -> dict[str, list]:
    """Compute the protocol literally: fold by fold, threshold by threshold, pair by pair of each kind."""
    found = {"fold_accuracies": [], "thresholds": [], "tpr": [], "fpr": []}
    left, right = embeddings[0::2], embeddings[1::2]
    for train, test in KFold(folds, shuffle=False).split(issame):
        a, b = left, right
        if pca:
            model = PCA(pca, svd_solver="full").fit(np.concatenate([left[train], right[train]]))
            a, b = (model.transform(side) for side in (left, right))
            a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, b))
        distances = np.sum(np.square(a - b), axis=1)
        best, best_correct = 0.0, -1
        for threshold in np.arange(0, 4, 0.01):
            correct = np.sum((distances[train] < threshold) == issame[train])
            if correct > best_correct:
                best, best_correct = threshold, correct
        found["fold_accuracies"].append(np.mean((distances[test] < best) == issame[test]))
        found["thresholds"].append(best)
        accepted = [distances[test] < threshold for threshold in np.arange(0, 4, 0.01)]
        found["tpr"].append([np.mean(each[issame[test]]) for each in accepted])
        found["fpr"].append([np.mean(each[~issame[test]]) for each in accepted])
    found["tpr"], found["fpr"] = np.mean(found["tpr"], axis=0), np.mean(found["fpr"], axis=0)
    return found


def test_verify_equals_the_reference_to_the_last_digit(golden):
    expected = np.load(golden / "verification.npz")
    result = verify(expected["embeddings"], expected["issame"])
    assert np.array_equal(result.tpr, expected["tpr"])
    assert np.array_equal(result.fpr, expected["fpr"])
    assert np.array_equal(result.fold_accuracies, expected["accuracy"])
    assert np.array_equal(result.thresholds, expected["best_thresholds"])
    assert result.accuracy == expected["accuracy"].mean()
    assert result.accuracy_std == expected["accuracy"].std()
    assert result.threshold == expected["best_thresholds"].mean()


def test_verify_pca_equals_the_reference_within_one_pair(golden):
    expected = np.load(golden / "verification.npz")
    result = verify(expected["embeddings"], expected["issame"], pca=32)
    pairs_a_fold = len(expected["issame"]) / 10
    assert np.abs(result.fold_accuracies - expected["pca32.accuracy"]).max() * pairs_a_fold < 1.001
    assert np.abs(result.thresholds - expected["pca32.best_thresholds"]).max() < 0.011


@pytest.mark.parametrize(("pairs", "folds"), [(400, 10), (203, 10), (97, 4), (30, 2)])
def test_verify_equals_the_slow_protocol(pairs, folds):
    embeddings, issame = made_pairs(pairs, seed=pairs)
    result, expected = verify(embeddings, issame, folds), slow_protocol(embeddings, issame, folds)
    assert 0.6 < result.accuracy < 0.99  # a case with errors in it
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(result, name), values, rtol=0, atol=1e-15, err_msg=name)
    accuracies = expected["fold_accuracies"]
    mean = sum(accuracies) / folds
    assert result.accuracy == pytest.approx(mean)
    assert result.accuracy_std == pytest.approx((sum((each - mean) ** 2 for each in accuracies) / folds) ** 0.5)
    assert result.threshold == pytest.approx(sum(expected["thresholds"]) / folds)


def test_verify_pca_equals_the_slow_protocol():
    embeddings, issame = made_pairs(203, dimensions=24, seed=5)
    result, expected = verify(embeddings.astype(np.float64), issame, 5, pca=7), slow_protocol(embeddings, issame, 5, 7)
    np.testing.assert_allclose(result.fold_accuracies, expected["fold_accuracies"], rtol=0, atol=1.001 / 40)
    assert result.accuracy != verify(embeddings, issame, 5).accuracy


def test_verify_pca_pools_each_pair_at_its_own_folds_distance():
    embeddings, issame = made_pairs(40, dimensions=8, seed=2)
    result = verify(embeddings, issame, folds=2, pca=3)
    left, right = embeddings[0::2], embeddings[1::2]
    model = PCA(3, svd_solver="full").fit(np.concatenate([left[20:], right[20:]]))
    a, b = (
        side / np.linalg.norm(side, axis=1, keepdims=True) for side in map(model.transform, (left[:20], right[:20]))
    )
    np.testing.assert_allclose(result.distances[:20], np.sum((a - b) ** 2, axis=1), rtol=1e-4)


def test_distance_equal_to_a_threshold_is_not_accepted():
    embeddings = at_distances([0.25, 2.25] * 4)
    result = verify(embeddings, [True, False] * 4, folds=2)
    quarter, after = np.searchsorted(THRESHOLD_GRID, [0.25, 0.255])
    assert THRESHOLD_GRID[quarter] == 0.25
    assert result.tpr[quarter] == 0 and result.tpr[after] == 1


def test_first_of_equally_good_thresholds_is_taken():
    result = verify(at_distances([0.25, 2.25] * 4), [True, False] * 4, folds=2)
    assert result.thresholds.tolist() == [THRESHOLD_GRID[26]] * 2  # all from 0.26 to 2.25 have no error
    assert result.accuracy == 1 and result.accuracy_std == 0


def test_distance_beyond_the_grid_is_accepted_nowhere():
    result = verify(at_distances([0.25, 16.0] * 4), [False, True] * 4, folds=2)
    assert result.tpr.max() == 0 and result.fpr[-1] == 1
    assert result.tar[-1] == 1 and result.far[-1] == 1


def test_float32_distances_are_compared_in_float64():
    """The float32 next to 0.29 is less than 0.29, but not less than 0.29 rounded to float32."""
    embeddings = np.zeros((8, 1), np.float32)
    embeddings[1::2, 0] = np.sqrt(np.float32(0.29))
    squared = np.square(embeddings[1, 0])
    assert float(squared) < 0.29 and not squared < np.float32(0.29)
    result = verify(embeddings, [True, False, True, False], folds=2)
    assert result.distances.dtype == np.float32
    assert result.tpr.tolist() == [float(float(squared) < threshold) for threshold in THRESHOLD_GRID.tolist()]


@pytest.mark.parametrize("decimals", [1, 2, 6])
def test_roc_and_auc_equal_scikit_learn_with_and_without_ties(decimals):
    rng = np.random.default_rng(decimals)
    issame = np.arange(600) % 2 == 0
    distances = np.round(np.where(issame, rng.uniform(0, 3, 600), rng.uniform(1, 4, 600)), decimals)
    result = verify(at_distances(distances), issame)
    scores = -result.distances
    far, tar, _ = roc_curve(issame, scores, drop_intermediate=False)
    np.testing.assert_allclose(result.far, far, rtol=0, atol=1e-15)
    np.testing.assert_allclose(result.tar, tar, rtol=0, atol=1e-15)
    assert result.auc == pytest.approx(roc_auc_score(issame, scores), abs=1e-14)


def all_operating_points(distances: list[float], issame: list[bool]) -> list[tuple[float, float]]:
    """Return (FAR, TAR) at every threshold that makes a difference, by counting."""
    points = []
    for threshold in [0.0, *sorted({distance + 1e-9 for distance in distances})]:
        accepted = [distance < threshold for distance in distances]
        true = sum(a and s for a, s in zip(accepted, issame, strict=True))
        points.append(((sum(accepted) - true) / (len(issame) - sum(issame)), true / sum(issame)))
    return points


def crossing(points: list[tuple[float, float]]) -> float:
    """Return the FAR where the lines between points meet FAR = 1 - TAR, found by halving."""
    for (far0, tar0), (far1, tar1) in pairwise(points):
        if far0 + tar0 <= 1 <= far1 + tar1:
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                beyond = far0 + tar0 + middle * (far1 - far0 + tar1 - tar0) >= 1
                low, high = (low, middle) if beyond else (middle, high)
            return far0 + high * (far1 - far0)
    raise AssertionError("the curve ends at (1, 1)")


@pytest.mark.parametrize("seed", range(30))
def test_eer_and_tar_at_far_equal_counting_with_ties(seed):
    rng = np.random.default_rng(seed)
    issame = [True, False, False, True, True, False, *(rng.random(7) < 0.5).tolist()]
    distances = (rng.integers(1, 7, size=len(issame)) ** 2 / 16.0).tolist()
    result = verify(at_distances(distances), issame, folds=2)
    points = all_operating_points(distances, issame)
    assert result.eer == pytest.approx(crossing(points), abs=1e-12)
    negatives = len(issame) - sum(issame)
    for far in [0, 0.001, 0.1, 0.2, 0.5, 0.99, 1, *(k / negatives for k in range(negatives + 1))]:
        assert result.tar_at_far(far) == max(tar for at, tar in points if at <= far)


def test_eer_of_a_known_curve():
    """Nearest first: same, different, same, different. The line FAR = 1 - TAR is met at the point (0.5, 0.5)."""
    result = verify(at_distances([0.25, 1.0, 2.25, 4.0]), [True, False, True, False], folds=2)
    assert result.eer == 0.5
    assert result.auc == 0.75
    assert [result.tar_at_far(far) for far in (0, 0.49, 0.5, 1)] == [0.5, 0.5, 1, 1]


def test_eer_is_interpolated_where_a_tie_skips_it():
    """All pairs at one distance: from (0, 0) straight to (1, 1), which is chance."""
    result = verify(at_distances([1.0] * 8), [True, False] * 4, folds=2)
    assert result.eer == 0.5 and result.auc == 0.5 and result.tar_at_far(0.9) == 0


def test_perfect_and_opposite_embeddings_have_extreme_numbers():
    perfect = verify(at_distances([0.25, 2.25] * 10), [True, False] * 10)
    assert (perfect.accuracy, perfect.auc, perfect.eer, perfect.tar_at_far(0)) == (1, 1, 0, 1)
    opposite = verify(at_distances([0.25, 2.25] * 10), [False, True] * 10)
    assert (opposite.auc, opposite.eer, opposite.tar_at_far(0.99)) == (0, 1, 0)


def test_result_has_its_size_and_plain_floats():
    embeddings, issame = made_pairs(203)
    result = verify(embeddings, issame)
    assert result.pairs == 203 and result.negatives == 203 - issame.sum()
    for name in ("accuracy", "accuracy_std", "threshold", "auc", "eer"):
        assert type(getattr(result, name)) is float, name
    assert type(result.tar_at_far(0.1)) is float


def test_result_to_dict_holds_the_quoted_numbers_for_json():
    result = verify(*made_pairs(203))
    numbers = json.loads(json.dumps(result.to_dict()))
    assert numbers == {
        "accuracy": result.accuracy,
        "accuracy_std": result.accuracy_std,
        "fold_accuracies": result.fold_accuracies.tolist(),
        "threshold": result.threshold,
        "auc": result.auc,
        "eer": result.eer,
        "tar_at_far": {"1e-3": result.tar_at_far(1e-3), "1e-2": result.tar_at_far(1e-2)},
        "pairs": 203,
        "images_per_second": None,
    }


@pytest.mark.parametrize("far", [-0.1, 1.1, float("nan")])
def test_tar_at_far_refuses_an_impossible_rate(far):
    result = verify(*made_pairs(20), folds=2)
    with pytest.raises(UsageError, match="between 0 and 1"):
        result.tar_at_far(far)


def test_verify_leaves_its_inputs_and_takes_lists():
    embeddings, issame = made_pairs(203)
    before = embeddings.copy()
    result = verify(embeddings, issame)
    assert np.array_equal(embeddings, before)
    as_lists = verify(embeddings.astype(np.float64).tolist(), issame.astype(int).tolist())
    assert np.array_equal(as_lists.fold_accuracies, result.fold_accuracies)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [[6], [6, 7]])
@pytest.mark.parametrize("pca", [0, 3])
@pytest.mark.filterwarnings("error")
def test_verify_names_embeddings_that_are_not_finite(value, rows, pca):
    embeddings, issame = made_pairs(40)
    embeddings[rows, 2] = value
    with pytest.raises(DataError, match=r"1 of 40 pairs are infinite or not a number, beginning with pair 3 "):
        verify(embeddings, issame, folds=2, pca=pca)


@pytest.mark.filterwarnings("error")
def test_verify_names_embeddings_too_large_to_square():
    embeddings, issame = made_pairs(40)
    embeddings[10] = 3e38
    with pytest.raises(DataError, match="too large"):
        verify(embeddings, issame, folds=2)


def test_verify_names_a_fold_of_one_class_and_the_fix():
    embeddings, _ = made_pairs(60)
    issame = np.array(([True] * 10 + [False] * 10) * 3)
    assert verify(embeddings, issame, folds=3).pairs == 60
    with pytest.raises(DataError, match=r"fold 1 of 6 \(pairs 0 to 9, from 0\) has only same pairs.*Interleave"):
        verify(embeddings, issame, folds=6)
    issame[:10] = np.arange(10) % 2
    with pytest.raises(DataError, match=r"fold 2 of 6 \(pairs 10 to 19, from 0\) has only different pairs"):
        verify(embeddings, issame, folds=6)


def test_verify_refuses_a_set_of_one_class():
    embeddings, _ = made_pairs(20)
    for kind in (True, False):
        with pytest.raises(DataError, match="has only"):
            verify(embeddings, [kind] * 20)


@pytest.mark.parametrize(
    ("embeddings", "issame", "message"),
    [
        (np.ones((5, 4)), [True, False], "5 embeddings for 2 pairs"),
        (np.ones((8, 4)), [True, False], "8 embeddings for 2 pairs"),
        (np.ones((2, 2, 4)), [True], "shape"),
        (np.ones(4), [True, False], "shape"),
        (np.ones((4, 0)), [True, False], "shape"),
        (np.ones((4, 2), complex), [True, False], "complex"),
        (np.full((4, 2), "a"), [True, False], "must be numbers"),
        (np.ones((4, 2)), [[True, False]], "issame"),
        (np.ones((4, 2)), [1, 2], "issame"),
        (np.ones((4, 2)), [1, np.nan], "issame"),
        (np.ones((4, 2)), ["same", "different"], "issame"),
        (np.ones((4, 2)), [True, False], "2 pairs cannot be cut into 10 folds"),
        (np.ones((0, 2)), [], "0 pairs cannot be cut"),
    ],
)
def test_verify_refuses_bad_shapes_and_types_in_one_line(embeddings, issame, message):
    with pytest.raises(DataError, match=message) as caught:
        verify(embeddings, issame)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "message"), [({"folds": 1}, "folds=1"), ({"folds": 0}, "folds=0")])
def test_verify_refuses_fewer_than_two_folds(settings, message):
    with pytest.raises(UsageError, match=message):
        verify(*made_pairs(20), **settings)


@pytest.mark.parametrize("pca", [-1, 17])
def test_verify_refuses_more_components_than_dimensions(pca):
    with pytest.raises(UsageError, match="between 1 and 16"):
        verify(*made_pairs(20), folds=2, pca=pca)


def test_verify_refuses_more_components_than_embeddings():
    embeddings, _ = made_pairs(5)
    with pytest.raises(UsageError, match="between 1 and 4"):
        verify(embeddings, [True, False, True, False, True], folds=2, pca=5)


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_threshold_at_far_is_the_largest_of_its_rate(decimals):
    embeddings, issame = made_pairs(400)
    rounded = np.round(verify(embeddings, issame).distances.astype(np.float64), decimals)
    result = verify_distances(rounded, issame)
    for far in (0, 0.004, 1 / 200, 0.01, 0.1, 0.5):
        threshold = result.threshold_at_far(far)
        assert np.mean(rounded[~issame] < threshold) <= far < np.mean(rounded[~issame] <= threshold)
        assert np.mean(rounded[issame] < threshold) == result.tar_at_far(far)
    assert result.threshold_at_far(1) == np.inf


def test_correct_pairs_are_those_of_the_accuracy():
    embeddings, issame = made_pairs(430)
    result = verify(embeddings, issame)
    for fold, pairs in enumerate(np.split(np.arange(430), 10)):
        accepted = result.distances[pairs] < result.thresholds[fold]
        assert np.array_equal(result.accepted[pairs], accepted)
        assert result.correct[pairs].mean() == result.fold_accuracies[fold]
    assert 0 < np.count_nonzero(~result.correct) < 100


def test_cosine_belongs_to_the_squared_distance():
    embeddings, issame = made_pairs(200)
    for left, right, distance in zip(
        embeddings[::2], embeddings[1::2], verify(embeddings, issame).distances, strict=True
    ):
        assert cosine(distance) == pytest.approx(left @ right, abs=1e-6)


def test_verify_distances_equals_verify():
    embeddings, issame = made_pairs(100)
    expected = verify(embeddings, issame)
    found = verify_distances(expected.distances, issame)
    assert found.to_dict() == expected.to_dict() and np.array_equal(found.tpr, expected.tpr)
