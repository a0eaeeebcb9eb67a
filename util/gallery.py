"""People to be recognized: the embeddings of their faces, and exact search with FAISS."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Gallery:
    """N faces of known people: `names` (N,), and `embeddings` (N, D) float32, L2-normalized.

    A person may have several faces. A probe gets the name of the face that is nearest to it.
    """

    names: Sequence[str]
    embeddings: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _index(self) -> Any:
        """Return the index, which compares a probe with every face: 100,000 faces take milliseconds."""
        import faiss  # it takes half a second to import

        index = faiss.IndexFlatIP(self.embeddings.shape[1])
        index.add(np.ascontiguousarray(self.embeddings, np.float32))
        return index

    def nearest(self, embeddings: np.ndarray) -> list[tuple[str, float]]:
        """Return the name of the nearest face, and its cosine, for each of (M, D) L2-normalized embeddings."""
        cosines, places = self._index.search(np.ascontiguousarray(embeddings, np.float32), 1)
        return [(self.names[place], float(cosine)) for cosine, place in zip(cosines[:, 0], places[:, 0], strict=True)]
