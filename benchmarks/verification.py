"""Measure ten-fold verification of embeddings, compared with a loop over folds and thresholds.

python -m benchmarks.verification
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks import baseline, timing
from util.cli.parser import option
from util.cli.types import integer
from util.device import num_cpus
from util.errors import RunError, run_script
from util.verification import verify

DIMENSIONS = 512


@dataclass(frozen=True, kw_only=True)
class Flags(timing.TimingFlags):
    """The settings of this benchmark."""

    threads: int = option(default=min(2, num_cpus()), **timing.THREADS)
    repeats: int = option(default=9, **timing.REPEATS)
    pairs: int = option(default=6000, type=integer(1), help="pairs; LFW has 6000")


def measure(options: Flags) -> timing.Benchmark:
    """Measure milliseconds with one thread and with --threads. Raise RunError if the two accuracies differ."""
    pairs = 200 if options.quick else options.pairs
    embeddings, issame = random_pairs(pairs)
    ours = partial(verify, embeddings, issame)
    theirs = partial(baseline.verify, embeddings, issame)
    if abs(ours().accuracy - theirs()) > 1e-9:
        raise RunError(f"our accuracy is {ours().accuracy}, the baseline's is {theirs()}. One of them is wrong.")
    rows = []
    for count in sorted({1, options.threads}):
        timing.use_threads(count)
        rows.append(timing.time_row(f"threads: {count}", timing.time_alternately(ours, theirs, options.repeats)))
    setting = f"{pairs} pairs of {DIMENSIONS} dimensions, ten folds, 400 thresholds, median of {options.repeats} turns"
    return timing.Benchmark("verification", setting, tuple(rows))


def random_pairs(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (2P, 512) float32 and (P,) bool. Every other pair is a vector and a noisy copy of it."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((2 * pairs, DIMENSIONS)).astype(np.float32)
    issame = np.arange(pairs) % 2 == 0
    embeddings[1::2][issame] = embeddings[0::2][issame] + 1.7 * embeddings[1::2][issame]
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), issame


main = timing.benchmark_main("verification", Flags, measure, __doc__)

if __name__ == "__main__":
    run_script(main)
