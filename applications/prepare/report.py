"""Findings of a check about one set, for the console and for a report in JSON."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from applications.prepare.channel_order import describe_channel_order

SHOWN = 10  # names on the console
KEPT = 100_000  # names in the report: a set may be damaged completely


@dataclass
class Findings:
    """Findings about one set.

    `errors` would stop training or validation, `warnings` would not. `details` are only in the report.
    """

    kind: str
    path: str
    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def list_names(self, key: str, names: list[str]) -> str:
        """Keep names for the report under `key`, and return the first ones, one on each line, for the console."""
        self.details[key] = names[:KEPT]
        shown = names[:SHOWN]
        if len(names) > SHOWN:
            shown = [*shown, f"and {len(names) - SHOWN} more"]
        return "".join(f"\n      {name}" for name in shown)

    def describe_colors(self, orders: np.ndarray, swapped: list[str]) -> None:
        """Add the channel orders (N,) of the images, and the names of those that look swapped."""
        fact, warning = describe_channel_order(orders)
        self.facts.append(fact)
        names = self.list_names("red and blue swapped", swapped)
        if warning:
            self.warnings.append(f"{warning}:{names}")

    def lines(self) -> list[str]:
        """Return the lines for the console."""
        warnings = [f"warning: {text}" for text in self.warnings]
        errors = [f"ERROR: {text}" for text in self.errors]
        return [f"{self.path} ({self.kind})", *(f"  {text}" for text in [*self.facts, *warnings, *errors])]
