"""Blocks of rows: a large matrix is processed a few rows at a time, so that temporary results stay small."""

from collections.abc import Iterator, Mapping

from torch import Tensor


def row_blocks(matrix: Tensor, block_size: Mapping[str, int]) -> Iterator[slice]:
    """Yield slices over the rows of a matrix (R, C), each of at least one row.

    `block_size` has the number of elements in a block by device type; "cuda" also serves types that are not listed.
    """
    elements = block_size.get(matrix.device.type, block_size["cuda"])
    rows = max(1, elements // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        yield slice(start, start + rows)
