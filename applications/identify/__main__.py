"""Name the faces in photographs and videos. From the repository root:

    python -m applications.identify --gallery people --network net.onnx --out named PHOTO.jpg VIDEO.mp4 FOLDER
    python -m applications.identify --gallery embeddings.npz --network net.onnx --far 0.001 --out named PHOTO.jpg
    python -m applications.identify --gallery people --network Backbone_Best.pth --threshold 0.4 --out named PHOTO.jpg

GALLERY holds photographs of the known people, PEOPLE/NAME/IMAGE, or is a file of applications.embed. A new person is a
new folder: nothing is trained. Each face gets the name of the nearest face of the gallery, if their cosine is above a
threshold, and stays unknown otherwise. The threshold follows from --far, the fraction of strangers that may get a name
by mistake, by a calibration (applications.calibrate), or is given with --threshold.

OUT gets each photograph and video with boxes and names, and faces.json and faces.csv with every face.
"""

from dataclasses import dataclass
from pathlib import Path

from util.cli.options import GROUPS, PhotographSettings
from util.cli.parser import PATHS, option, parse
from util.cli.types import integer, number, to_file
from util.errors import DataError, UsageError, run_script
from util.files import require_writable_dir


def _to_files(value: object) -> tuple[Path, ...]:
    """Return the paths of several files."""
    if not isinstance(value, list | tuple):
        raise ValueError("a list of photographs, videos or folders")
    return tuple(map(to_file, value))


@dataclass(frozen=True, kw_only=True)
class Flags(PhotographSettings):
    """The settings of applications.identify."""

    probes: tuple[Path, ...] = option(
        PATHS,
        default=(),
        type=_to_files,
        metavar="PROBE ...",
        help="photographs, videos, and folders of them",
        required=True,
        positional=True,
        split_words=True,
    )
    gallery: Path | None = option(
        PATHS, type=to_file, metavar="PEOPLE", help="known people: a folder, or embeddings", required=True
    )
    out: Path | None = option(PATHS, type=to_file, metavar="DIR", help="folder for the results", required=True)
    far: float = option(
        "Identity",
        default=0.01,
        type=number("a number above 0 and below 1", lambda far: 0 < far < 1),
        help="fraction of strangers that may get a name by mistake",
    )
    threshold: float | None = option(
        "Identity",
        type=number("a cosine from -1 to 1", lambda cosine: -1 <= cosine <= 1),
        help="least cosine for a name",
        default_help="from --far and the calibration",
    )
    every: int = option("Data", default=1, type=integer(1), help="of a video, search every N-th frame for faces")


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.identify", arguments, groups=GROUPS, description=__doc__)
    assert flags.gallery and flags.out
    require_writable_dir("--out", flags.out)

    # torch takes seconds to import: report mistakes in the command line first.
    from applications.identify.media import find_probes, identify_all
    from applications.recognizer import CALIBRATE, Recognizer
    from util.image_tree import printable

    recognizer = Recognizer.from_settings(flags)
    if recognizer.calibration is None and flags.threshold is None:
        raise UsageError(
            f"--calibration: missing, and {recognizer.file.name} holds none. {CALIBRATE}, or give --threshold."
        )
    probes = find_probes(flags.probes, flags.out)
    if not probes:
        raise DataError(f"{printable(flags.probes[0])}: no photograph and no video in it. Name some.")
    print(f"{recognizer.file}: {recognizer.network.describe()}", flush=True)
    gallery = recognizer.enroll(flags.gallery)
    print(f"gallery: {len(gallery)} faces of {len(set(gallery.names))} people")
    if flags.threshold is not None:
        threshold = flags.threshold
        print(f"a name needs a cosine of {threshold:.4f}")
    else:
        threshold = recognizer.threshold(flags.far, len(gallery))
        print(f"a name needs a cosine of {threshold:.4f}, which at most {flags.far:.2%} of strangers reach by mistake")
    counts = identify_all(recognizer, gallery, probes, threshold=threshold, out=flags.out, every=flags.every)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    print(f"results: {printable(flags.out)}/faces.csv, faces.json, and the images with names")


if __name__ == "__main__":
    run_script(main)
