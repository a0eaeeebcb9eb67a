"""Find wrong labels, duplicates and people of a verification set in a training set, with a trained network.

    python -m applications.prepare.clean --data data/imgs --network RUN --findings findings.csv --report findings.html
    python -m applications.prepare.clean --data data/imgs --network RUN --against data/lfw.bin pairs.txt:faces other_set
    python -m applications.prepare.clean --data data/imgs --from_findings findings.csv --copy_to data/imgs_clean

The training set is a folder of people or a .rec file. It is only read. Look at the page, delete the lines of the list
that are wrong, and let the last command copy the set without the rest. With --network, --copy_to leaves out all that
was found. docs/data.md explains what is found and how thresholds are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from applications.prepare.clean_list import KINDS, read_list, write_list
from util.cli.options import NetworkSettings, eval_batch_size, eval_crop, gpus, precision
from util.cli.parser import option, parse
from util.cli.types import number, to_file
from util.console import logger
from util.errors import DataError, UsageError, run_script
from util.files import require_writable_dir, require_writable_file

if TYPE_CHECKING:
    from applications.prepare.clean_report import CleaningReport
    from util.data.loader import TrainingImages

RATE = number("a number above 0 and below 1", lambda value: 0 < value < 1)
SHOWN = 5  # findings of each kind on the console


def _to_words(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value)) if isinstance(value, list | tuple) else ()


def _to_kinds(value: object) -> tuple[str, ...]:
    words = _to_words(value)
    if not words or not set(words) <= set(KINDS):
        raise ValueError(f"a list of {', '.join(KINDS)}")
    return words


@dataclass(frozen=True, kw_only=True)
class Flags(NetworkSettings):
    """The settings of applications.prepare.clean."""

    data: Path = option(type=to_file, help="training set: a folder of people or a .rec file", required=True)
    network: Path | None = option(type=to_file, help="run, Backbone file, or network of another project")
    against: tuple[str, ...] = option(
        default=(),
        type=_to_words,
        metavar="SET ...",
        help="verification sets, whose people should not be in it: bcolz folder, .bin, LIST:ROOT, or folder of people",
        split_words=True,
    )
    from_findings: Path | None = option(
        type=to_file, metavar="FILE.csv", help="take the findings of an earlier --findings"
    )
    findings: Path | None = option(type=to_file, metavar="FILE.csv", help="write what is found, a line each")
    report: Path | None = option(type=to_file, metavar="FILE.html", help="write a page with pictures of what is found")
    copy_to: Path | None = option(type=to_file, metavar="DIR", help="new folder for a copy without what is found")
    remove: tuple[str, ...] = option(
        default=KINDS, type=_to_kinds, metavar="KIND ...", help="what is left out of the copy", split_words=True
    )
    own_far: float = option(
        default=1e-3, type=RATE, help="an image is doubtful if a stranger would fit its person as well at this FAR"
    )
    far: float | None = option(
        type=RATE,
        help="false accept rate of a comparison with other people",
        default_help="one expected false accept in each search",
    )
    eval_crop: str | None = eval_crop()
    gpu_num: tuple[int, ...] = gpus()
    precision: str = precision()
    batch_size: int | None = eval_batch_size()


def main(arguments: list[str]) -> None:
    program = "-m applications.prepare.clean"
    flags = parse(Flags, program, arguments, groups=("Settings",), description=__doc__, check=check_flags)
    # torch takes seconds to import: import it after the command line was read without an error.
    from util.data.loader import open_training_images

    images = open_training_images(flags.data)
    if flags.from_findings:
        rows = read_list(flags.from_findings)
    else:
        from util.html_page import write_page

        report = make_report(images, flags)
        logger.info(report.text(SHOWN))
        rows = report.rows()
        if flags.findings:
            write_list(flags.findings, rows)
            logger.info(f"findings: {flags.findings}")
        if flags.report:
            write_page(flags.report, report.page())
            logger.info(f"report: {flags.report}")
    if flags.copy_to:
        from applications.prepare.clean_copy import copy_without

        copy_without(
            images, [row for row in rows if row.kind in flags.remove], flags.copy_to, source=flags.from_findings
        )


def check_flags(flags: Flags) -> None:
    """Raise UsageError if flags do not fit together, or a destination cannot be written."""
    if (flags.network is None) == (flags.from_findings is None):
        raise UsageError("--network: give either a network or --from_findings.")
    if flags.from_findings and not flags.copy_to:
        raise UsageError("--from_findings: is used with --copy_to. Add it.")
    for flag, file in (("--findings", flags.findings), ("--report", flags.report)):
        if file and flags.from_findings:
            raise UsageError(f"{flag}: is used with --network. Leave it or --from_findings out.")
        if file:
            require_writable_file(flag, file)
    if flags.copy_to:
        if flags.copy_to.exists():
            raise UsageError(f"--copy_to={flags.copy_to}: is there already. Name a new folder.")
        if flags.copy_to.resolve().is_relative_to(flags.data.resolve()):
            raise UsageError(f"--copy_to={flags.copy_to}: lies in the training set. Name another folder.")
        require_writable_dir("--copy_to", flags.copy_to.parent)


def make_report(images: TrainingImages, flags: Flags) -> CleaningReport:
    """Embed the training set, and the verification sets, and search."""
    import numpy as np

    from applications.prepare.clean_find import TrainingSet
    from applications.prepare.clean_report import CleaningReport, FingerprintedImages, open_verification
    from util.device import resolve_dtype, select_devices
    from util.embedding import embed_images
    from util.public_networks import open_network

    devices = select_devices(flags.gpu_num)
    dtype = resolve_dtype(flags.precision, devices[0])
    assert flags.network is not None
    _, network = open_network(flags.network, flags.channel_order, flags.input_scale, crop=flags.eval_crop)
    verification = [open_verification(text) for text in flags.against]

    fingerprinted = FingerprintedImages(images)
    embedded = embed_images(network, fingerprinted, devices, flags.batch_size, dtype=dtype)
    kept, labels = np.unique(images.labels[embedded.indices], return_inverse=True)
    if len(kept) < 2:
        raise DataError(f"{flags.data}: images of {len(kept)} people can be read. Restore the others.")
    report = CleaningReport(images, embedded.indices, kept, TrainingSet(embedded.embeddings, labels, flags.own_far))
    report.search(fingerprinted, own_far=flags.own_far, far=flags.far)
    for others in verification:
        report.search_verification(
            others, embed_images(network, others, devices, flags.batch_size, dtype=dtype), far=flags.far
        )
    return report


if __name__ == "__main__":
    run_script(main)
