"""Tell users of the old name `applications.prepare.demo` where the program is now."""

import sys

print(
    "error: applications.prepare.demo has moved. Run `python -m applications.demo` with the same flags.",
    file=sys.stderr,
)
sys.exit(2)
