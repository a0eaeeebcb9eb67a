"""Console output: rank 0 prints everything, other ranks only warnings and errors, with their rank in front.

`logger.info` is for what a program reports to its user, `logger.warning` for what needs attention: both on stdout.
`logger.error` is for the reason why a program ends, on stderr.
"""

import errno
import logging
import os
import sys

logger = logging.getLogger("face_recognition")


class _ConsoleHandler(logging.Handler):
    """Print records to the current sys.stdout or sys.stderr, which tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        # LOCAL_RANK tells torchrun from other launchers, which set RANK alone.
        rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
        if rank != "0" and record.levelno < logging.WARNING:
            return
        prefix = "" if rank == "0" else f"[rank {rank}] "
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        # One write a line: processes share the terminal.
        try:
            stream.write(f"{prefix}{record.getMessage()}\n")
            stream.flush()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The terminal is closed. SIGHUP ends the program, which must not fail before it has saved its work.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(_ConsoleHandler())
