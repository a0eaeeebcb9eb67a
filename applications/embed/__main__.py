"""Write the embeddings of all aligned faces below a folder to one file. From the repository root:

    python -m applications.embed --network Backbone_Best.pth --data data/imgs --out embeddings.npz
    python -m applications.embed --network net.onnx --data data/imgs --out embeddings.parquet --gpu_num=[0,1]

The file has the names of the images, their embeddings (float32, L2-normalized, with flip) and their quality: the length
of an embedding before that. numpy.load() reads .npz; pandas, DuckDB and Spark read .parquet. applications.identify
takes the file as a gallery. To continue an interrupted run, repeat the command: OUT.parts/ keeps finished images.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from util.cli.options import GROUPS, TrainedNetworkSettings, eval_batch_size
from util.cli.parser import PATHS, option, parse
from util.cli.types import EMBEDDING_SUFFIXES, to_file
from util.errors import DataError, UsageError, run_script
from util.files import Provenance, require_writable_dir
from util.parallel import resumable

IMAGES_IN_A_PART = 4096


@dataclass(frozen=True, kw_only=True)
class Flags(TrainedNetworkSettings):
    """The settings of applications.embed."""

    data: Path = option(
        PATHS, type=to_file, metavar="DIR", help="aligned faces, in folders of any depth", required=True
    )
    out: Path = option(PATHS, type=to_file, metavar="FILE", help="file to write: .npz or .parquet", required=True)
    batch_size: int | None = eval_batch_size()


@resumable
def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.embed", arguments, groups=GROUPS, description=__doc__)
    if flags.out.suffix not in EMBEDDING_SUFFIXES:
        raise UsageError(f"--out={flags.out}: must end in {' or '.join(EMBEDDING_SUFFIXES)}. Rename it.")
    if not flags.data.is_dir():
        raise UsageError(f"--data={flags.data}: no such folder. Name a folder of aligned faces.")
    require_writable_dir("--out", flags.out.absolute().parent)

    # torch takes seconds to import: report mistakes in the command line first.
    import numpy as np

    from util.data.folder_index import IMAGE_SUFFIXES
    from util.device import select_devices
    from util.embedding import ImageFiles, embed_files, warn_unless_aligned
    from util.embedding_table import EmbeddingTable, read_table
    from util.files import sha256
    from util.image_tree import printable, walk
    from util.public_networks import open_network

    devices = select_devices(flags.gpu_num)
    file, network = open_network(flags.network, flags.channel_order, flags.input_scale, crop=flags.eval_crop)
    parts = flags.out.with_name(f"{flags.out.name}.parts")
    paths = {
        printable(path.relative_to(flags.data)): path
        for folder, names in walk(flags.data, parts)
        for path in (flags.data / folder / name for name in names)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    }
    if not paths:
        raise DataError(f"--data={printable(flags.data)}: no image in it. Name a folder of aligned faces.")

    warn_unless_aligned(ImageFiles(list(paths.values())))

    # Continue: each part is a table of its own.
    made_with = {
        "network": printable(file.name),
        "sha256": sha256(file),
        "channel_order": network.channel_order,
        "input_scale": network.input_scale,
        "crop": network.crop,
    }
    require_writable_dir("--out", parts)
    Provenance(parts / "settings.json", made_with | {"data": str(flags.data.resolve())}).check_or_write(
        f"--out={flags.out}", f"Remove {parts} to start again."
    )
    tables = [read_table(part) for part in sorted(parts.glob("[0-9]*.npz"))]
    done = {name for table in tables for name in table.names}
    left = [name for name in paths if name not in done]
    if done:
        print(f"continuing: {len(paths) - len(left)} of {len(paths)} images are embedded already")
    unreadable = 0
    for chosen in np.array_split(np.array(left, dtype=object), -(-len(left) // IMAGES_IN_A_PART)) if left else ():
        embedded = embed_files(network, [paths[name] for name in chosen], devices, flags.batch_size)
        names = [str(chosen[index]) for index in embedded.indices]
        table = EmbeddingTable(names, embedded.embeddings, quality=embedded.norms, metadata=made_with)
        table.write(parts / f"{len(tables):06d}.npz")
        tables.append(table)
        unreadable += len(embedded.unreadable)

    # One file, in the order of the names. Images that were removed since an earlier start are left out.
    all_names = [name for table in tables for name in table.names]
    order = sorted((row for row, name in enumerate(all_names) if name in paths), key=all_names.__getitem__)
    names = [all_names[row] for row in order]
    embeddings = np.concatenate([table.embeddings for table in tables])[order]
    quality = np.concatenate([table.quality for table in tables])[order]
    EmbeddingTable(names, embeddings, quality=quality, metadata=made_with).write(flags.out)
    shutil.rmtree(parts)
    low, middle, high = np.percentile(quality, (1, 50, 99))
    print(f"{flags.out}: {len(names)} embeddings of {embeddings.shape[1]} numbers, {unreadable} images unreadable")
    print(f"quality: 1 % of the images are below {low:.3g}, half are below {middle:.3g}, 99 % are below {high:.3g}")


if __name__ == "__main__":
    run_script(main)
