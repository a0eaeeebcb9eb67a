"""Measure ten-fold verification of embeddings, compared with a loop over folds and thresholds.

python -m benchmarks.verification
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks import baseline
from benchmarks.timing import Benchmark, TimingFlags, report, time_alternately, time_row, use_threads
from util.cli.parser import option, parse
from util.cli.types import integer
from util.device import num_cpus
from util.errors import RunError, run_script
from util.verification import verify

DIMENSIONS = 512


@dataclass(frozen=True, kw_only=True)
class Flags(TimingFlags):
    """The settings of this benchmark."""

    threads: int = option(
        default=min(2, num_cpus()), type=integer(1, num_cpus()), metavar="N", help="threads of each operation"
    )
    repeats: int = option(default=9, type=integer(1), metavar="N", help="measured turns, after one of warming up")
    pairs: int = option(default=6000, type=integer(1), metavar="N", help="pairs; LFW has 6000")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.verification", arguments, description=__doc__, check=TimingFlags.check)
    report(measure(200 if options.quick else options.pairs, options.threads, options.repeats), options.json)


def measure(pairs: int, threads: int, repeats: int) -> Benchmark:
    """Measure milliseconds with one thread and with `threads`. Raise RunError if the two accuracies differ."""
    embeddings, issame = random_pairs(pairs)
    ours = verify(embeddings, issame).accuracy
    theirs = baseline.verify(embeddings, issame)
    if abs(ours - theirs) > 1e-9:
        raise RunError(f"our accuracy is {ours}, the baseline's is {theirs}. One of them is wrong.")
    rows = []
    for count in sorted({1, threads}):
        use_threads(count)
        times = time_alternately(
            partial(verify, embeddings, issame), partial(baseline.verify, embeddings, issame), repeats
        )
        rows.append(time_row(f"threads: {count}", times))
    setting = f"{pairs} pairs of {DIMENSIONS} dimensions, ten folds, 400 thresholds, median of {repeats} turns"
    return Benchmark("verification", setting, tuple(rows))


def random_pairs(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (2P, 512) float32 and (P,) bool. Every other pair is a vector and a noisy copy of it."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((2 * pairs, DIMENSIONS)).astype(np.float32)
    issame = np.arange(pairs) % 2 == 0
    embeddings[1::2][issame] = embeddings[0::2][issame] + 1.7 * embeddings[1::2][issame]
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), issame


if __name__ == "__main__":
    run_script(main)
