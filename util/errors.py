"""The errors that a user can meet, and `run_script`, which ends every program in the same way.

A message is one line: `FLAG OR FILE: what is wrong. What to do.`
"""

import signal
import sys
from collections.abc import Callable

from util.console import logger

TERMINATED = 128 + signal.SIGTERM


class UsageError(ValueError):
    """A bad command line or setting."""


class DataError(ValueError):
    """A file or data set that cannot be used."""


class RunError(RuntimeError):
    """A run that cannot continue, although its command line and data are valid."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run main(arguments) and end the process: a failure prints one line on stderr, and a traceback only with --debug.

    Exit codes: 0 success, 2 bad command line, 3 bad data, 1 anything else, 130 or 143 after SIGINT or SIGTERM.
    Under torchrun each rank that fails prints its line, with its rank in front.
    """
    arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        main(arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        ignore_sigterm()
        sys.exit(_report(error))
    except KeyboardInterrupt:
        ignore_sigterm()
        print(file=sys.stderr)  # the terminal shows ^C on this line
        logger.error("Interrupted.")
        sys.exit(128 + signal.SIGINT)


def ignore_sigterm() -> None:
    """Ignore SIGTERM while the process reports its error: torchrun sends it to all ranks as soon as one rank fails."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _report(error: Exception) -> int:
    """Print the error in one line and return the exit code."""
    message = " ".join(str(error).split()) or "no message"
    code = 1
    if isinstance(error, UsageError):
        code = 2
    elif isinstance(error, DataError):
        code = 3
    elif not isinstance(error, RunError):
        message = f"{type(error).__name__}: {message} (run again with --debug for the traceback)"
    logger.error(f"error: {message}")
    return code


def _raise_terminated(signum: int, frame: object) -> None:
    sys.exit(TERMINATED)
