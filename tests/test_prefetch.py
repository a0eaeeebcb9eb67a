import pytest
import torch

from util.device import prefetch_to_device


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((4, 8, 8, 3), index, dtype=torch.uint8), torch.full((4,), index)) for index in range(count)]


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
@pytest.mark.parametrize("count", [0, 1, 5])
def test_all_batches_arrive_in_their_order(name, count):
    arrived = list(prefetch_to_device(batches(count), torch.device(name)))
    assert [(images.unique().tolist(), labels.unique().tolist()) for images, labels in arrived] == [
        ([index], [index]) for index in range(count)
    ]
    assert {tensor.device.type for batch in arrived for tensor in batch} <= {name}


def test_a_batch_is_asked_for_only_when_the_one_before_is_done():
    asked = []

    def noted():
        for index, batch in enumerate(batches(3)):
            asked.append(index)
            yield batch

    for index, _ in enumerate(prefetch_to_device(noted(), torch.device("cpu"))):
        assert asked == list(range(index + 1))
