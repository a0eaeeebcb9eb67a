"""What a check found out about one set, for the console and for a report in JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 10  # names on the console
KEPT = 100_000  # names in the report, for a set that is broken throughout


@dataclass
class Findings:
    """`errors`: what training or validation would fail on. `warnings`: what they would put up with. `details` are for
    the report only."""

    kind: str
    path: str
    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def list_names(self, key: str, names: list[str]) -> str:
        """Keeps names for the report under `key`, and gives the first ones, a line each, for the console."""
        self.details[key] = names[:KEPT]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        return "".join(f"\n      {name}" for name in [*names[:SHOWN], *more])

    def lines(self) -> list[str]:
        marked = [f"  warning: {text}" for text in self.warnings] + [f"  ERROR: {text}" for text in self.errors]
        return [f"{self.path} ({self.kind})", *(f"  {text}" for text in self.facts), *marked]

    def result_to_dict(self) -> dict[str, Any]:
        return asdict(self)
