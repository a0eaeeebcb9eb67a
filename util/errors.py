"""What can go wrong in a user's hands, and the one way in which a program ends.

A message names the file or flag, the rule and the remedy, in one line.
"""

import signal
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A bad command line or setting."""


class DataError(ValueError):
    """A file or data set that cannot be used."""


class RunError(RuntimeError):
    """A run that cannot go on, through no fault of its command line or data."""


def run_script(main: Callable[[list[str]], None], say: Callable[[str], bool] = bool) -> None:
    """Runs main(arguments); every failure ends in one line on stderr, with a traceback only under --debug.

    `say(line)` tells whether to print it: of several processes that fail alike, one is to.
    Exit codes: 0 success, 2 bad command line, 3 bad data, 1 anything else, 130 or 143 after SIGINT or SIGTERM.
    """
    arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        main(arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        ignore_sigterm()
        sys.exit(_report(error, say))
    except KeyboardInterrupt:
        ignore_sigterm()
        if say("Interrupted."):
            print("\nInterrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def ignore_sigterm() -> None:
    """For a process that is about to say why it ends: torchrun's SIGTERM would come between that and the end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _report(error: Exception, say: Callable[[str], bool]) -> int:
    code = 2 if isinstance(error, UsageError) else 3 if isinstance(error, DataError) else 1
    message = " ".join(str(error).split())
    if code == 1 and not isinstance(error, RunError):
        message = f"{type(error).__name__}: {message} (run again with --debug for the traceback)"
    if say(message or "no message"):
        print(f"error: {message}", file=sys.stderr)
    return code


def _raise_terminated(signum: int, frame: object) -> None:
    sys.exit(128 + signum)
