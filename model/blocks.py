"""Blocks of rows: a large matrix is processed a few rows at a time, so that temporary results stay small."""

from collections.abc import Iterator, Mapping

from torch import Tensor


def row_blocks(matrix: Tensor, block_size: Mapping[str, int]) -> Iterator[slice]:
    """Yield slices that cover the rows of a matrix.

    Args:
        matrix: (R, C).
        block_size: elements in a block by device type; "cuda" also serves devices that are not listed. A block has one
            row at least.
    """
    elements = block_size.get(matrix.device.type, block_size["cuda"])
    rows = max(1, elements // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        yield slice(start, start + rows)
