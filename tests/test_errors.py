"""How programs end: messages, exit codes and signals."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from util.console import logger
from util.errors import DataError, RunError, UsageError, run_script
from util.files import atomic_write

ROOT = Path(__file__).parents[1]


def ending(monkeypatch, error: BaseException | None, *arguments: str) -> int:
    """The exit code of a script whose main raises `error`."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])

    def main(given: list[str]) -> None:
        assert given == list(arguments)
        if error is not None:
            raise error

    try:
        run_script(main)
    except SystemExit as end:
        return 0 if end.code is None else end.code
    return 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--lr=x: not a number; give one"), 2, "error: --lr=x: not a number; give one\n"),
        (DataError("a.jpg: broken\n  remove it"), 3, "error: a.jpg: broken remove it\n"),
        (RunError("the loss became nan"), 1, "error: the loss became nan\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (run again with --debug for the traceback)\n"),
        (ValueError("a\nb"), 1, "error: ValueError: a b (run again with --debug for the traceback)\n"),
        (None, 0, ""),
    ],
)
def test_run_script_prints_one_line_and_sets_the_exit_code(monkeypatch, capsys, error, code, line):
    assert ending(monkeypatch, error, "--lr", "x") == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


def test_run_script_raises_with_debug(monkeypatch):
    with pytest.raises(DataError, match="broken"):
        ending(monkeypatch, DataError("broken"), "--debug")


def test_run_script_ends_an_interrupt_with_130(monkeypatch, capsys):
    assert ending(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError])
def test_message_follows_what_iterators_print_at_their_end(monkeypatch, capsys, error, is_replaced):
    def bar():
        try:
            yield 1
        finally:
            print("100%", file=sys.stderr)

    def main(arguments: list[str]) -> None:
        images = bar()
        try:
            for _ in images:
                raise error("the end")
        except error:
            if is_replaced:
                raise error("the end") from None
            raise

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        run_script(main)
    lines = capsys.readouterr().err.split()
    assert lines.count("100%") == 1 and lines[0] == "100%"


def test_run_script_ends_sigterm_with_143_after_cleanup(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main(arguments: list[str]) -> None:
        with atomic_write(tmp_path / "file.txt") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(RunError("lost"), 1), (KeyboardInterrupt(), 130)])
def test_run_script_reports_an_error_in_spite_of_sigterm(monkeypatch, capsys, error, code):
    def terminate(record: object) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    logger.addFilter(terminate)
    try:
        assert ending(monkeypatch, error) == code
    finally:
        logger.removeFilter(terminate)
    assert capsys.readouterr().err == ("error: lost\n" if code == 1 else "\nInterrupted.\n")


def test_run_script_prints_the_rank_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")
    assert ending(monkeypatch, DataError("a.jpg: broken")) == 3
    assert capsys.readouterr().err == "[rank 2] error: a.jpg: broken\n"


@pytest.mark.parametrize(
    ("environment", "out", "err"),
    [
        ({}, "info\nwarning\n", "error\n"),
        ({"RANK": "1"}, "info\nwarning\n", "error\n"),  # of a launcher other than torchrun
        ({"LOCAL_RANK": "0", "RANK": "0"}, "info\nwarning\n", "error\n"),
        ({"LOCAL_RANK": "1", "RANK": "9"}, "[rank 9] warning\n", "[rank 9] error\n"),
    ],
)
def test_console_prints_info_on_rank_0_only(monkeypatch, capsys, environment, out, err):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger.info("info")
    logger.warning("warning")
    logger.error("error")
    assert capsys.readouterr() == (out, err)


def test_run_script_keeps_the_exit_code_of_the_parser(monkeypatch):
    assert ending(monkeypatch, SystemExit(2)) == 2


def test_errors_of_users_are_value_errors():
    assert issubclass(UsageError, ValueError) and issubclass(DataError, ValueError)


def test_signal_during_an_import_ends_at_once(tmp_path):
    """An exception would cut the import short, which numpy then repeats and reports as an error of its own."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('cannot load module') from None\n"
    )
    code = "from util.errors import run_script\nrun_script(lambda arguments: __import__('slow'))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


SIGNAL_TWICE = """
import os, signal, sys, time
from util.errors import run_script

number, seconds = map(int, sys.argv[1:])

def main(arguments):
    try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), number)
        time.sleep(seconds)

run_script(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_second_signal_ends_the_cleanup_of_the_first(number):
    assert end_of_code(SIGNAL_TWICE, str(int(number)), "60") == (128 + number, "")


def test_second_hangup_does_not_end_the_cleanup():
    """A terminal that closes ends the shell and the program, and the shell sends the signal to the program again."""
    assert end_of_code(SIGNAL_TWICE, str(int(signal.SIGHUP)), "0") == (129, "Interrupted (SIGHUP).\n")


def end_of_code(code: str, *arguments: str, ignored: bool = False) -> tuple[int, str]:
    """Run a program. Return its exit code and what is on stderr."""
    command = (["nohup"] if ignored else []) + [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    return ended.returncode, ended.stderr


def test_hangup_does_not_end_a_program_of_nohup():
    code = (
        "import os, signal, sys\nfrom util.errors import run_script\nfrom util.parallel import parallel_map\n"
        "def main(arguments):\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    with parallel_map(max, 1, range(3), 2) as results:\n        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        print(list(results), file=sys.stderr)\nrun_script(main)"
    )
    assert end_of_code(code, ignored=True) == (0, "[1, 1, 2]\n")


def test_program_ends_in_order_when_its_terminal_closes(tmp_path):
    """What it prints then fails, and must not change how it ends."""
    code = (
        "import pathlib, sys, time\nfrom util.console import logger\nfrom util.errors import run_script\n"
        "def main(arguments):\n    try:\n        logger.info('started')\n        time.sleep(60)\n    finally:\n"
        "        logger.info('saving')\n        logger.error('saving')\n        pathlib.Path(sys.argv[1]).touch()\n"
        "run_script(main)"
    )
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code, str(tmp_path / "saved")])
    assert os.read(terminal, 100) == b"started\r\n"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert (tmp_path / "saved").exists()
