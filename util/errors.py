"""The errors that a user can meet, and `run_script`, which ends every program in the same way.

A message is one line: `FLAG OR FILE: what is wrong. What to do.`
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from util.console import logger

# What ends a program: Ctrl-C, kill or a shutdown, what clusters send before a time limit, and a terminal that closes.
STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
    STOP_SIGNALS += (signal.SIGHUP,)


class UsageError(ValueError):
    """A bad command line or setting."""


class DataError(ValueError):
    """A file or data set that cannot be used."""


class RunError(RuntimeError):
    """A run that cannot continue, although its command line and data are valid."""


class Interrupted(KeyboardInterrupt):
    """One of STOP_SIGNALS arrived.

    Args:
        number: the signal.
        message: the line that run_script prints: what is saved, and how to continue. None: the name of the signal.
            Empty: nothing, because another rank prints it.

    Attributes:
        is_handled: whether a message was given.
    """

    def __init__(self, number: int, message: str | None = None):
        super().__init__(number)
        self.number = number
        self.is_handled = message is not None
        name = "" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
        self.message = f"Interrupted{name}." if message is None else message


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run main(arguments) and end the process: a failure prints one line on stderr, and a traceback only with --debug.

    Exit codes: 0 success, 2 bad command line, 3 bad data, 1 anything else, 128 + the number of one of STOP_SIGNALS. The
    first of these signals raises Interrupted in main. A second one ends the process at once.
    Under torchrun each rank that fails prints its line, with its rank in front.
    """
    arguments = sys.argv[1:]
    on_stop_signal(_interrupt)
    try:
        main(arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        ignore_stop_signals()
        _clear_frames(error)
        code = _report(error)
    except KeyboardInterrupt as stop:
        ignore_stop_signals()
        _clear_frames(stop)
        interrupted = stop if isinstance(stop, Interrupted) else Interrupted(signal.SIGINT)
        if interrupted.number == signal.SIGINT:
            print(file=sys.stderr)  # the terminal shows ^C on this line
        if interrupted.message:
            logger.error(interrupted.message)
        code = 128 + interrupted.number
    else:
        return
    leave_on_stop_signal()  # if the end of the interpreter waits for a process that hangs
    sys.exit(code)


def _clear_frames(error: BaseException) -> None:
    """End the iterators that the frames of an error hold. A progress bar would print its last line after the error."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


def on_stop_signal(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler(number, frame)` for each of STOP_SIGNALS."""
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def leave_on_stop_signal() -> None:
    """End this process at once when a second signal comes, except SIGHUP: a shell that ends sends it again."""

    def leave(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            leave_at_once(number, frame)

    on_stop_signal(leave)


def ignore_stop_signals() -> None:
    """Ignore signals while the process reports its end: torchrun sends SIGTERM to all ranks when one rank fails."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def write_at_once(text: str) -> None:
    """Write a line to stderr within a signal handler, which must not use logging, and ignore a closed terminal."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """End this process and its child processes without any cleanup."""
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    leave_on_stop_signal()
    interrupted = Interrupted(number)
    while frame is not None:
        # An import that an exception cuts short is repeated by some libraries, and fails then for another reason.
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            write_at_once(interrupted.message)
            leave_at_once(number, frame)
        frame = frame.f_back
    raise interrupted


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
