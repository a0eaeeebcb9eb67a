"""Batches on their way to the device."""

from collections.abc import Iterable, Iterator

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on the device.

    A GPU works off what it is given while Python is already here again: the next batch is copied on a stream of its
    own, beside the step before it, and not after it. That needs batches in pinned memory; from other memory each copy
    waits. Nothing else here waits for the GPU.
    """
    if device.type != "cuda":
        yield from ((images.to(device), labels.to(device)) for images, labels in batches)
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        computing.wait_stream(copying)
        for tensor in (images, labels):
            tensor.record_stream(computing)  # else its memory would be given away while the step reads it
        yield images, labels
