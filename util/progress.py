"""A progress bar for slow work before training begins."""

import sys
from collections.abc import Collection, Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Collection[Any], title: str, unit: str) -> Iterable[Any]:
    """Return the items with a bar on stderr, shown after 2 s and updated every 30 s if stderr is not a terminal."""
    seconds = 1 if sys.stderr.isatty() else 30
    return tqdm(items, title, unit=f" {unit}", unit_scale=True, delay=2, mininterval=seconds)
