"""Identification: every number again, slowly, from the matrix of all scores."""

import numpy as np
import pytest

from util import identification
from util.identification import aggregate_templates, pair_scores, search


def unit_rows(rng: np.random.Generator, rows: int, size: int = 8) -> np.ndarray:
    vectors = rng.normal(size=(rows, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def people() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 90 probes of 30 people and a gallery of 50 templates of the first 20 people, with noise."""
    rng = np.random.default_rng(3)
    centers = unit_rows(rng, 30)
    probe_ids = np.arange(90) % 30
    gallery_ids = rng.permutation(np.concatenate([np.arange(20), rng.integers(0, 20, 30)]))

    def around(ids: np.ndarray) -> np.ndarray:
        vectors = centers[ids] + 0.45 * rng.normal(size=(len(ids), 8)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return around(probe_ids), probe_ids, around(gallery_ids), gallery_ids


@pytest.mark.parametrize("block", [2**24, 60, 1])
def test_search_equals_sorting_all_scores(people, monkeypatch, block):
    monkeypatch.setattr(identification, "_BLOCK_SCORES", block)
    probes, probe_ids, gallery, gallery_ids = people
    found = search(*people)
    for probe, person in enumerate(probe_ids):
        scores = gallery @ probes[probe]
        order = np.argsort(-scores)
        is_mate = gallery_ids[order] == person
        others = order[~is_mate]
        assert found.others[probe] == others[0]
        assert found.other_scores[probe] == pytest.approx(scores[others[0]], abs=1e-6)
        if person >= 20:
            assert found.mate_ranks[probe] == 0 and found.mates[probe] == -1
            assert np.isnan(found.mate_scores[probe]) and np.isnan(found.average_precisions[probe])
            continue
        assert found.mate_ranks[probe] == np.argmax(is_mate) + 1
        assert found.mates[probe] == order[np.argmax(is_mate)]
        assert found.mate_scores[probe] == pytest.approx(scores[order[is_mate][0]], abs=1e-6)
        # TinyFace's compute_AP, position by position.
        area, recall, precision, mates = 0.0, 0.0, 1.0, 0
        for position, hit in enumerate(is_mate, 1):
            mates += int(hit)
            area += (mates / is_mate.sum() - recall) * (precision + mates / position) / 2
            recall, precision = mates / is_mate.sum(), mates / position
        assert found.average_precisions[probe] == pytest.approx(area)
    assert 0 < found.rank(1) < found.rank(5) <= found.rank(20) <= 1
    assert found.rank(5) == np.mean([0 < rank <= 5 for rank in found.mate_ranks[probe_ids < 20]])
    assert found.mean_average_precision == pytest.approx(np.nanmean(found.average_precisions))


def test_search_counts_a_tie_against_the_own_person():
    same = np.tile(np.float32([[1, 0]]), (4, 1))
    found = search(same[:1], np.array([7]), same, np.array([7, 7, 8, 9]))
    assert found.mate_ranks.tolist() == [3] and found.rank(1) == 0
    assert found.average_precisions[0] == pytest.approx(((0 / 2 + 1 / 3) + (1 / 3 + 2 / 4)) / 4)


@pytest.mark.parametrize("fpir", [0.5, 0.1, 1 / 30])
def test_tpir_is_the_largest_of_all_thresholds(people, fpir):
    probes, probe_ids, gallery, gallery_ids = people
    found = search(*people)
    scores = probes @ gallery.T
    mated = probe_ids < 20
    best = 0.0
    for threshold in np.unique(scores):
        if np.mean(scores[~mated].max(axis=1) > threshold) <= fpir:
            first = gallery_ids[scores[mated].argmax(axis=1)] == probe_ids[mated]
            best = max(best, float(np.mean(first & (scores[mated].max(axis=1) > threshold))))
    assert 0 < best < 1
    assert found.tpir_at_fpir(fpir) == pytest.approx(best)
    threshold = found.threshold_at_fpir(fpir)
    assert np.mean(found.other_scores[~found.is_mated] > threshold) == pytest.approx(fpir)
    fpirs, tpirs = found.tpir_curve()
    assert tpirs[np.argmin(np.abs(fpirs - fpir))] == pytest.approx(best)


def test_tpir_is_unknown_with_too_few_strangers(people):
    found = search(*people)  # 30 probes are of people who are not in the gallery
    assert found.tpir_at_fpir(0.01) is None and found.threshold_at_fpir(0.01) is None
    mated = people[1] < 20
    closed = search(people[0][mated], people[1][mated], *people[2:])
    assert closed.tpir_at_fpir(0.5) is None


def test_aggregate_templates_equals_loops():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5)).astype(np.float32)
    templates, media = rng.integers(3, 9, 40) * 10, rng.integers(0, 4, 40)
    names, found = aggregate_templates(features, templates, media)
    assert names.tolist() == sorted(set(templates))
    for name, vector in zip(names, found, strict=True):
        total = np.zeros(5)
        for medium in set(media[templates == name]):
            total += features[(templates == name) & (media == medium)].mean(axis=0)
        np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-6)


def test_aggregate_templates_of_a_known_answer():
    """A video of two frames counts as one medium beside a photograph: (0, 2) + (3, 0), not (0, 4) + (3, 0)."""
    features = np.array([[0, 3], [0, 1], [3, 0], [5, 0]], np.float32)
    names, found = aggregate_templates(features, np.array([1, 1, 1, 2]), np.array([8, 8, 9, 8]))
    assert names.tolist() == [1, 2]
    np.testing.assert_allclose(found, [[3 / 13**0.5, 2 / 13**0.5], [1, 0]], rtol=1e-6)


def test_pair_scores_equal_single_products(monkeypatch):
    rng = np.random.default_rng(1)
    vectors = unit_rows(rng, 9)
    first, second = rng.integers(0, 9, (2, 50))
    monkeypatch.setattr(identification, "_BLOCK_SCORES", 4 * 8 * 7)
    expected = [vectors[a] @ vectors[b] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(pair_scores(vectors, first, second), expected, atol=1e-6)
