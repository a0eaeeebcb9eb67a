"""Console output: rank 0 prints everything, other ranks only warnings and errors, with their rank in front.

Use `logger.info` for what a program tells its user, on stdout, and `logger.warning` for what needs attention.
"""

import logging
import os
import sys

logger = logging.getLogger("face_recognition")


class _StdoutHandler(logging.Handler):
    """Print records to the present sys.stdout, which tests and progress bars may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
        prefix = "" if rank == "0" else f"[rank {rank}] "
        if prefix and record.levelno < logging.WARNING:
            return
        print(f"{prefix}{record.getMessage()}", file=sys.stdout, flush=True)


logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(_StdoutHandler())
