import numpy as np
import pytest

from util.data.sampler import BalancedSampler, SampleRng


def test_sampler_draws_every_class_equally_often():
    labels = np.repeat([0, 1, 2], [2, 8, 90])
    shuffle = np.random.default_rng(0).permutation(100)
    labels = labels[shuffle]
    sampler = BalancedSampler(labels, 30, seed=1)
    drawn = np.concatenate([sampler.order(epoch) for epoch in range(400)])
    assert len(sampler.order(0)) == 100
    assert len(drawn) == 40000
    counts = np.bincount(drawn, minlength=100)
    expected = 40000 / 3 / np.bincount(labels)[labels]
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_sampler_follows_the_order_and_drops_the_partial_batch():
    sampler = BalancedSampler(np.repeat([0, 1], [4, 6]), 3, seed=1)
    sampler.epoch = 2
    batches = list(sampler)
    assert len(sampler) == len(batches) == 3
    assert [batch.start for batch in batches] == [0, 3, 6]
    assert {batch.epoch for batch in batches} == {2}
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), sampler.order(2)[:9])


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_sampler_starts_within_an_epoch(start_step):
    full, rest = (BalancedSampler(np.arange(12) % 3, 2, seed=1, rank=1, world_size=2) for _ in range(2))
    rest.start_step = start_step
    batches = list(rest)
    assert len(rest) == 3 and len(batches) == 3 - start_step
    for batch, expected in zip(batches, list(full)[start_step:], strict=True):
        assert batch.start == expected.start
        np.testing.assert_array_equal(batch.indices, expected.indices)


def test_order_depends_on_seed_and_epoch_only():
    labels = np.repeat([0, 1], [40, 60])
    one, same, other = (BalancedSampler(labels, 8, seed) for seed in (1, 1, 2))
    list(one)  # earlier draws do not matter
    np.testing.assert_array_equal(one.order(5), same.order(5))
    assert (one.order(5) != one.order(6)).any()
    assert (one.order(5) != other.order(5)).any()


@pytest.mark.parametrize("steps", [None, 4])
def test_ranks_split_the_batches_of_one_process(steps):
    labels = np.repeat([0, 1, 2], [4, 6, 15])  # 25 images fill 4 global batches of 6
    alone = BalancedSampler(labels, 6, seed=1, steps=steps)
    ranks = [BalancedSampler(labels, 2, seed=1, steps=steps, rank=rank, world_size=3) for rank in range(3)]
    for sampler in (alone, *ranks):
        sampler.epoch = 5
        assert len(sampler) == len(list(sampler)) == 4
    for step, batch in enumerate(alone):
        local = [list(sampler)[step] for sampler in ranks]
        assert [part.start for part in local] == [batch.start + 2 * rank for rank in range(3)]
        assert {part.epoch for part in local} == {5}
        np.testing.assert_array_equal(np.concatenate([part.indices for part in local]), batch.indices)


@pytest.mark.parametrize(("images", "steps"), [(11, 1), (12, 2), (13, 2), (17, 2), (18, 3)])
def test_ranks_make_the_same_number_of_steps(images, steps):
    labels = np.arange(images) % 2
    assert [len(list(BalancedSampler(labels, 3, seed=0, rank=rank, world_size=2))) for rank in range(2)] == [steps] * 2


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_sampler_refuses_a_rank_out_of_range(rank, world_size):
    with pytest.raises(ValueError, match=rf"rank {rank} of {world_size}"):
        BalancedSampler(np.arange(4), 1, seed=0, rank=rank, world_size=world_size)


def test_sample_rng_depends_on_seed_epoch_and_position_only():
    one, same = SampleRng(3, 4), SampleRng(3, 4)
    expected = [one.for_sample(position).random(6) for position in range(5)]
    same.for_sample(2).integers(
        7, size=3, dtype=np.uint32
    )  # leaves half of a 64-bit number, which must not be used later
    for position in (4, 1, 1, 3, 0, 2):
        np.testing.assert_array_equal(same.for_sample(position).random(6), expected[position])
    first = same.for_sample(1).integers(1 << 30, size=3, dtype=np.uint32)
    np.testing.assert_array_equal(same.for_sample(1).integers(1 << 30, size=3, dtype=np.uint32), first)
    for other in (SampleRng(3, 5), SampleRng(4, 4), SampleRng(2**32 - 1, 2**40)):
        assert (other.for_sample(0).random(6) != expected[0]).all()


def test_sample_rng_of_neighbors_is_independent():
    rng = SampleRng(0, 0)
    table = np.array([rng.for_sample(position).random(8) for position in range(4000)])
    assert len(np.unique(table)) == table.size
    assert (np.abs(table.mean(axis=0) - 0.5) < 5 * np.sqrt(1 / 12 / 4000)).all()
    correlations = np.corrcoef(np.concatenate([table[1:], table[:-1]], axis=1).T) - np.eye(16)
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


def test_sample_rng_of_a_long_draw_stays_in_its_sample():
    rng = SampleRng(1, 1)
    assert not np.isin(rng.for_sample(1).random(4), rng.for_sample(0).random(100_000)).any()
