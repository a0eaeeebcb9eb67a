"""Test parallel_map under faults: signals, processes that die or hang, and a main process that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from util import parallel
from util.errors import RunError
from util.parallel import parallel_map, worker_number, working_on

ROOT = Path(__file__).resolve().parents[1]
# Write one file for each item that has none yet. Slow imports of spawned processes take a second.
PROGRAM = """
import sys, time
from pathlib import Path
from util import parallel
from util.errors import run_script
from util.files import atomic_write

folder, fork, count = Path(sys.argv[1]), sys.argv[2] == "fork", int(sys.argv[3])
if __name__ == "__mp_main__":
    time.sleep(1)

def write(folder, item):
    with atomic_write(folder / f"{item}.txt") as partial:
        partial.write_text(str(item))
        time.sleep(0.02)
    return item

@parallel.resumable
def main(arguments):
    parallel.SILENCE = float(sys.argv[4])
    left = [item for item in range(count) if not (folder / f"{item}.txt").exists()]
    print("start", flush=True)
    with parallel.parallel_map(write, folder, left, 2, fork) as results:
        for item in results:
            print("done", item, flush=True)

if __name__ == "__main__":
    run_script(main)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Return start("spawn", count), which starts PROGRAM in a session of its own and waits for its first line."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()

    def run(method: str, count: int, silence: int = 60) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "program.py", tmp_path / "out", method, str(count), str(silence)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "start\n"
        return process

    return run


def wait_for_empty_session(session: int) -> None:
    """Wait until no process of the session is left. Zombies do not count."""
    deadline = time.monotonic() + 30
    while True:
        found = subprocess.run(["ps", "-o", "stat=,pid=,args=", "-s", str(session)], capture_output=True, text=True)
        left = [line for line in found.stdout.splitlines() if not line.startswith("Z")]
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def double(shared: int, item: int) -> int:
    working_on(f"item {item}")
    time.sleep(0.01 * (item % 3))
    return shared * item + 0 * worker_number()


@pytest.mark.parametrize("processes", [0, 1, 2, 5])
def test_parallel_map_keeps_the_order(processes):
    with parallel_map(double, 2, range(40), processes) as results:
        assert list(results) == list(range(0, 80, 2))
    with parallel_map(double, 2, [], processes) as results:
        assert list(results) == []


def number_of_worker(shared: None, item: int) -> int:
    time.sleep(0.1)
    return worker_number()


def test_worker_number_counts_the_processes():
    with parallel_map(number_of_worker, None, range(12), 3) as results:
        assert set(results) == {0, 1, 2}
    assert worker_number() == 0


def test_parallel_map_reads_few_items_ahead():
    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    read: list[int] = []
    with parallel_map(double, 1, items(), 2) as results:
        for item in results:
            assert len(read) <= item + 1 + 4 * 2


def fail_at_5(shared: type, item: int) -> int:
    if item == 5:
        raise shared("no five")
    return item


def test_parallel_map_raises_the_error_of_the_function():
    with pytest.raises(KeyError, match="no five") as caught, parallel_map(fail_at_5, KeyError, range(50), 2) as results:
        list(results)
    assert "fail_at_5" in caught.value.__notes__[0]  # the traceback, for --debug


def signal_itself_at_5(number: int, item: int) -> int:
    working_on(f"item {item}")
    if item == 5:
        time.sleep(0.5)  # until the items before it are done
        os.kill(os.getpid(), number)
    return item


def test_killed_worker_is_one_line_that_names_the_item():
    done = []
    with (
        pytest.raises(RunError, match=r"^item 5: a process died here, .* fewer --processes\.$"),
        parallel_map(signal_itself_at_5, signal.SIGKILL, range(50), 2) as results,
    ):
        done.extend(results)
    assert done == [0, 1, 2, 3, 4]


def test_hung_worker_is_one_line_that_names_the_item(monkeypatch):
    monkeypatch.setattr(parallel, "SILENCE", 1.5)
    monkeypatch.setattr(parallel, "_GRACE", 0.5)
    before = time.monotonic()
    done = []
    with (
        pytest.raises(RunError, match=r"^item 5: a process has not got ahead here for 2 s\. .*run the same command"),
        parallel_map(signal_itself_at_5, signal.SIGSTOP, range(50), 2) as results,
    ):
        done.extend(results)
    assert done == [0, 1, 2, 3, 4] and time.monotonic() - before < 15


def slow_item(shared: None, item: int) -> int:
    for step in range(8):
        working_on(f"item {item}, step {step}")
        time.sleep(0.5)
    return item


def test_slow_worker_that_reports_is_not_hung(monkeypatch):
    monkeypatch.setattr(parallel, "SILENCE", 1.5)
    with parallel_map(slow_item, None, range(2), 2) as results:
        assert list(results) == [0, 1]


@pytest.mark.parametrize(
    ("method", "moment", "signals"),
    [
        ("spawn", "start", [signal.SIGINT] * 3),
        ("spawn", "start", [signal.SIGTERM]),
        ("spawn", "work", [signal.SIGINT] * 2),
        ("fork", "start", [signal.SIGTERM] * 2),
        ("fork", "work", [signal.SIGUSR1]),
        ("fork", "work", [signal.SIGINT] * 3),
        ("fork", "work", [signal.SIGTERM]),
        ("fork", "work", [signal.SIGHUP] * 2),  # of a terminal that closes, and its shell
        ("spawn", "start", [signal.SIGHUP]),
    ],
)
def test_signal_ends_all_and_the_same_command_goes_on(start, tmp_path, method, moment, signals):
    process = start(method, 120)
    if moment == "work":
        assert process.stdout.readline() == "done 0\n"
    else:
        time.sleep(0.3)
    for number in signals:
        os.killpg(process.pid, number)  # as a terminal and a cluster do
        time.sleep(0.05)
    _, errors = process.communicate(timeout=20)
    # A shell shows both as 128 + the signal; the second one is a signal that comes while Python itself ends.
    assert process.returncode == 128 + signals[0] or (len(signals) > 1 and process.returncode == -signals[0])
    blank = "\n" if signals[0] == signal.SIGINT else ""  # after the ^C of a terminal
    assert errors == f"{blank}Interrupted. The same command continues from here.\n"
    wait_for_empty_session(process.pid)
    out = tmp_path / "out"
    done = {path.name for path in out.iterdir()}
    assert all(name[0] != "." for name in done) and len(done) < 120  # no file that is written in part
    again = start(method, 120)
    printed, errors = again.communicate(timeout=60)
    assert (again.returncode, errors) == (0, "") and printed.count("done") == 120 - len(done)
    assert {path.name: path.read_text() for path in out.iterdir()} == {f"{item}.txt": str(item) for item in range(120)}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_a_killed_main_process(start, tmp_path, method):
    process = start(method, 500)
    assert process.stdout.readline() == "done 0\n"
    process.kill()
    assert process.communicate(timeout=20)[1] == ""
    wait_for_empty_session(process.pid)
    assert not list((tmp_path / "out").glob(".*"))


def test_run_that_was_stopped_for_a_while_goes_on(start):
    process = start("fork", 120, silence=2)
    assert process.stdout.readline() == "done 0\n"
    os.killpg(process.pid, signal.SIGSTOP)  # Ctrl-Z, for longer than SILENCE
    time.sleep(3)
    os.killpg(process.pid, signal.SIGCONT)
    printed, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "") and printed.endswith("done 119\n")
