"""Tell users of the old name `applications.lr_curve` where the program is now."""

import sys

print(
    "error: applications.lr_curve has moved. Run `python -m applications.resolution_curve` with the same flags.",
    file=sys.stderr,
)
sys.exit(2)
