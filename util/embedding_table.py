"""Files of embeddings: .npz for numpy, .parquet for databases and data frames. Both hold the same.

names        (N,) IDENTITY/IMAGE.jpg, relative to the folder; bytes that are not UTF-8 are escaped
embeddings   (N, D) float32, L2-normalized; in Parquet the column `embedding`
quality      (N,) float32, the length of an embedding before that: low for faces that the network cannot tell
metadata     JSON: the network's file, its SHA-256, and what it was shown
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.errors import DataError
from util.files import atomic_write


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """The content of a file, as above."""

    names: Sequence[str]
    embeddings: np.ndarray
    quality: np.ndarray
    metadata: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write the table atomically, as the suffix of the path says."""
        metadata = json.dumps(dict(self.metadata))
        with atomic_write(path) as partial:
            if path.suffix == ".npz":
                names = np.array(self.names, dtype=str)
                with partial.open("wb") as file:  # numpy would add .npz to another name
                    np.savez(file, names=names, embeddings=self.embeddings, quality=self.quality, metadata=metadata)
                return
            import pyarrow
            import pyarrow.parquet

            width = self.embeddings.shape[1]
            vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(self.embeddings.ravel()), width)
            table = pyarrow.table({"name": list(self.names), "embedding": vectors, "quality": self.quality})
            pyarrow.parquet.write_table(table.replace_schema_metadata({"metadata": metadata}), partial)


def read_table(path: Path) -> EmbeddingTable:
    """Read a file of embeddings. Nothing in it is executed. Raise DataError for any other file."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                names, embeddings, quality, metadata = (
                    arrays[key] for key in ("names", "embeddings", "quality", "metadata")
                )
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            names = np.array(table["name"].to_pylist(), dtype=str)
            embeddings = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(names), -1)
            quality = table["quality"].to_numpy()
            metadata = table.schema.metadata[b"metadata"].decode()
        content = EmbeddingTable(names.tolist(), embeddings, quality=quality, metadata=json.loads(str(metadata)))
        if not (
            embeddings.dtype == np.float32
            and embeddings.ndim == 2
            and len(names) == len(embeddings) == len(quality) > 0
            and np.isfinite(embeddings).all()
            and isinstance(content.metadata, dict)
        ):
            raise ValueError("its parts do not fit together")
        return content
    except Exception as error:  # numpy, zipfile and pyarrow raise all kinds for a damaged file
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{path}: not embeddings that can be read ({reason}). Make them with python -m applications.embed."
        ) from None
