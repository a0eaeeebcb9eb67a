"""What a long wait looks like before training begins."""

import sys
from collections.abc import Collection, Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Collection[Any], title: str, unit: str) -> Iterable[Any]:
    """The items one by one; after two seconds, a bar on stderr says how many are done: seldom where it is a file."""
    seconds = 1 if sys.stderr.isatty() else 30
    return tqdm(items, title, unit=f" {unit}", unit_scale=True, delay=2, mininterval=seconds)
