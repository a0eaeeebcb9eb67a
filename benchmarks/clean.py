"""Measure what applications.prepare.clean finds: errors of known number are put into a set of real faces.

python -m benchmarks.clean --data LFW/aligned_112 --network mobilefacenet.pth --gpu_num cpu
python -m benchmarks.clean --scale                       # time and memory of the searches in 500,000 made embeddings

Each experiment is repeated with several seeds. The set has errors of its own, which count as false findings here: the
first lines are what is found before anything is changed.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.cli.options import gpus
from util.cli.parser import Settings, flag, option, parse
from util.cli.types import integer, to_file
from util.errors import UsageError, run_script
from util.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

OWN_FAR = 1e-3  # the default of the program


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    data: Path | None = option(type=to_file, metavar="DIR", help="folder of people with aligned faces")
    network: Path | None = option(type=to_file, help="run, Backbone file, or network of another project")
    embeddings: Path | None = option(
        type=to_file, metavar="FILE.npz", help="file that keeps the embeddings for the next run"
    )
    seeds: int = option(default=5, type=integer(1), help="number of repetitions")
    gpu_num: tuple[int, ...] = gpus()
    scale: bool = flag(help="measure time and memory with made embeddings instead")


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m benchmarks.clean", arguments, description=__doc__)
    if flags.scale:
        measure_scale()
        return
    if flags.data is None or flags.network is None:
        raise UsageError("--data, --network: missing. Give both, or --scale.")

    import cv2
    import numpy as np

    from applications.prepare.clean_find import THUMBNAIL, TrainingSet
    from applications.prepare.clean_list import MISLABELED
    from applications.prepare.clean_report import FingerprintedImages
    from util.checkpoint.run_dir import find_backbone
    from util.data.image_folder import ImageFolder
    from util.device import select_devices
    from util.embedding import embed_images
    from util.public_networks import read_public_network
    from util.training.report import format_table

    devices = select_devices(flags.gpu_num)
    network = read_public_network(find_backbone(flags.network, flag="--network"))
    images = ImageFolder(flags.data)
    if flags.embeddings is None or not flags.embeddings.exists():
        fingerprinted = FingerprintedImages(images)
        embedded = embed_images(network, fingerprinted, devices, strict=True)
        kept = {
            "embeddings": embedded.embeddings,
            "hashes": fingerprinted.hashes,
            "thumbnails": fingerprinted.thumbnails,
        }
        if flags.embeddings is not None:
            with atomic_write(flags.embeddings) as partial:
                np.savez(partial, allow_pickle=False, **kept)
    else:
        kept = dict(np.load(flags.embeddings))
    counts = np.bincount(images.labels)
    with_others = np.flatnonzero(counts[images.labels] > 1)  # images of people with two or more
    print(
        f"{len(images):,} images of {len(counts):,} people; {len(with_others):,} of {(counts > 1).sum()} with several"
    )

    unchanged = TrainingSet(kept["embeddings"], images.labels, OWN_FAR)
    found = [finding.kind for finding in unchanged.find_mislabeled(None)[0] + unchanged.find_two_names(None)[0]]
    found += [finding.kind for finding in unchanged.find_duplicates(kept["hashes"], kept["thumbnails"])]
    scores = unchanged.embeddings @ unchanged.centers.T
    counted = np.quantile(scores[images.labels[:, None] != np.arange(len(counts))], 1 - 1e-5)
    print(f"cosine at a FAR of 1e-5: {unchanged.thresholds.at(1e-5):.3f} by the line, {counted:.3f} by counting")
    print("found before a change:", {kind: found.count(kind) for kind in sorted(set(found))})

    # Wrong labels: images get the label of a random other person.
    _, people = np.unique(images.labels[with_others], return_inverse=True)
    embeddings = kept["embeddings"][with_others]
    rows = [["wrong labels", "number", "precision", "recall", "right person", "with outliers: precision", "recall"]]
    for fraction in (0.01, 0.05, 0.2):
        runs = []
        for seed in range(flags.seeds):
            rng = np.random.default_rng(seed)
            wrong = rng.choice(len(people), round(fraction * len(people)), replace=False)
            labels = people.copy()
            shift = rng.integers(1, people.max() + 1, len(wrong))
            labels[wrong] = (labels[wrong] + shift) % (people.max() + 1)
            names, labels = np.unique(labels, return_inverse=True)  # a person may have lost all images
            findings, _ = TrainingSet(embeddings, labels, OWN_FAR).find_mislabeled(None)
            mislabeled = {
                finding.image: names[finding.other_person] for finding in findings if finding.kind == MISLABELED
            }
            hits = mislabeled.keys() & set(wrong.tolist())
            right = sum(mislabeled[image] == people[image] for image in hits) / len(hits)
            doubted = {finding.image for finding in findings}
            both = len(doubted & set(wrong.tolist()))
            precision, recall = len(hits) / len(mislabeled), len(hits) / len(wrong)
            runs.append([precision, recall, right, both / len(doubted), both / len(wrong)])
        rows.append([f"{fraction:.0%}", str(len(wrong)), *_mean_and_deviation(runs)])
    print(f"\n{format_table(rows)}")

    # People under two names: half of the images of a person get a new name.
    splittable = np.flatnonzero(np.bincount(people) >= 2)
    runs = []
    for seed in range(flags.seeds):
        rng = np.random.default_rng(seed)
        split = rng.choice(splittable, 50, replace=False)
        labels = people.copy()
        for number, person in enumerate(split):
            own = rng.permutation(np.flatnonzero(people == person))
            labels[own[: len(own) // 2]] = people.max() + 1 + number
        pairs, _ = TrainingSet(embeddings, labels, OWN_FAR).find_two_names(None)
        truth = {(int(people.max()) + 1 + number, int(person)) for number, person in enumerate(split)}
        claimed = {(max(pair), min(pair)) for pair in ((finding.person, finding.other_person) for finding in pairs)}
        runs.append([len(claimed & truth) / len(claimed), len(claimed & truth) / len(truth)])
    rows = [["experiment", "number", "precision", "recall"], ["two names", "50", *_mean_and_deviation(runs)]]

    # Copies: JPEG of quality 40, every second one mirrored and darker, in the folder of a random person.
    originals = np.random.default_rng(0).choice(with_others, 200, replace=False)
    copies = _Copies(images, originals)
    copied = embed_images(network, copies, devices, strict=True)
    thumbnails = []
    for index in range(len(copies)):
        gray = cv2.cvtColor(copies.image(index), cv2.COLOR_RGB2GRAY)
        thumbnails.append(cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA))
    runs = []
    for seed in range(flags.seeds):
        strangers = np.random.default_rng(seed).integers(0, len(counts), len(copies))
        grown = TrainingSet(
            np.concatenate([kept["embeddings"], copied.embeddings]), np.append(images.labels, strangers), OWN_FAR
        )
        hashes = np.append(kept["hashes"], np.arange(len(copies), dtype=np.uint64))
        findings = grown.find_duplicates(hashes, np.concatenate([kept["thumbnails"], thumbnails]))
        claimed_copies = {finding.image for finding in findings}
        hits = claimed_copies & set(range(len(images), len(images) + len(copies)))
        runs.append([len(hits) / len(claimed_copies), len(hits) / len(copies)])
    rows.append(["copies with another person", str(len(copies)), *_mean_and_deviation(runs)])

    # A verification set of one image of every second person, which the training set lacks, and of strangers.
    runs = []
    for seed in range(flags.seeds):
        rng = np.random.default_rng(seed)
        shared = rng.choice(people.max() + 1, (people.max() + 1) // 2, replace=False)
        taken = np.array([rng.choice(np.flatnonzero(people == person)) for person in shared])
        rest = np.setdiff1d(np.arange(len(people)), taken)
        singles = np.flatnonzero(counts[images.labels] == 1)
        templates = np.concatenate([embeddings[taken], kept["embeddings"][singles]])
        training = TrainingSet(embeddings[rest], people[rest], OWN_FAR)
        findings, _ = training.find_verification_people(templates, np.arange(len(templates)), None)
        claimed_people = {finding.person for finding in findings}
        hit_people = claimed_people & set(shared.tolist())
        runs.append([len(hit_people) / len(claimed_people), len(hit_people) / len(shared)])
    rows.append(["people of a verification set", str(len(shared)), *_mean_and_deviation(runs)])
    print(f"\n{format_table(rows)}")


class _Copies:
    """Images as copies: compressed strongly, every second one mirrored and darker."""

    def __init__(self, images: object, originals: np.ndarray):
        self._images = images
        self._originals = originals

    def __len__(self) -> int:
        return len(self._originals)

    def image(self, index: int) -> np.ndarray:
        """Return a copy, (S, S, 3) RGB uint8."""
        import cv2
        import numpy as np

        image = self._images.image(int(self._originals[index]))  # type: ignore[attr-defined]
        if index % 2:
            image = (image[:, ::-1] * 0.8).astype(np.uint8)
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
        return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


def _mean_and_deviation(runs: list[list[float]]) -> list[str]:
    """Return "mean ± deviation" of each column over the repetitions."""
    import numpy as np

    return [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(np.mean(runs, axis=0), np.std(runs, axis=0), strict=True)]


def measure_scale(images: int = 500_000, people: int = 10_000, size: int = 512) -> None:
    """Time the searches in made embeddings, and print the memory that they need without the embeddings."""
    import numpy as np

    from applications.prepare.clean_find import THUMBNAIL, TrainingSet

    rng = np.random.default_rng(0)
    labels = rng.integers(0, people, images)
    centers = rng.normal(size=(people, size)).astype(np.float32)
    embeddings = np.empty((images, size), np.float32)
    for start in range(0, images, 10_000):
        block = slice(start, start + 10_000)
        embeddings[block] = centers[labels[block]] + rng.normal(size=(len(labels[block]), size)).astype(np.float32)
        embeddings[block] /= np.linalg.norm(embeddings[block], axis=1, keepdims=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{images:,} images of {people:,} people, {size} numbers each: {embeddings.nbytes / 1e9:.1f} GB")
    start_time = time.process_time()
    training = TrainingSet(embeddings, labels, OWN_FAR)
    print(f"centers and most similar people: {time.process_time() - start_time:.0f} s of CPU time")
    searches = {
        "wrong labels": lambda: training.find_mislabeled(None),
        "two names": lambda: training.find_two_names(None),
        "copies": lambda: training.find_duplicates(
            np.arange(images, dtype=np.uint64), np.zeros((images, THUMBNAIL, THUMBNAIL), np.uint8)
        ),
    }
    for name, search in searches.items():
        start_time = time.process_time()
        search()
        print(f"{name}: {time.process_time() - start_time:.0f} s of CPU time")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory without the embeddings: {(after - before) / 1e6:.2f} GB")


if __name__ == "__main__":
    run_script(main)
